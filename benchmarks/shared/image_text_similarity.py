"""A space that holds images and captions alike: that of the teacher of recipes/selected.

images uint8 [n 3 h w] -describe-> unit vectors [n d]
captions               -embed->    unit vectors [n d]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel

from benchmarks.shared.provenance import recipe
from lavit_tok import VisualImageProcessor

TIE = 1e-9  # products of equal vectors may differ by rounding


class Teacher:
    """The teacher's image-text space, as recipes/selected/teacher.py trains and writes it.

    Patch features -> LayerNorm without weights -> mean -> projection into the space of the
    captions' sentence embeddings (all-MiniLM-L6-v2).

    Raises:
        ValueError: a missing file.
    """

    FILES = ("config.json", "model.safetensors", "caption_projection.safetensors")

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        missing = [name for name in self.FILES if not (directory / name).is_file()]
        if missing:
            expected = "the folder that recipes/selected/teacher.py wrote"
            raise ValueError(f"--scorer {directory}: expected {expected}; missing {missing}")
        model: Any = CLIPVisionModel.from_pretrained(directory, use_safetensors=True)
        self.model, self.device = model.eval().to(device), device
        tensors = load_file(directory / self.FILES[2])
        self.projection = tensors["weight"].to(device), tensors["bias"].to(device)

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """uint8 [n 3 h w] -> [n d]; images of another size than the teacher's are resized."""
        processor, vectors = VisualImageProcessor(self.model.config.image_size), []
        for part in images.split(64):
            pixels = processor(part)["pixel_values"].to(self.device)
            hidden = self.model(pixel_values=pixels).last_hidden_state[:, 1:]
            mean = F.layer_norm(hidden, hidden.shape[-1:]).mean(1)
            vectors.append(F.normalize(F.linear(mean, *self.projection).float(), dim=1).cpu())
        return torch.cat(vectors)

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors [n 384]. Raises ModuleNotFoundError, which names the package to install."""
        return recipe("selected/sentences.py").embed(list(captions))


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """How many other candidates are at least as near to query i as candidate i: int64 [n].

    A tie counts against it: an answer that fits everything identifies nothing.
    """
    near = queries.double() @ candidates.double().T
    return (near >= near.diagonal()[:, None] - TIE).sum(1) - 1


def top(found: Tensor) -> dict[str, float]:
    """{"top1", "top5"}: ratios of ranks below 1 and below 5; empty without ranks."""
    return {f"top{k}": float((found < k).double().mean()) for k in (1, 5)} if len(found) else {}

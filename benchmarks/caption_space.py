"""The scorer of generated pictures and captions: the teacher's image-text space, and sentence embeddings of captions.

    pictures -> CLIPVisionModel, CLS dropped -> LayerNorm without weights -> mean patch -> projection -> unit vector
    captions -> all-MiniLM-L6-v2 (recipes/default/sentences.py) -> unit vector of the same space

Both as recipes/default/teacher.py trains and writes them. It has seen the training pictures with their captions, but
no picture that a decoder drew, nor any code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel

from lavit_tok import VisualImageProcessor

RECIPES = Path(__file__).parents[1] / "recipes" / "default"
TIE = 1e-9  # products of equal vectors may differ by rounding
FILES = ("config.json", "model.safetensors", "caption_projection.safetensors")


class Scorer:
    """Pictures -> unit vectors in the space of the sentence embeddings.

    Args:
        directory: what recipes/default/teacher.py wrote.

    Raises:
        ValueError: a file that is missing, cannot be read or does not fit the others.
    """

    def __init__(self, directory: str | Path, device: str = "cpu") -> None:
        directory = Path(directory)
        missing = [name for name in FILES if not (directory / name).is_file()]
        if missing:
            raise ValueError(
                f"--scorer {directory}: expected the folder that recipes/default/teacher.py wrote; missing {missing}"
            )
        self.vision: Any = (
            CLIPVisionModel.from_pretrained(directory, use_safetensors=True).eval().to(device)
        )
        width = self.vision.config.hidden_size
        try:
            tensors = load_file(directory / FILES[2], device=device)
            self.weight, self.bias = tensors["weight"], tensors["bias"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{directory / FILES[2]}: expected tensors weight and bias: {error}"
            ) from None
        if self.weight.shape[1] != width or self.bias.shape != self.weight.shape[:1]:
            shapes = list(self.weight.shape), list(self.bias.shape)
            raise ValueError(
                f"{directory / FILES[2]}: expected a layer of {width} inputs, got shapes {shapes}"
            )
        self.device = device

    @torch.no_grad()
    def describe(self, pictures: Tensor, batch_size: int = 64) -> Tensor:
        """uint8 [n 3 h w] -> [n d]; other sizes than the teacher's are resized."""
        processor, found = VisualImageProcessor(self.vision.config.image_size), []
        for part in pictures.split(batch_size):
            part = processor.to_uint8(part)
            states = self.vision(
                pixel_values=processor.normalize(part).to(self.device)
            ).last_hidden_state[:, 1:]
            mean = F.layer_norm(states, states.shape[-1:]).mean(1)
            found.append(F.normalize(F.linear(mean, self.weight, self.bias).float(), dim=1).cpu())
        return torch.cat(found)


def embed(captions: Sequence[str]) -> Tensor:
    """Unit vectors [n 384]. Raises ModuleNotFoundError, which says what to install."""
    if str(RECIPES) not in sys.path:
        sys.path.append(str(RECIPES))
    import sentences

    return sentences.embed(list(captions))


# Measures


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """How many of the candidates [n d] are at least as near to query i of [n d] as its own, candidate i: int64 [n].

    0 is a hit at top-1. A tie counts against it: an answer that fits everything identifies nothing.
    """
    near = queries.double() @ candidates.double().T
    return (near >= near.diagonal()[:, None] - TIE).sum(1) - 1


def top(found: Tensor, chosen: Tensor | None = None) -> Any:
    """{"top1", "top5"}, shares of ranks below 1 and below 5, of all or of some queries; None of no queries."""
    found = found if chosen is None else found[chosen]
    if not len(found):
        return None
    return {"top1": float((found < 1).double().mean()), "top5": float((found < 5).double().mean())}

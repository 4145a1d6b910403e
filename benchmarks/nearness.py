"""Spaces of pictures and captions: CLIP's, where its weights are at hand, and the teacher's (caption_space.py).

    pictures uint8 [n 3 h w] -describe->  unit vectors [n d]
    captions                 -embed->     unit vectors [n d]

The product of the two is the cosine; published CLIP scores are 100 times its mean.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import caption_space
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.encode.image_processor import VisualImageProcessor


class Clip:
    """A CLIP model's space; pictures are resized and normalised as CLIP was trained.

    Args:
        directory: a `transformers` CLIPModel with its text tokenizer.

    Raises:
        ValueError: files that are missing or no CLIP model's.
    """

    def __init__(self, directory: Path, device: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        if not directory.is_dir():
            raise ValueError(
                f"--clip {directory}: expected the folder of a CLIP model with its tokenizer"
            )
        try:
            self.model: Any = (
                CLIPModel.from_pretrained(directory, use_safetensors=True).eval().to(device)
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"--clip {directory}: expected a CLIP model with its tokenizer: {error}"
            ) from None
        self.name, self.weights, self.device = f"CLIP {directory.name}", self.model, device

    @torch.no_grad()
    def describe(self, pictures: Tensor) -> Tensor:
        """uint8 [n 3 h w] -> [n d]"""
        size = self.model.config.vision_config.image_size
        processor = VisualImageProcessor(size, "center_crop")
        cut = processor.to_uint8(pictures)
        pooled = self.model.vision_model(
            pixel_values=processor.normalize(cut).to(self.device)
        ).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=1).cpu()

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Tensor:
        """[n d]; longer captions than CLIP reads are cut."""
        most = self.model.config.text_config.max_position_embeddings
        given = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        given = {name: given[name].to(self.device) for name in ("input_ids", "attention_mask")}
        pooled = self.model.text_model(**given).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=1).cpu()


class CaptionSpace:
    """The teacher's space, see caption_space.py."""

    def __init__(self, directory: Path, device: str) -> None:
        self.scorer = caption_space.Scorer(directory, device)
        self.name, self.weights = "the teacher's space", self.scorer.vision

    def describe(self, pictures: Tensor) -> Tensor:
        return self.scorer.describe(pictures)

    def embed(self, captions: Sequence[str]) -> Tensor:
        return caption_space.embed(captions)


def scorers_of(a: Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if a.clip:
        found["clip"] = Clip(a.clip, a.device)
    if a.scorer:
        found["teacher"] = CaptionSpace(a.scorer, a.device)
    return found

"""VL-GPT's image decoder: vectors -> detokenizer -> frozen diffusion model -> images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from lavit_lm.objectives.records import ImageVectors
from lavit_lm.objectives.vlgpt.diffusion import FrozenDiffusion, load_diffusion
from lavit_lm.objectives.vlgpt.tokenizer import Detokenizer
from lavit_lm.objectives.vlgpt.tokenizer_files import load_detokenizer


class DetokenizingDecoder:
    """ImageDecoder of a detokenizer and of the diffusion model that it was trained for.

    Args:
        detokenizer: frozen.
        diffusion: that diffusion model.
        learned: the conditions that the detokenizer has learned; the others are replaced by the
            model's null.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        diffusion: FrozenDiffusion,
        learned: Sequence[str] = ("image", "text"),
    ) -> None:
        self.detokenizer, self.diffusion = detokenizer.eval().requires_grad_(False), diffusion
        self.learned = learned

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> DetokenizingDecoder:
        """A directory of stage 1, and the diffusion model that it names. Raises WeightsError."""
        detokenizer, config = load_detokenizer(directory)
        diffusion = load_diffusion(config["diffusion"], None).to(device)
        return cls(detokenizer.to(device), diffusion, config["learned"])

    @torch.no_grad()
    def decode(
        self,
        outputs: ImageVectors,
        generator: Any = None,
        num_inference_steps: int = 25,
        guidance_scale: float | int = 3.0,
        leave_out: str | None = None,
    ) -> list[Image.Image]:
        """See ImageDecoder.

        Args:
            generator: source of the noise.
            num_inference_steps: of the diffusion model.
            guidance_scale: of the diffusion model.
            outputs: their unconditional vectors are not used: guidance uses the diffusion model's
                own null embeddings, with which it was trained.
            leave_out: "image" or "text": a condition to replace by the model's null.

        Raises:
            ValueError: another name to leave out, or no condition left.
        """
        if leave_out not in (None, "image", "text"):
            raise ValueError(f"leave_out: expected 'image', 'text' or None, got {leave_out!r}")
        embeddings = self.detokenizer(outputs.vectors.to(self.detokenizer.read.weight))
        for name in ("image", "text"):
            if name == leave_out or name not in self.learned:
                embeddings = embeddings._replace(**{name: None})
        return self.diffusion.generate(embeddings, num_inference_steps, guidance_scale, generator)

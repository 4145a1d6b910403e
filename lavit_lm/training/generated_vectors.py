"""The vectors that a frozen language model generates for captions, to train decoders on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lavit_lm.multimodal import MultimodalLM

KEPT = 1 << 17
"""Captions whose vectors are kept: of 16 of width 256, a gigabyte."""


def require_vectors(lm: MultimodalLM, name: str) -> int:
    """N, the vectors of an image. Raises ValueError for a model that generates codes."""
    output = lm.objective.image_output
    if output.kind != "vectors":
        raise ValueError(
            f"model: expected one that generates vectors, got {name}, which generates codes "
            f"({lm.objective.name})"
        )
    return output.limits(lm.visual_tokenizer.config.num_patches)[1]


class GeneratedVectors:
    """Generates the vectors of captions, those of equal captions once.

    Args:
        lm: the language model.
        keep: captions whose vectors are kept in memory as float16; 0 generates them again each
            time.
    """

    def __init__(self, lm: MultimodalLM, keep: int = 0) -> None:
        self.lm, self.keep = lm, keep
        self.cached: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Float[Tensor, "b n d"]:
        """The vectors of each caption; a blank one is an empty prompt."""
        new = list(dict.fromkeys(text for text in captions if text not in self.cached))
        vectors = {text: self.cached[text] for text in captions if text in self.cached}
        if new:
            # Without autocast, as in generation after the training
            with torch.autocast(self.lm.device.type, enabled=False):
                prompts = [text if text.strip() else [] for text in new]
                generated = self.lm.generate_vectors_batch(prompts)
            made = dict(zip(new, generated.half() if self.keep else generated, strict=True))
            vectors |= made
            if self.keep:
                if len(self.cached) + len(made) > self.keep:
                    self.cached.clear()
                self.cached |= made
        # float(): autocast cannot stack float16
        return torch.stack([vectors[text].float() for text in captions])

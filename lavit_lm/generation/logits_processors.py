"""The steps of sampling.py as logits processors, for the `generate` of `transformers`.

    scores [2b v] -> Guidance -> Constraint -> Sampling: one id left -> greedy decoding

The first half of a guided batch is conditional, the second unconditional. Both halves get equal
scores, and so every id that is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import LogitsProcessor

from lavit_lm.generation.sampling import GenerationConstraint, Sampling
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary


class GuidanceLogitsProcessor(LogitsProcessor):
    """Classifier-free guidance u + s (c - u) of a batch and its unconditional half.

    Args:
        scale: s.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(
        self, input_ids: Int64[Tensor, "r l"], scores: Float[Tensor, "r v"]
    ) -> Float[Tensor, "r v"]:
        """Guided scores, the same in both halves."""
        conditional, free = scores.chunk(2)
        return (free + self.scale * (conditional - free)).repeat(2, 1)


class ImageConstraintLogitsProcessor(LogitsProcessor):
    """Only codes, then the id that ends the image, within limits on the number of codes.

    Args:
        vocabulary: the ids of the image tokens.
        prompt_length: number of ids before the first code.
        min_codes: smallest number of codes.
        max_codes: largest number of codes.
    """

    def __init__(
        self, vocabulary: VisualVocabulary, prompt_length: int, min_codes: int, max_codes: int
    ) -> None:
        self.vocabulary, self.prompt_length = vocabulary, prompt_length
        self.constraint = GenerationConstraint("image", min_codes, max_codes)

    def __call__(
        self, input_ids: Int64[Tensor, "r l"], scores: Float[Tensor, "r v"]
    ) -> Float[Tensor, "r v"]:
        """Scores with -inf at ids that may not follow."""
        contents = self.vocabulary.masks(scores.shape[1], scores.device)
        stops = torch.tensor([self.vocabulary.end], device=scores.device)
        allowed = self.constraint.allowed(contents, stops, input_ids.shape[1] - self.prompt_length)
        return scores.masked_fill(~allowed, -torch.inf)


class SamplingLogitsProcessor(LogitsProcessor):
    """Draws an id for each sequence from its own generator, and leaves a score to that id only.

    Args:
        sampling: temperature, top_k and top_p; its guidance scale is not used.
        generators: one for each conditional sequence, None for torch's global one. The other
            sequences get the same ids again.
    """

    def __init__(self, sampling: Sampling, generators: Sequence[torch.Generator | None]) -> None:
        self.sampling, self.generators = sampling, generators

    def __call__(
        self, input_ids: Int64[Tensor, "r l"], scores: Float[Tensor, "r v"]
    ) -> Float[Tensor, "r v"]:
        """0 at the drawn ids, -inf elsewhere."""
        count = len(self.generators)
        ids = self.sampling.draw(scores[:count], self.generators).repeat(len(scores) // count)
        return torch.full_like(scores, -torch.inf).scatter(1, ids[:, None], 0.0)

"""Emu (Sun et al., ICLR 2024): predict the next text token, or the next vector of an image.

An image is exactly N vectors, which a causal transformer computes from all its features
(vision/resampler.py); with two of them:

    [image, "a cat"]
                          position     0     1      2    3    4       5     6     7
                          id           <s>   <img>  .    .    </img>  a     cat   </s>
                          role         TEXT  BEGIN  VIS  VIS  END     TEXT  TEXT  TEXT
                          is_embedding .     .      z1   z2   .       .     .     .
                          predict      .     .      .    .    .       x     x     x
                          regress      .     .      x    x    x       .     .     .

- Text tokens have cross-entropy; the first one after an image is predicted at </img>.
- Vectors have the squared error of Linear(hidden state), N + 1 terms for an image: z1 is predicted
  at <img>, z2 at z1, and the embedding of </img> at the last vector. Targets are the input
  embeddings, detached: otherwise all vectors become equal.
- <img> is never a target: the caller appends it to the prompt, and exactly N vectors follow,
  without a stop id. The unconditional vectors of guidance are those generated after the empty
  prompt `<s> <img>`, with which every image-first sequence begins.

The paper's transformer reads the encoder's class token as well, and initializes the embeddings of
the two delimiters with the mean of all others; here all patches of the encoder are read, and new
embeddings are distributed like the others (vocabulary/embeddings.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavit_lm.models.losses import LossSum, ModelOutput, cross_entropy, regression
from lavit_lm.objectives.base import PairOrder
from lavit_lm.objectives.records import Connectors, ImageDecoder, ImageOutput
from lavit_lm.objectives.vector_objective import VectorObjective
from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.sequences.token_sequence import Flags
from lavit_lm.vision.resampler import CausalResampler
from lavit_tok.nn.ranges import require_number


@dataclass(frozen=True)
class Emu(VectorObjective):
    """Cross-entropy of text tokens and regression of vectors.

    Args:
        order: of pairs: "both" draws one of the two for each sequence, "image_first", "text_first",
            or "given".
        queries: N, vectors per image; 32 as published.
        depth, heads, hidden_size: blocks, heads and width of the causal transformer, by default the
            encoder's width; 12, 12 and 768 as published.
        train_encoder: train a copy of the visual tokenizer's encoder with the rest, as published.
        pooled_queries: each also has the mean feature of a square of patches, see CausalResampler.
        regression_weight: of the mean squared error against the mean cross-entropy; the published
            value is unknown.
        vector_noise: of the vectors that the LM reads in training after a text; the largest
            standard deviation, in standard deviations of the vectors. 0 as published.

    Raises:
        ValueError: no queries, or a weight or noise below 0.
    """

    name: ClassVar[str] = "emu"
    title: ClassVar[str] = "Emu"
    order: PairOrder = "both"
    queries: int = 32
    depth: int = 12
    heads: int = 12
    hidden_size: int | None = None
    train_encoder: bool = True
    regression_weight: float = 1.0
    vector_noise: float = 0.0
    pooled_queries: bool = False

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries: expected at least one vector per image, got {self.queries}")
        require_number("regression_weight", self.regression_weight, 0, 1e6)
        require_number("vector_noise", self.vector_noise, 0, 100)

    @property
    def vectors(self) -> int:
        return self.queries

    @property
    def connectors(self) -> Connectors:
        """The causal transformer, and Linear(d, d) without bias."""
        return Connectors(self._resampler, _regressor, codes="none")

    @property
    def image_output(self) -> ImageOutput:
        """Exactly N vectors; their decoder is trained for one LM, none is shipped."""
        return ImageOutput("vectors", self.queries, self.queries, False, _load_decoder)

    def image_flags(self, is_target: bool) -> tuple[Flags, Flags, Flags]:
        regress = Flags(regress=is_target)
        return Flags(), regress, regress

    def losses(self, output: ModelOutput, batch: PackedBatch) -> dict[str, LossSum]:
        """{"text": nats, "vectors": squared errors, "spread": see losses.regression}."""
        return {"text": cross_entropy(output, batch)["text"], **regression(output, batch)}

    def total(self, losses: dict[str, LossSum]) -> Tensor:
        """Two means, so that their balance does not depend on the ratio of images in a batch."""
        return losses["text"].mean + self.regression_weight * losses["vectors"].mean

    def _resampler(self, visual: Any, hidden_size: int) -> CausalResampler:
        transformer = self.queries, self.depth, self.heads, self.train_encoder, self.hidden_size
        return CausalResampler(visual, hidden_size, *transformer, self.pooled_queries)


def _regressor(hidden_size: int) -> nn.Module:
    return nn.Linear(hidden_size, hidden_size, bias=False)


def _load_decoder(name: str, device: torch.device) -> ImageDecoder:
    from lavit_lm.objectives.emu.image_decoder import VectorDecoder  # late: it needs diffusers

    return VectorDecoder.from_pretrained(name, device=device)

"""Emu (Sun et al., ICLR 2024): the next word, or the next vector of a picture, in one causal pass.

A picture is exactly N vectors, which a causal transformer makes of all its features (resampler.py), with two queries:

    [picture, "a cat"]    place        0     1      2    3    4       5     6     7
                          id           <s>   <|img| .    .    |img>   a     cat   </s>
                          role         TEXT  BEGIN  VIS  VIS  END     TEXT  TEXT  TEXT
                          is_embedding .     .      z1   z2   .       .     .     .
                          predict      .     .      .    .    .       x     x     x      cross-entropy
                          regress      .     .      x    x    x       .     .     .      squared error

- Words have cross-entropy; the first one after a picture is predicted, from the picture's end.
- Vectors have the squared error of Linear(state), N + 1 terms a picture: <|img| says z1, z1 says z2, and the last one
  says the embedding of |img>. What is to be said is what the model is fed next, detached: undetached, all vectors
  become the same.
- Nothing trains the model to say <|img|: whoever wants a picture puts it there; exactly N vectors follow, without a
  stop. What a pixel decoder subtracts under guidance is what the model says after an empty prompt, `<s> <|img|`, which
  is how every picture-first row begins.

The paper's transformer reads the encoder's class token too, and starts the two new rows of the embedding as the mean of
the old; here all of the encoder's patches are read, and new rows are drawn like the old (embeddings.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavit_lm.models.losses import ModelOutput, Sum, cross_entropy, regression
from lavit_lm.objectives.base import ObjectiveModules, Order
from lavit_lm.objectives.embedding_objective import VectorObjective
from lavit_lm.sequences.packing import Packed
from lavit_lm.sequences.segments import Flags
from lavit_lm.vision.resampler import CausalResampler


@dataclass(frozen=True)
class Emu(VectorObjective):
    """Cross-entropy on words beside regression of vectors.

    Args:
        order: of pairs: "both" draws one of the two for each row, "image_first", "text_first", or "given".
        queries: N, vectors a picture; 32 as published.
        depth, heads, hidden_size: blocks, heads and width of the causal transformer, the width being the encoder's if it is
            not given; 12, 12 and 768 as published.
        train_encoder: train a copy of the visual tokenizer's encoder with the rest, as published.
        regression_weight: of the mean squared error against the mean cross-entropy; the published value is unknown.

    Raises:
        ValueError: no queries, or a weight below 0.
    """

    name: ClassVar[str] = "emu"
    title: ClassVar[str] = "Emu"
    emits_image_start: ClassVar[bool] = False
    order: Order = "both"
    queries: int = 32
    depth: int = 12
    heads: int = 12
    hidden_size: int | None = None
    train_encoder: bool = True
    regression_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries: expected at least one vector a picture, got {self.queries}")
        if self.regression_weight < 0:
            raise ValueError(f"regression_weight: expected 0 or more, got {self.regression_weight}")

    @property
    def vectors(self) -> int:
        return self.queries

    def flags(self, is_target: bool) -> tuple[Flags, Flags, Flags]:
        said = Flags(regress=is_target)
        return Flags(), said, said

    def parts(self, visual: Any, width: int) -> ObjectiveModules:
        """The causal transformer, and Linear(width, width) without bias."""
        transformer = self.queries, self.depth, self.heads, self.train_encoder, self.hidden_size
        return ObjectiveModules(
            CausalResampler(visual, width, *transformer), nn.Linear(width, width, bias=False)
        )

    def decoder(self, name: str, device: torch.device) -> Any:
        """A VectorDecoder; none ships with the library."""
        from lavit_lm.objectives.emu.image_decoder import VectorDecoder

        return VectorDecoder.from_pretrained(name, device=device)

    def losses(self, seen: ModelOutput, batch: Packed) -> dict[str, Sum]:
        """{"text": nats, "vectors": squared errors, "spread": see losses.regression}."""
        return {"text": cross_entropy(seen, batch)["text"], **regression(seen, batch)}

    def total(self, losses: dict[str, Sum]) -> Tensor:
        """Two means, so that their balance does not drift with the share of pictures in a batch."""
        return losses["text"].mean + self.regression_weight * losses["vectors"].mean

"""Emu (Sun et al., ICLR 2024): the next word, or the next vector of a picture, in one causal pass.

A picture is exactly N vectors, which a causal transformer makes of all its features (resampler.py), with two queries:

    [picture, "a cat"]    place      0     1      2    3    4       5     6     7
                          id         <s>   <|img| .    .    |img>   a     cat   </s>
                          role       TEXT  BEGIN  VIS  VIS  END     TEXT  TEXT  TEXT
                          fed        .     .      z1   z2   .       .     .     .
                          predict    .     .      .    .    .       x     x     x      cross-entropy
                          regress    .     .      x    x    x       .     .     .      squared error

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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lavit_lm.lexicon import Lexicon
from lavit_lm.objectives.losses import Seen, Sum, cross_entropy, regression
from lavit_lm.objectives.objective import Objective, Order, Parts, ordered, require_picture
from lavit_lm.packing import Packed
from lavit_lm.resampler import CausalResampler
from lavit_lm.segments import Flags, Image, Role, Row, RowBuilder, Segment, Text


@dataclass(frozen=True)
class Emu(Objective):
    """Cross-entropy on words beside regression of vectors.

    Args:
        order: of pairs: "both" draws one of the two for each row, "image_first", "text_first", or "given".
        queries: N, vectors a picture; 32 as published.
        depth, heads, inner: blocks, heads and width of the causal transformer, the width being the encoder's if it is
            not given; 12, 12 and 768 as published.
        train_encoder: train a copy of the visual tokenizer's encoder with the rest, as published.
        regression_weight: of the mean squared error against the mean cross-entropy; the published value is unknown.

    Raises:
        ValueError: no queries, or a weight below 0.
    """

    name: ClassVar[str] = "emu"
    paints: ClassVar[Literal["codes", "vectors"]] = "vectors"
    opens_images: ClassVar[bool] = False
    order: Order = "both"
    queries: int = 32
    depth: int = 12
    heads: int = 12
    inner: int | None = None
    train_encoder: bool = True
    regression_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries: expected at least one vector a picture, got {self.queries}")
        if self.regression_weight < 0:
            raise ValueError(f"regression_weight: expected 0 or more, got {self.regression_weight}")

    @property
    def reads_pictures(self) -> bool:
        return True

    def parts(self, visual: Any, width: int) -> Parts:
        """The causal transformer, and Linear(width, width) without bias."""
        transformer = self.queries, self.depth, self.heads, self.train_encoder, self.inner
        return Parts(CausalResampler(visual, width, *transformer), nn.Linear(width, width, bias=False))

    def lengths(self, patches: int) -> tuple[int, int]:
        """Exactly N."""
        return self.queries, self.queries

    def decoder(self, name: str, device: torch.device) -> Any:
        """A VectorDecoder; none ships with the library."""
        from lavit_lm.pixels.vector_decoder import VectorDecoder

        return VectorDecoder.from_pretrained(name, device=device)

    def layout(self, sample: Sequence[Segment], lexicon: Lexicon, generator: torch.Generator, key: str = "") -> Row:
        """One row of any texts and pictures. Raises ValueError for no segments, or a picture of which only codes are
        known."""
        segments = ordered(sample, self.order, torch.rand((), generator=generator).item(), key)
        return self._places(segments, lexicon, key).text([lexicon.stop], predict=segments[-1].learn).row(key)

    def prompt(self, segments: Sequence[Segment], lexicon: Lexicon, opens: Literal["text", "image"]) -> Row:
        """Words and pictures one after another; before a picture that is to be said, <|img| is put for the model."""
        builder = self._places(segments, lexicon)
        return (builder if opens == "text" else builder.add([lexicon.vocabulary.begin], Role.BEGIN)).row()

    def scored(self, context: Sequence[Segment], answer: Segment, lexicon: Lexicon) -> Row:
        """A text, with the row's end. Raises ValueError for a picture: the model gives vectors no probability."""
        if not isinstance(answer, Text):
            return super().scored(context, answer, lexicon)
        said = [replace(segment, learn=False) for segment in context] + [replace(answer, learn=True)]
        return self._places(said, lexicon).text([lexicon.stop], predict=True).row()

    def losses(self, seen: Seen, batch: Packed) -> dict[str, Sum]:
        """{"text": nats, "vectors": squared errors, "spread": see losses.regression}."""
        return {"text": cross_entropy(seen, batch)["text"], **regression(seen, batch)}

    def total(self, losses: dict[str, Sum]) -> Tensor:
        """Two means, so that their balance does not drift with the share of pictures in a batch."""
        return losses["text"].mean + self.regression_weight * losses["vectors"].mean

    def _places(self, segments: Sequence[Segment], lexicon: Lexicon, key: str = "") -> RowBuilder:
        vocabulary, builder = lexicon.vocabulary, RowBuilder().text(lexicon.start)
        for segment in segments:
            if isinstance(segment, Text):
                builder.text(lexicon.text(segment.text), predict=segment.learn)
                continue
            fed = Image(picture=require_picture(segment, "Emu", key).picture)  # the bridge asks for no mask of patches
            said, nobody_reads = Flags(regress=segment.learn), [lexicon.pad] * self.queries
            builder.image((vocabulary.begin, vocabulary.end), nobody_reads, Flags(), said, said, fed)
        return builder

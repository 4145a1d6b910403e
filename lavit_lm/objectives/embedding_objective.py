"""What Emu and VL-GPT share: rows in which a picture is so many vectors, said one after another.

[picture, "a cat"]    <s> <|img| v1 v2 |img> a cat </s>      flags of <|img|, the vectors and |img>: the objective's
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from lavit_lm.objectives.base import Objective, Order, ordered, require_picture
from lavit_lm.sequences.segments import Flags, Image, Role, Row, RowBuilder, Segment, Text
from lavit_lm.vocabulary.processor import Lexicon


class VectorObjective(Objective):
    """Words and vectors in turn, causal within a document."""

    paints: ClassVar[Literal["codes", "vectors"]] = "vectors"
    title: ClassVar[str]
    """In messages."""
    order: Order

    @property
    @abstractmethod
    def vectors(self) -> int:
        """N, of a picture."""

    @abstractmethod
    def flags(self, learn: bool) -> tuple[Flags, Flags, Flags]:
        """What is predicted of a picture: at its opening, its vectors, its end."""

    @property
    def reads_pictures(self) -> bool:
        return True

    def lengths(self, patches: int) -> tuple[int, int]:
        """Exactly N."""
        return self.vectors, self.vectors

    def layout(self, sample: Sequence[Segment], lexicon: Lexicon, generator: torch.Generator, key: str = "") -> Row:
        """One row of any texts and pictures. Raises ValueError for no segments, or a picture of which only codes are
        known."""
        segments = ordered(sample, self.order, torch.rand((), generator=generator).item(), key)
        return self._places(segments, lexicon, key).text([lexicon.stop], predict=segments[-1].learn).row(key)

    def prompt(self, segments: Sequence[Segment], lexicon: Lexicon, opens: Literal["text", "image"]) -> Row:
        """Words and pictures one after another; for a picture that is asked for, <|img| is said for the model."""
        builder = self._places(segments, lexicon)
        return (builder if opens == "text" else builder.add([lexicon.vocabulary.begin], Role.BEGIN)).row()

    def scored(self, context: Sequence[Segment], answer: Segment, lexicon: Lexicon) -> Row:
        """A text, with the row's end. Raises ValueError for a picture: the model gives vectors no probability."""
        if not isinstance(answer, Text):
            return super().scored(context, answer, lexicon)
        said = [replace(segment, learn=False) for segment in context] + [replace(answer, learn=True)]
        return self._places(said, lexicon).text([lexicon.stop], predict=True).row()

    def _places(self, segments: Sequence[Segment], lexicon: Lexicon, key: str = "") -> RowBuilder:
        vocabulary, builder = lexicon.vocabulary, RowBuilder().text(lexicon.start)
        edges, nobody_reads = (vocabulary.begin, vocabulary.end), [lexicon.pad] * self.vectors
        for segment in segments:
            if isinstance(segment, Text):
                builder.text(lexicon.text(segment.text), predict=segment.learn)
                continue
            fed = Image(
                picture=require_picture(segment, self.title, key).picture
            )  # the bridge asks for no mask of patches
            builder.image(edges, nobody_reads, *self.flags(segment.learn), fed)
        return builder

"""What Emu and VL-GPT share: rows in which a picture is so many vectors, said one after another.

[picture, "a cat"]    <s> <|img| v1 v2 |img> a cat </s>      flags of <|img|, the vectors and |img>: the objective's
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from lavit_lm.objectives.base import Objective, Order, ordered, require_pixels
from lavit_lm.sequences.segments import (
    Flags,
    ImageSegment,
    Role,
    Segment,
    SequenceBuilder,
    TextSegment,
    TokenSequence,
)
from lavit_lm.vocabulary.processor import MultimodalProcessor


class VectorObjective(Objective):
    """Words and vectors in turn, causal within a document."""

    image_output: ClassVar[Literal["codes", "vectors"]] = "vectors"
    title: ClassVar[str]
    """In messages."""
    order: Order

    @property
    @abstractmethod
    def vectors(self) -> int:
        """N, of a picture."""

    @abstractmethod
    def flags(self, is_target: bool) -> tuple[Flags, Flags, Flags]:
        """What is predicted of a picture: at its opening, its vectors, its end."""

    @property
    def needs_pixels(self) -> bool:
        return True

    def lengths(self, patches: int) -> tuple[int, int]:
        """Exactly N."""
        return self.vectors, self.vectors

    def layout(
        self,
        sample: Sequence[Segment],
        processor: MultimodalProcessor,
        generator: torch.Generator,
        key: str = "",
    ) -> TokenSequence:
        """One row of any texts and pictures. Raises ValueError for no segments, or a picture of which only codes are
        known."""
        segments = ordered(sample, self.order, torch.rand((), generator=generator).item(), key)
        return (
            self._places(segments, processor, key)
            .text([processor.stop], predict=segments[-1].is_target)
            .row(key)
        )

    def prompt(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        opens: Literal["text", "image"],
    ) -> TokenSequence:
        """Words and pictures one after another; for a picture that is asked for, <|img| is said for the model."""
        builder = self._places(segments, processor)
        return (
            builder if opens == "text" else builder.add([processor.vocabulary.begin], Role.BEGIN)
        ).row()

    def scoring_sequence(
        self, context: Sequence[Segment], answer: Segment, processor: MultimodalProcessor
    ) -> TokenSequence:
        """A text, with the row's end. Raises ValueError for a picture: the model gives vectors no probability."""
        if not isinstance(answer, TextSegment):
            return super().scoring_sequence(context, answer, processor)
        said = [replace(segment, is_target=False) for segment in context] + [
            replace(answer, is_target=True)
        ]
        return self._places(said, processor).text([processor.stop], predict=True).row()

    def _places(
        self, segments: Sequence[Segment], processor: MultimodalProcessor, key: str = ""
    ) -> SequenceBuilder:
        vocabulary, builder = processor.vocabulary, SequenceBuilder().text(processor.start)
        edges, nobody_reads = (vocabulary.begin, vocabulary.end), [processor.pad] * self.vectors
        for segment in segments:
            if isinstance(segment, TextSegment):
                builder.text(processor.text(segment.text), predict=segment.is_target)
                continue
            is_embedding = ImageSegment(
                image=require_pixels(segment, self.title, key).image
            )  # the bridge asks for no mask of patches
            builder.image(edges, nobody_reads, *self.flags(segment.is_target), is_embedding)
        return builder

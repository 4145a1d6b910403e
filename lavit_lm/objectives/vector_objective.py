"""What Emu and VL-GPT share: sequences in which an image is a fixed number of vectors.

[image, "a cat"]    <s> <img> v1 v2 </img> a cat </s>      targets of the image: the objective's
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from lavit_lm.objectives.base import Objective, PairOrder, ordered, require_pixels
from lavit_lm.sequences.segments import ImageSegment, Segment, SegmentLength, TextSegment
from lavit_lm.sequences.token_sequence import Flags, Role, SequenceBuilder, TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor


class VectorObjective(Objective):
    """Text and vectors in turn, causal within a document."""

    title: ClassVar[str]
    """The paper's name for the model, in messages."""
    order: PairOrder

    @property
    @abstractmethod
    def vectors(self) -> int:
        """N, the number of vectors of an image."""

    @abstractmethod
    def image_flags(self, is_target: bool) -> tuple[Flags, Flags, Flags]:
        """What is predicted of an image: at its begin, its vectors, its end."""

    def layout(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        generator: torch.Generator,
        key: str = "",
    ) -> TokenSequence:
        """A sequence of texts and images. Raises ValueError for no segments, or no pixels."""
        segments, _ = ordered(segments, self.order, _draw(generator), key)
        builder = self._append(segments, processor, key)
        return builder.text([processor.stop], predict=segments[-1].is_target).build(key)

    def sequence_length(
        self,
        lengths: Sequence[SegmentLength],
        processor: MultimodalProcessor,
        generator: torch.Generator,
    ) -> int:
        """The order does not change the length."""
        segments = (self.vectors + 2 if s.is_image else s.tokens for s in lengths)
        return len(processor.start) + sum(segments) + 1

    def prompt(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        output: Literal["text", "image"],
    ) -> TokenSequence:
        """Texts and images in the given order; for an image the prompt ends with <img>."""
        builder = self._append(segments, processor)
        if output == "image":
            builder.add([processor.vocabulary.begin], Role.BEGIN)
        return builder.build()

    def scoring_sequence(
        self, context: Sequence[Segment], answer: Segment, processor: MultimodalProcessor
    ) -> TokenSequence:
        """A text and </s>. Raises ValueError for an image: vectors have no probability."""
        if answer.is_image:
            return super().scoring_sequence(context, answer, processor)
        segments = [replace(segment, is_target=False) for segment in context]
        builder = self._append([*segments, replace(answer, is_target=True)], processor)
        return builder.text([processor.stop], predict=True).build()

    def _append(
        self, segments: Sequence[Segment], processor: MultimodalProcessor, key: str = ""
    ) -> SequenceBuilder:
        vocabulary, builder = processor.vocabulary, SequenceBuilder().text(processor.start)
        delimiters, ids = (vocabulary.begin, vocabulary.end), [processor.pad] * self.vectors
        for segment in segments:
            if isinstance(segment, TextSegment):
                builder.text(processor.text(segment.text), predict=segment.is_target)
                continue
            pixels = require_pixels(segment, self.title, key).image
            embed = ImageSegment(
                image=pixels
            )  # without codes and mask: the bridge reads all patches
            builder.image(delimiters, ids, *self.image_flags(segment.is_target), embed)
        return builder


def _draw(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()

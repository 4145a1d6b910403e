"""LaVIT: an image is text in a foreign language; the next id is predicted everywhere (ICLR 2024, section 3.2).

    image -> text    <s> <|img| 7   3   9   |img> a   cat </s>      codes, or continuous vectors (v) in their places
    predicted        .   x      x   x   x   x     x   x   x
    text -> image    <s> a   cat <|img| 7   3   9   |img> </s>      always codes
    predicted        .   x   x   x      x   x   x   x     x
    prompt dropped   <s> <|img| 7   3   9   |img> </s>              learns the unconditional stream of guidance, and
    predicted        .   x      x   x   x   x     .                 not that nothing is to be said of a picture

Who sees whom: causal within a document. Loss: cross-entropy over both modalities, one mean, one head. A pair is laid
out in both orders, each as often as the other; a document of more segments keeps its order. The release feeds vectors
where an image stands before text; its targets are codes all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lavit_lm.models.losses import Sum
from lavit_lm.objectives.base import Objective, ObjectiveModules, Order, ordered
from lavit_lm.sequences.segments import (
    Flags,
    Role,
    Segment,
    SequenceBuilder,
    TextSegment,
    TokenSequence,
)
from lavit_lm.vision.continuous import ContinuousBridge
from lavit_lm.vocabulary.processor import MultimodalProcessor


@dataclass(frozen=True)
class LaVIT(Objective):
    """Next-token prediction over text and codes.

    Args:
        order: of pairs: "both" draws one of the two for each row, "image_first" (captioning only), "text_first"
            (generation only), or "given".
        prompt_drop: probability that a text-first pair loses its text, so that guidance has an unconditional stream.
            The paper does not publish its value.
        image_weight: weight of a code's cross-entropy against a text token's; 1 as published.
        continuous: feed pictures that stand before text as vectors through a bridge, instead of codes; the data then
            name the pictures.

    Raises:
        ValueError: a probability outside 0..1, or a weight below 0.
    """

    name: ClassVar[str] = "lavit"
    order: Order = "both"
    prompt_drop: float = 0.1
    image_weight: float = 1.0
    continuous: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_drop <= 1:
            raise ValueError(f"prompt_drop: expected a probability, got {self.prompt_drop}")
        if self.image_weight < 0:
            raise ValueError(f"image_weight: expected 0 or more, got {self.image_weight}")

    @property
    def needs_pixels(self) -> bool:
        return self.continuous

    def parts(self, visual: Any, width: int) -> ObjectiveModules:
        """The continuous path, if it is asked for."""
        return ObjectiveModules(ContinuousBridge(visual, width) if self.continuous else None)

    def layout(
        self,
        sample: Sequence[Segment],
        processor: MultimodalProcessor,
        generator: torch.Generator,
        key: str = "",
    ) -> TokenSequence:
        """One row of a sample. Raises ValueError for one without segments."""
        flip, drop = torch.rand(2, generator=generator).tolist()
        segments = ordered(sample, self.order, flip, key)
        pair = self.order != "given" and sorted(type(s).__name__ for s in segments) == [
            "ImageSegment",
            "TextSegment",
        ]
        dropped = pair and isinstance(segments[0], TextSegment) and drop < self.prompt_drop
        segments = segments[1:] if dropped else segments
        ends = segments[-1].is_target and not dropped
        return self._places(segments, processor).text([processor.stop], predict=ends).row(key)

    def prompt(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        opens: Literal["text", "image"],
    ) -> TokenSequence:
        """Pictures before a text are read as vectors where the model was trained so, before a picture as codes."""
        builder = self._places(
            segments, processor, text_follows=opens == "text", vectors=opens == "text"
        )
        return (
            builder if opens == "text" else builder.add([processor.vocabulary.begin], Role.BEGIN)
        ).row()

    def scoring_sequence(
        self, context: Sequence[Segment], answer: Segment, processor: MultimodalProcessor
    ) -> TokenSequence:
        """The answer, with the row's end."""
        said = [replace(segment, is_target=False) for segment in context] + [
            replace(answer, is_target=True)
        ]
        return self._places(said, processor).text([processor.stop], predict=True).row()

    def _places(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        text_follows: bool = False,
        vectors: bool = True,
    ) -> SequenceBuilder:
        vocabulary, builder = processor.vocabulary, SequenceBuilder().text(processor.start)
        for number, segment in enumerate(segments):
            said = Flags(predict=segment.is_target)
            if isinstance(segment, TextSegment):
                builder.text(processor.text(segment.text), **said)
                continue
            if segment.codes is None:
                raise ValueError("LaVIT predicts codes, and an image has none: tokenize it first")
            before_text = text_follows or any(
                isinstance(s, TextSegment) for s in segments[number + 1 :]
            )
            is_embedding = self.continuous and vectors and before_text and segment.image is not None
            edges = vocabulary.begin, vocabulary.end
            builder.image(
                edges,
                processor.codes(segment.codes),
                said,
                said,
                said,
                segment if is_embedding else None,
            )
        return builder

    def total(self, losses: dict[str, Sum]) -> Tensor:
        """The loss to descend: one mean over both modalities, so that each predicted id weighs the same."""
        text, image, weight = losses["text"], losses["image"], self.image_weight
        return (text.total + weight * image.total) / (text.count + weight * image.count).clamp(
            min=1e-9
        )

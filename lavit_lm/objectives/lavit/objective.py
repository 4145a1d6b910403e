"""LaVIT: an image is text in a foreign language; predict the next id (ICLR 2024, section 3.2).

    image -> text    <s> <img> 7 3 9 </img> a cat </s>      as inputs codes, or continuous vectors
    predicted        .   x     x x x x      x x   x
    text -> image    <s> a cat <img> 7 3 9 </img> </s>      always codes
    predicted        .   x x   x     x x x x      x
    prompt dropped   <s> <img> 7 3 9 </img> </s>            learns the unconditional sequence of
    predicted        .   x     x x x x      .               guidance, but no empty captions
    nested_vectors   <s> <img> v v v v </img> a cat </s>    an image before text, of nested codes
    predicted        .   x     . . . .      . x x   x

Attention: causal within a document. Loss: cross-entropy over both modalities, one mean, one head. A
pair is laid out in both orders, each with probability 1/2; a document of more segments keeps its
order. The release embeds vectors where an image precedes text; its targets are codes all the same.
Nested codes have no patches of their own: an image is read as vectors of squares of patches then,
and the codes are learned where the image follows a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lavit_lm.models.losses import LossSum
from lavit_lm.objectives.base import Objective, PairOrder, S, ordered
from lavit_lm.objectives.records import Connectors, ImageOutput
from lavit_lm.sequences.segments import Segment, SegmentLength, TextSegment
from lavit_lm.sequences.token_sequence import Flags, Role, SequenceBuilder, TokenSequence
from lavit_lm.vision.continuous import ContinuousBridge
from lavit_lm.vision.patch_vectors import PatchBridge
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok.nn.ranges import require_number


@dataclass(frozen=True)
class LaVIT(Objective):
    """Next-token prediction over text and codes.

    Args:
        order: of pairs: "both" draws one of the two for each sequence, "image_first" (captioning
            only), "text_first" (generation only), or "given".
        prompt_drop: probability that a text-first pair loses its text, which trains the
            unconditional sequence of guidance. The paper does not publish its value.
        image_weight: weight of a code's cross-entropy against a text token's; 1 as published.
        continuous: embed images that precede text as vectors through a bridge, instead of as codes;
            the data module then needs `images`.
        nested_vectors: the same for nested codes: read an image that precedes text as so many
            vectors, each the mean over a square of patches, of which nothing is predicted. None
            reads codes. A model with vectors reads images without pixels as codes all the same.
        vector_ratio: of sequences, how many have their images before text as `nested_vectors`; the
            others, as codes, keep the model able to read these.
        restricted_softmax: the probability of an id is among those that can be at its position:
            text tokens and <img>, or inside an image codes (of nested codes those of the rank's
            stage) and </img>. That is what generation here is constrained to, and the cost of a
            step hardly grows with the number of stages. In training a few targets are predicted
            among all ids, for samplers without the constraint. False, as published, trains the
            probability among all ids.
        prompt_codes: codes of an image in a prompt or document, by default as many as the image
            needs. The number that the images of the shards have, if it is another.

    Raises:
        ValueError: a probability outside 0..1, a weight below 0, no codes or vectors, or both kinds
            of vectors.
    """

    name: ClassVar[str] = "lavit"
    order: PairOrder = "both"
    prompt_drop: float = 0.1
    image_weight: float = 1.0
    continuous: bool = False
    nested_vectors: int | None = None
    vector_ratio: float = 1.0
    restricted_softmax: bool = False
    prompt_codes: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_drop", "vector_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")
        require_number("image_weight", self.image_weight, 0, 1e6)
        for name in ("prompt_codes", "nested_vectors"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 1, 1e6, integer=True)
        if self.continuous and self.nested_vectors is not None:
            raise ValueError(
                "expected continuous, a vector for each code, or nested_vectors, got both: an "
                "image would have two kinds of vectors"
            )

    @property
    def connectors(self) -> Connectors:
        """The continuous path, if it is used."""
        if self.nested_vectors is not None:
            bridge = partial(PatchBridge, vectors=self.nested_vectors)
            return Connectors(bridge, codes="not before text")
        return Connectors(bridge=ContinuousBridge if self.continuous else None)

    @property
    def image_output(self) -> ImageOutput:
        """Any number of codes."""
        return ImageOutput(prompt_codes=self.prompt_codes)

    def layout(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        generator: torch.Generator,
        key: str = "",
    ) -> TokenSequence:
        """The sequence of an example. Raises ValueError for one without segments."""
        segments, dropped, vectors = self._arranged(segments, generator, key)
        ends = segments[-1].is_target and not dropped
        builder = self._append(segments, processor, vectors=vectors)
        return builder.text([processor.stop], predict=ends).build(key)

    def sequence_length(
        self,
        lengths: Sequence[SegmentLength],
        processor: MultimodalProcessor,
        generator: torch.Generator,
    ) -> int:
        """An image has two delimiters."""
        lengths, _, vectors = self._arranged(lengths, generator)
        read = self.nested_vectors if vectors else None
        segments = (
            s.tokens if read is None or not precedes_text(lengths, i) else read
            for i, s in enumerate(lengths)
        )
        return len(processor.start) + sum(segments) + 2 * sum(s.is_image for s in lengths) + 1

    def prompt(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        output: Literal["text", "image"],
    ) -> TokenSequence:
        """Before text, images are vectors if the model was trained so; before an image, codes."""
        if output == "text":
            return self._append(segments, processor, text_follows=True).build()
        builder = self._append(segments, processor, vectors=False)
        return builder.add([processor.vocabulary.begin], Role.BEGIN).build()

    def scoring_sequence(
        self, context: Sequence[Segment], answer: Segment, processor: MultimodalProcessor
    ) -> TokenSequence:
        """The answer and </s> are predicted."""
        segments = [replace(segment, is_target=False) for segment in context]
        builder = self._append([*segments, replace(answer, is_target=True)], processor)
        return builder.text([processor.stop], predict=True).build()

    def _arranged(
        self, segments: Sequence[S], generator: torch.Generator, key: str = ""
    ) -> tuple[list[S], bool, bool]:
        """(segments in the order drawn, whether the prompt was dropped, whether to use vectors)."""
        flip, drop, vectors = torch.rand(3, generator=generator).tolist()
        arranged, is_pair = ordered(segments, self.order, flip, key)
        dropped = is_pair and not arranged[0].is_image and drop < self.prompt_drop
        return (arranged[1:] if dropped else arranged), dropped, vectors < self.vector_ratio

    def _append(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        text_follows: bool = False,
        vectors: bool = True,
    ) -> SequenceBuilder:
        vocabulary, builder = processor.vocabulary, SequenceBuilder().text(processor.start)
        for number, segment in enumerate(segments):
            flags = Flags(predict=segment.is_target)
            if isinstance(segment, TextSegment):
                builder.text(processor.text(segment.text), **flags)
                continue
            delimiters = vocabulary.begin, vocabulary.end
            before_text = text_follows or precedes_text(segments, number)
            embed = vectors and before_text and segment.image is not None
            if embed and self.nested_vectors is not None:
                ids = [processor.pad] * self.nested_vectors
                image = segment.as_vectors(self.nested_vectors)
                builder.image(delimiters, ids, flags, Flags(), Flags(), image)
                continue
            if segment.codes is None:
                raise ValueError("LaVIT predicts codes, and an image has none: tokenize it first")
            ids, embed = processor.codes(segment.codes), embed and self.continuous
            builder.image(delimiters, ids, flags, flags, flags, segment if embed else None)
        return builder

    def total(self, losses: dict[str, LossSum]) -> Tensor:
        """One mean over both modalities, so that each predicted id has the same weight."""
        text, image, weight = losses["text"], losses["image"], self.image_weight
        count = (text.count + weight * image.count).clamp(min=1e-9)
        return (text.total + weight * image.total) / count


def precedes_text(segments: Sequence[S], number: int) -> bool:
    """Whether this is an image, and a text comes after it."""
    return segments[number].is_image and not all(s.is_image for s in segments[number + 1 :])

"""DaVinci (Diao et al., ICLR 2023): text and images from prefixes, three equal losses.

An image of 3 x 3 patches and "a red apple"; P is the prefix, v a patch's vector
(vision/patch_vectors.py), 0..8 a patch's code:

    "text": the image and k = 1 term -> the other terms
    id       <s> <img> v v v v v v v v v </img> a | <s> red apple </s>
    predict  P   P     P P P P P P P P P P      P | .   x   x     x

    "image": the upper r = 1 lines of patches and all terms -> codes of the lower lines
    id       <s> <img> v v v </img> a red apple | <img> 3 4 5 6 7 8
    predict  P   P     P P P P      P P   P     | .     x x x x x x

    "image", r = 0: all terms -> all codes
    id       <s> a red apple | <img> 0 1 2 3 4 5 6 7 8
    predict  P   P P   P     | .     x x x x x x x x x

    "image", nested codes: all terms -> the codes, as many as there are
    id       <s> a red apple | <img> 0 1 2 </img>
    predict  P   P P   P     | .     x x x x

    "plain": k = 2 terms -> the other terms
    id       <s> a red | <s> apple </s>
    predict  P   P P   | .   x     x

    a document of several texts: images and texts -> the last text, such as an answer
    id       <s> <img> v v v v v v v v v </img> what color | <s> red </s>
    predict  P   P     P P P P P P P P P P      P    P     | .   x   x

- The prefix attends to itself in both directions and never to the suffix, which attends to all of
  the prefix and causally to itself (sequences/masks.py); in an encoder-decoder, one is the
  encoder's input and the other the decoder's (models/encoder_decoder.py).
- A suffix begins with a token that is not predicted. In an image suffix, patch positions start
  anew, since the codes of the lower lines are those of an image that begins with them. An image is
  whole lines of patches and ends by their number. Nested codes have no lines, so that there is no
  image prefix, and </img> is predicted, since their number differs.
- k is drawn over whitespace-separated terms for each sequence, and r too: the paper draws one r for
  a batch, because its batches are rectangular; packed sequences may be of any lengths.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import isqrt
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lavit_lm.models.losses import LossSum, ModelOutput, cross_entropy, has_images
from lavit_lm.objectives.base import Objective
from lavit_lm.objectives.davinci.codes_below import LATER, with_codes_below
from lavit_lm.objectives.davinci.prefix_sequences import (
    PrefixSequences,
    codes_of,
    number_of_patches,
    text_only,
)
from lavit_lm.objectives.records import Connectors, ImageOutput, PromptTemplates
from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.sequences.segments import ImageSegment, Segment, SegmentLength, TextSegment
from lavit_lm.sequences.token_sequence import Role, SequenceBuilder, TokenSequence
from lavit_lm.vision.patch_vectors import PatchBridge
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok.nn.ranges import require_number


class Split(NamedTuple):
    """What of an example is prefix and what is suffix."""

    task: str
    """One of "text", "image", "plain" or "document"."""
    prefix: list[str]
    """Its terms."""
    suffix: list[str]
    """Its terms; none for "image", whose suffix is codes."""
    vectors: int
    """Of the image, in the prefix: those of whole lines of patches from the top, or all."""


@dataclass(frozen=True)
class DaVinci(Objective):
    """Prefix language modeling and prefix image modeling.

    Args:
        text_weight, image_weight, plain_weight: of the three losses, each a mean over its own
            targets; 1 as published.
        text_ratio, image_ratio, plain_ratio: how often a pair is laid out for each; texts alone are
            always "plain". The paper uses each pair for the first two, and as many texts for the
            third.
        image_prefix: draw r from 0 .. lines - 2 as in the paper; False generates whole images only
            (r = 0), which is the public code's default.
        prompt_drop: probability that an "image" sequence loses its text, which trains the
            unconditional sequence of guidance; the paper has no guidance (0).
        caption_length: terms of a caption that are used.
        caption_prefix, text_prefix: the largest k with an image, and without one.
        lower_case: lower-case all text.
        caption_prompt: first terms of every generated caption; not part of the output.
        answer_prompt: the text of a question, {} is the user's.
        train_encoder: train a copy of the visual tokenizer's encoder for the vectors; the paper
            trains its ResNet.
        nested_vectors: the codes are nested, and an image is read as so many vectors, each the mean
            over a square of patches. 64 of a tokenizer of 16 x 16 patches of 8 pixels have the
            stride of the paper's ResNet, 16. None: the codes are those of the patches in raster
            order, and each patch has a vector.
        restricted_softmax: see LaVIT.

    Raises:
        ValueError: a weight, a ratio or a number below 0, all ratios 0, no probability, or nested
            codes with an image prefix.
    """

    name: ClassVar[str] = "davinci"
    text_weight: float = 1.0
    image_weight: float = 1.0
    plain_weight: float = 1.0
    text_ratio: float = 1.0
    image_ratio: float = 1.0
    plain_ratio: float = 0.0
    image_prefix: bool = True
    prompt_drop: float = 0.1
    caption_length: int = 30
    caption_prefix: int = 30
    text_prefix: int = 96
    lower_case: bool = True
    caption_prompt: str = "a picture of"
    answer_prompt: str = "{}"
    train_encoder: bool = False
    nested_vectors: int | None = None
    restricted_softmax: bool = False

    def __post_init__(self) -> None:
        for field, value in self.to_dict().items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                require_number(field, value, 0, 1e6)
        if self.text_ratio + self.image_ratio + self.plain_ratio == 0:
            raise ValueError("expected a ratio above 0 for at least one of the three tasks")
        if not 0 <= self.prompt_drop <= 1:
            raise ValueError(f"prompt_drop: expected a probability, got {self.prompt_drop}")
        if self.nested and self.image_prefix:
            raise ValueError(
                "nested_vectors: expected image_prefix=False beside it, since nested codes have no "
                "lines"
            )

    @property
    def nested(self) -> bool:
        """Whether codes are nested."""
        return self.nested_vectors is not None

    @property
    def prompt_templates(self) -> PromptTemplates:
        return PromptTemplates(caption=self.caption_prompt, answer=self.answer_prompt)

    @property
    def connectors(self) -> Connectors:
        """Vectors of patches; codes of lower lines are computed on the batch's device."""
        bridge = partial(PatchBridge, train_encoder=self.train_encoder, vectors=self.nested_vectors)
        return Connectors(
            bridge,
            codes="not before text" if self.nested else "all",
            complete_batch=with_codes_below,
        )

    @property
    def image_output(self) -> ImageOutput:
        """A code for every patch; of nested codes any number."""
        return ImageOutput(min_length=1 if self.nested else None, emits_start=False)

    def layout(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        generator: torch.Generator,
        key: str = "",
    ) -> TokenSequence:
        """A sequence of an image, a text, or a pair; without a caption the prefix is empty.

        Of a document of several texts, the last text is the suffix, and all before it the prefix.
        The suffix is predicted, whatever the segments' `is_target`.

        Raises:
            ValueError: another example, or an image without a code for each of its patches.
        """
        sequences = self._sequences(processor)
        texts = [s.text for s in segments if isinstance(s, TextSegment)]
        images = [s for s in segments if isinstance(s, ImageSegment)]
        patches = [number_of_patches(image) for image in images]
        split = self._split(texts, patches, sequences, generator, key)
        if split.task == "document":
            if segments[-1].is_image:
                raise ValueError(f"example {key!r}: expected a text at the end, got an image")
            builder = sequences.prefix(sequences.read(segments[:-1], key))
            return sequences.append_text(builder, split.suffix).build(key)
        prefix: list[Segment] = [TextSegment(" ".join(split.prefix))]
        if split.task == "plain":
            return sequences.append_text(sequences.prefix(prefix), split.suffix).build(key)
        image = images[0]
        as_vectors = sequences.as_vectors(image, key, split.vectors)
        if split.vectors:
            prefix = [as_vectors, *prefix]
        builder = sequences.prefix(prefix)
        if split.task == "text":
            return sequences.append_text(builder, split.suffix).build(key)
        ids = processor.codes(codes_of(image))
        # Codes of lower lines are not those of the whole image: with_codes_below encodes these
        # lines on their own.
        ids = [LATER] * (len(ids) - split.vectors) if split.vectors else ids
        return sequences.append_image(builder, ids).build(key)

    def sequence_length(
        self,
        lengths: Sequence[SegmentLength],
        processor: MultimodalProcessor,
        generator: torch.Generator,
    ) -> int:
        """The two parts are tokenized apart: the token count of the whole caption does not help."""
        sequences = self._sequences(processor)
        texts = [s.text for s in lengths if s.text is not None]
        patches = [s.tokens for s in lengths if s.is_image]
        split, start = self._split(texts, patches, sequences, generator), len(sequences.start)
        if split.task == "document":
            images = sum((self.nested_vectors or n) + 2 for n in patches)
            words = sum(len(sequences.ids(sequences.split(text))) for text in texts)
            return start + images + words + start + 1
        image = split.vectors + 2 if split.vectors else 0
        prefix = start + image + len(sequences.ids(split.prefix))
        if split.task == "image":
            return prefix + 1 + patches[0] - split.vectors + self.nested
        return prefix + start + len(sequences.ids(split.suffix)) + 1

    def _split(
        self,
        texts: Sequence[str],
        patches: Sequence[int],
        sequences: PrefixSequences,
        generator: torch.Generator,
        key: str = "",
    ) -> Split:
        """Draw the task, k, r, and whether the text is dropped."""
        task, k, r, drop = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        if len(texts) > 1:
            return Split("document", [], sequences.split(texts[-1]), 0)
        if not (texts or patches) or len(patches) > 1:
            raise ValueError(
                f"example {key!r}: expected an image, a text, one of each, or a document of "
                f"several texts, got {len(patches)} images and {len(texts)} texts"
            )
        ratios = [self.text_ratio, self.image_ratio, self.plain_ratio]
        if not (patches and texts):
            ratios = [0, len(patches), len(texts)]
        ends = list(accumulate(ratios))
        chosen = ("text", "image", "plain")[bisect(ends[:-1], task * ends[-1])]
        terms = sequences.split(texts[0]) if texts else []
        terms = terms[: self.caption_length] if patches else terms
        if chosen == "image":
            lines = isqrt(patches[0])
            above = int(r * (lines - 1)) * lines if self.image_prefix else 0
            return Split("image", terms if drop >= self.prompt_drop else [], [], above)
        k = min(int(k * len(terms)), self.caption_prefix if chosen == "text" else self.text_prefix)
        whole = (self.nested_vectors or patches[0]) if chosen == "text" else 0
        return Split(chosen, terms[:k], terms[k:], whole)

    def prompt(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        output: Literal["text", "image"],
    ) -> TokenSequence:
        """All of the prompt is prefix, except the terms with which captions begin."""
        if output == "text":
            return self._text_prompt(segments, processor).build()
        sequences = self._sequences(processor)
        return sequences.append_image(sequences.prefix(text_only(segments)), []).build()

    def scoring_sequence(
        self, context: Sequence[Segment], answer: Segment, processor: MultimodalProcessor
    ) -> TokenSequence:
        """The answer as a suffix, a text with </s>, as the paper ranks answers to questions."""
        sequences = self._sequences(processor)
        if isinstance(answer, ImageSegment):
            builder = sequences.prefix(text_only(context))
            return sequences.append_image(builder, processor.codes(codes_of(answer))).build()
        builder = self._text_prompt(context, processor)
        return sequences.append_terms(builder, sequences.split(answer.text)).build()

    def _text_prompt(
        self, segments: Sequence[Segment], processor: MultimodalProcessor
    ) -> SequenceBuilder:
        """Prefix and start of a text, for an image with the terms with which its captions begin."""
        sequences, opening = self._sequences(processor), TextSegment(self.caption_prompt)
        is_caption = bool(opening.text) and list(segments[-1:]) == [opening]
        segments = sequences.read(segments)
        builder = sequences.prefix(segments[:-1] if is_caption else segments).text(sequences.start)
        return builder.text(sequences.ids(sequences.split(opening.text))) if is_caption else builder

    def _sequences(self, processor: MultimodalProcessor) -> PrefixSequences:
        if bool(processor.vocabulary.stages) != self.nested:
            raise ValueError(
                f"davinci: nested_vectors is {self.nested_vectors}, and the vocabulary's codes are "
                f"{'not ' if self.nested else ''}nested: set it for nested codes only, for example "
                "nested_vectors=64 with image_prefix=False"
            )
        return PrefixSequences(processor, self.lower_case, self.nested_vectors)

    def losses(self, output: ModelOutput, batch: PackedBatch) -> dict[str, LossSum]:
        """Sums of "text" (text beside an image), "image" (codes) and "plain" (text alone)."""
        plain = batch.predict & (batch.roles == Role.TEXT) & ~has_images(batch)
        sums = cross_entropy(output, replace(batch, predict=batch.predict & ~plain))
        return {**sums, "plain": cross_entropy(output, replace(batch, predict=plain))["text"]}

    def total(self, losses: dict[str, LossSum]) -> Tensor:
        """The weighted sum of three means."""
        weights = {"text": self.text_weight, "image": self.image_weight, "plain": self.plain_weight}
        return torch.stack([weight * losses[name].mean for name, weight in weights.items()]).sum()

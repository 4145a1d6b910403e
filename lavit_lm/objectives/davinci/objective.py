"""DaVinci (Diao et al., ICLR 2023): write and paint from prefixes, three losses of equal weight.

A picture of 3 x 3 patches and "a red apple"; P is the prefix, v a patch's vector (grid.py), 0..8 a patch's code:

    "text": the picture and k = 1 word                      id    <s> [IMG v v v v v v v v v IMG] a | <s> red apple </s>
    -> the other words                                      pred   P   P   P P P P P P P P P  P   P |  .   x    x    x

    "image": the upper r = 1 rows and all words             id    <s> [IMG v v v IMG] a red apple | [IMG 3 4 5 6 7 8
    -> codes of the rows below, encoded by themselves       pred   P   P   P P P  P   P  P    P   |   .  x x x x x x

    "image", r = 0: words                                   id    <s> a red apple | [IMG 0 1 2 3 4 5 6 7 8
    -> all codes                                            pred   P  P  P    P   |   .  x x x x x x x x x

    "plain": k = 2 words                                    id    <s> a red | <s> apple </s>
    -> the other words                                      pred   P  P  P  |  .    x     x

- The prefix sees itself in both directions and never the suffix, which sees all of the prefix and itself causally
  (masks.py); an encoder-decoder reads one with its encoder and says the other with its decoder (prefix_seq2seq.py).
- A suffix begins with a token that is not predicted; there positions in the picture start anew, since the codes of the
  lower rows come from a picture that begins with them. A picture is whole rows of codes and ends by their number.
- k is drawn over words for each row, and r too: the paper draws one r for a batch, whose rows are one rectangle there;
  packed rows may be of any lengths.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import isqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lavit_lm.models.losses import ModelOutput, Sum, cross_entropy, has_images
from lavit_lm.objectives.base import Objective, ObjectiveModules, PromptTemplates
from lavit_lm.objectives.davinci.patch_bridge import LATER, PatchBridge, with_codes_below
from lavit_lm.objectives.davinci.prefix_sequences import (
    PrefixSequences,
    codes_of,
    whole,
    words_alone,
)
from lavit_lm.sequences.packing import Packed
from lavit_lm.sequences.segments import (
    ImageSegment,
    Role,
    Segment,
    SequenceBuilder,
    TextSegment,
    TokenSequence,
)
from lavit_lm.vocabulary.processor import MultimodalProcessor


@dataclass(frozen=True)
class DaVinci(Objective):
    """Prefix language modelling and prefix image modelling.

    Args:
        text_weight, image_weight, plain_weight: of the three losses, each a mean over its own targets; 1 as published.
        text_ratio, image_ratio, plain_ratio: how often a pair is laid out for each; plain texts are always "plain".
            The paper uses each pair for the first two, and as many texts for the third.
        image_prefix: draw r from 0 .. rows - 2 as the paper has it; False paints whole pictures only (r = 0), which is
            the public code's default.
        prompt_drop: probability that the words of an "image" row are left out, so that guidance has an unconditional
            stream; the paper knows no guidance (0).
        caption_words: of a caption, later ones are cut off.
        caption_prefix, text_prefix: the largest k beside a picture, and without one.
        lower_case: read and say lower-cased words only.
        caption_prompt: what a caption begins with, as the suffix's first words; it is not part of what is said.
        train_encoder: train a copy of the visual tokenizer's encoder for the vectors; the paper trains its ResNet.

    Raises:
        ValueError: a weight, a share or a number below 0, no share at all, or no probability.
    """

    name: ClassVar[str] = "davinci"
    emits_image_start: ClassVar[bool] = False
    text_weight: float = 1.0
    image_weight: float = 1.0
    plain_weight: float = 1.0
    text_ratio: float = 1.0
    image_ratio: float = 1.0
    plain_ratio: float = 0.0
    image_prefix: bool = True
    prompt_drop: float = 0.1
    caption_words: int = 30
    caption_prefix: int = 30
    text_prefix: int = 96
    lower_case: bool = True
    caption_prompt: str = "a picture of"
    train_encoder: bool = False

    def __post_init__(self) -> None:
        for setting, value in self.settings().items():
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{setting}: expected 0 or more, got {value}")
        if self.text_ratio + self.image_ratio + self.plain_ratio == 0:
            raise ValueError(
                "expected a share above 0 of at least one of the three tasks: no pair would be laid out"
            )
        if not 0 <= self.prompt_drop <= 1:
            raise ValueError(f"prompt_drop: expected a probability, got {self.prompt_drop}")

    @property
    def needs_pixels(self) -> bool:
        return True

    @property
    def prompt_templates(self) -> PromptTemplates:  # type: ignore[override]
        return PromptTemplates(caption=self.caption_prompt, answer="{}")

    def lengths(self, patches: int) -> tuple[int, int]:
        """A code for every patch."""
        return patches, patches

    def parts(self, visual: Any, width: int) -> ObjectiveModules:
        """A vector for each patch."""
        return ObjectiveModules(PatchBridge(visual, width, self.train_encoder))

    # Rows

    def layout(
        self,
        sample: Sequence[Segment],
        processor: MultimodalProcessor,
        generator: torch.Generator,
        key: str = "",
    ) -> TokenSequence:
        """One row of a picture, a text, or a pair; a picture without a caption is painted from nothing.

        What is predicted is the suffix: the segments' `learn` is not asked.

        Raises:
            ValueError: another sample, or a picture without a code for each of its patches.
        """
        task, k, r, drop = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        images = [segment for segment in sample if isinstance(segment, ImageSegment)]
        texts = [segment for segment in sample if isinstance(segment, TextSegment)]
        if not sample or len(images) > 1 or len(texts) > 1:
            raise ValueError(
                f"sample {key!r}: expected a picture, a text, or one of each, got {len(sample)} segments"
            )
        shares = (
            [self.text_ratio, self.image_ratio, self.plain_ratio]
            if images and texts
            else [0, len(images), len(texts)]
        )
        ends = list(accumulate(shares))
        chosen = ("text", "image", "plain")[bisect(ends[:-1], task * ends[-1])]
        rows = self._rows(processor)
        words = rows.words(texts[0]) if texts else []
        words = words[: self.caption_words] if images else words
        if chosen == "image":
            image = whole(images[0], key)
            codes = codes_of(image)
            side = isqrt(len(codes))
            above = int(r * (side - 1)) * side if self.image_prefix else 0
            upper = (
                [replace(image, codes=None, keep=torch.arange(len(codes)) < above)] if above else []
            )
            row = rows.read(
                [*upper, TextSegment(" ".join(words if drop >= self.prompt_drop else []))]
            )
            return rows.paint(
                row, [LATER] * (len(codes) - above) if above else processor.codes(codes)
            ).row(key)
        k = min(int(k * len(words)), self.caption_prefix if chosen == "text" else self.text_prefix)
        shown = [whole(images[0], key)] if chosen == "text" else []
        row = rows.read([*shown, TextSegment(" ".join(words[:k]))]).text(rows.start)
        return rows.append_ids(row, words[k:]).row(key)

    def prompt(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        opens: Literal["text", "image"],
    ) -> TokenSequence:
        """All of the prompt is prefix, but for the words that captions begin with."""
        if opens == "text":
            return self._opened(segments, processor).row()
        rows = self._rows(processor)
        return rows.paint(rows.read(words_alone(segments)), []).row()

    def scoring_sequence(
        self, context: Sequence[Segment], answer: Segment, processor: MultimodalProcessor
    ) -> TokenSequence:
        """The answer after the start of a suffix, a text with its end: the paper ranks answers to questions so."""
        rows = self._rows(processor)
        if isinstance(answer, ImageSegment):
            return rows.paint(
                rows.read(words_alone(context)), processor.codes(codes_of(answer))
            ).row()
        return rows.append_ids(self._opened(context, processor), rows.words(answer)).row()

    def _opened(
        self, segments: Sequence[Segment], processor: MultimodalProcessor
    ) -> SequenceBuilder:
        """Prefix and start of a text, for a picture with the words that its captions begin with."""
        rows = self._rows(processor)
        given = [
            whole(segment) if isinstance(segment, ImageSegment) else segment for segment in segments
        ]
        opening = TextSegment(self.caption_prompt)
        begun = bool(opening.text) and given[-1:] == [opening]
        row = rows.read(given[:-1] if begun else given).text(rows.start)
        return row.text(rows.ids(rows.words(opening))) if begun else row

    def _rows(self, processor: MultimodalProcessor) -> PrefixSequences:
        return PrefixSequences(processor, self.lower_case)

    def on_device(self, batch: Packed, visual: Any, processor: MultimodalProcessor) -> Packed:
        """With the codes of lower rows, encoded together and on the batch's device."""
        return with_codes_below(batch, visual, processor)

    # Losses

    def losses(self, seen: ModelOutput, batch: Packed) -> dict[str, Sum]:
        """{"text", "image", "plain"}: words of a row with a picture, codes, words of a row without one."""
        plain = batch.predict & (batch.roles == Role.TEXT) & ~has_images(batch)
        sums = cross_entropy(seen, replace(batch, predict=batch.predict & ~plain))
        return {**sums, "plain": cross_entropy(seen, replace(batch, predict=plain))["text"]}

    def total(self, losses: dict[str, Sum]) -> Tensor:
        """The weighted sum of three means."""
        weights = {"text": self.text_weight, "image": self.image_weight, "plain": self.plain_weight}
        return torch.stack([weight * losses[name].mean for name, weight in weights.items()]).sum()

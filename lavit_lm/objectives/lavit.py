"""LaVIT: an image is text in a foreign language; the next id is predicted everywhere (ICLR 2024, section 3.2).

    image -> text    <s> <|img| 7   3   9   |img> a   cat </s>      codes, or continuous vectors (v) in their places
    predicted        .   x      x   x   x   x     x   x   x
    text -> image    <s> a   cat <|img| 7   3   9   |img> </s>      always codes
    predicted        .   x   x   x      x   x   x   x     x
    prompt dropped   <s> <|img| 7   3   9   |img> </s>              learns the unconditional stream of guidance

Who sees whom: causal within a document. Loss: cross-entropy over both modalities, one mean, one head. A pair is laid
out in both orders, each as often as the other; a document of more segments keeps its order. The release feeds vectors
where an image stands before text; its targets are codes all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lavit_lm.lexicon import Lexicon
from lavit_lm.objectives.losses import Sum, cross_entropy
from lavit_lm.packing import Packed
from lavit_lm.segments import Image, Role, Row, RowBuilder, Segment, Text


@dataclass(frozen=True)
class LaVIT:
    """Next-token prediction over text and codes.

    Args:
        order: of pairs: "both" draws one of the two for each row, "image_first" (captioning only), "text_first"
            (generation only), or "given".
        prompt_drop: probability that a text-first pair loses its text, so that guidance has an unconditional stream.
            The paper does not publish its value.
        image_weight: weight of a code's cross-entropy against a text token's; 1 as published.

    Raises:
        ValueError: a probability outside 0..1, or a weight below 0.
    """

    order: Literal["both", "image_first", "text_first", "given"] = "both"
    prompt_drop: float = 0.1
    image_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_drop <= 1:
            raise ValueError(f"prompt_drop: expected a probability, got {self.prompt_drop}")
        if self.image_weight < 0:
            raise ValueError(f"image_weight: expected 0 or more, got {self.image_weight}")

    def layout(self, sample: Sequence[Segment], lexicon: Lexicon, generator: torch.Generator, key: str = "") -> Row:
        """One row of a sample; every draw is made whatever the sample is, so rows do not change their neighbours'."""
        flip, drop = torch.rand(2, generator=generator).tolist()
        segments = list(sample)
        if not segments:
            raise ValueError(f"sample {key!r} has no segments: nothing could be learnt from it")
        if self.order != "given" and sorted(type(s).__name__ for s in segments) == ["Image", "Text"]:
            image_first = self.order == "image_first" or (self.order == "both" and flip < 0.5)
            segments.sort(key=lambda s: isinstance(s, Image) != image_first)
            if isinstance(segments[0], Text) and drop < self.prompt_drop:
                segments = segments[1:]
        vocabulary, builder = lexicon.vocabulary, RowBuilder()
        builder.add(lexicon.start, Role.TEXT)
        for number, segment in enumerate(segments):
            if isinstance(segment, Text):
                builder.add(lexicon.text(segment.text), Role.TEXT, predict=segment.learn)
                continue
            text_follows = any(isinstance(s, Text) for s in segments[number + 1 :])
            builder.add([vocabulary.begin], Role.BEGIN, predict=segment.learn)
            feed = segment if text_follows and segment.picture is not None else None
            builder.add(lexicon.codes(segment.codes), Role.VISUAL, predict=segment.learn, feed=feed)
            builder.add([vocabulary.end], Role.END, predict=segment.learn)
        builder.add([lexicon.stop], Role.TEXT, predict=segments[-1].learn)
        return builder.row(key)

    def losses(self, states: Tensor, head: Callable[[Tensor], Tensor], batch: Packed) -> dict[str, Sum]:
        """{"text": ..., "image": ...}, sums of nats."""
        return cross_entropy(states, head, batch)

    def total(self, losses: dict[str, Sum]) -> Tensor:
        """The loss to descend: one mean over both modalities, so that each predicted id weighs the same."""
        text, image, weight = losses["text"], losses["image"], self.image_weight
        return (text.total + weight * image.total) / (text.count + weight * image.count).clamp(min=1e-9)

"""Rows of a prefix and what is said after it: how DaVinci's are written, without what is drawn for them.

[picture, "a red"]  ->  <s> [IMG v v v v IMG] a red      all seen by all, nothing predicted
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int64
from torch import Tensor

from lavit_lm.objectives.base import require_pixels
from lavit_lm.sequences.segments import (
    Flags,
    ImageSegment,
    Role,
    Segment,
    SequenceBuilder,
    TextSegment,
)
from lavit_lm.vocabulary.processor import MultimodalProcessor


@dataclass(frozen=True)
class PrefixSequences:
    """Writes rows.

    Args:
        lexicon: text tokenizer and visual vocabulary.
        lower_case: whether words are lower-cased.
    """

    processor: MultimodalProcessor
    lower_case: bool

    @property
    def start(self) -> list[int]:
        """What a prefix and a text begin with."""
        return self.processor.start or [self.processor.stop]

    def words(self, text: TextSegment) -> list[str]:
        return (text.text.lower() if self.lower_case else text.text).split()

    def ids(self, words: Sequence[str]) -> list[int]:
        return self.processor.text(" ".join(words))

    def read(self, segments: Sequence[Segment]) -> SequenceBuilder:
        """The prefix; it begins with a token, so that none is empty."""
        processor, seen = self.processor, Flags(prefix=True)
        edges = processor.vocabulary.begin, processor.vocabulary.end
        builder = SequenceBuilder().text(self.start, **seen)
        for segment in segments:
            if isinstance(segment, TextSegment):
                builder.text(self.ids(self.words(segment)), **seen)
            else:
                assert segment.keep is not None
                is_embedding = replace(segment, codes=None)
                builder.image(
                    edges, [processor.pad] * int(segment.keep.sum()), seen, seen, seen, is_embedding
                )
        return builder

    def append_ids(self, row: SequenceBuilder, words: Sequence[str]) -> SequenceBuilder:
        """Words said after the prefix and a start, to the end."""
        return row.text([*self.ids(words), self.processor.stop], predict=True)

    def paint(self, row: SequenceBuilder, ids: Sequence[int]) -> SequenceBuilder:
        """Codes said after the prefix and the opening of a picture."""
        return row.add([self.processor.vocabulary.begin], Role.BEGIN).add(
            ids, Role.VISUAL, predict=True
        )


def words_alone(segments: Sequence[Segment]) -> Sequence[Segment]:
    """The segments, if none is a picture. Raises ValueError."""
    if any(isinstance(segment, ImageSegment) for segment in segments):
        raise ValueError(
            "davinci paints from words alone, and a picture is in what comes before: give words"
        )
    return segments


def codes_of(image: ImageSegment) -> Int64[Tensor, " n"]:
    """Raises ValueError for an image without codes."""
    if image.codes is None:
        raise ValueError("davinci paints codes, and an image has none: tokenize it first")
    return image.codes


def whole(image: ImageSegment, key: str = "") -> ImageSegment:
    """The image, if there is a code for each of its patches. Raises ValueError."""
    require_pixels(image, "davinci", key)
    if image.keep is None or not bool(image.keep.all()):
        got = (
            "no mask of patches"
            if image.keep is None
            else f"{int(image.keep.sum())} of {len(image.keep)}"
        )
        patches = "PATCHES" if image.keep is None else len(image.keep)
        raise ValueError(
            f"davinci reads and paints every patch of a picture, sample {key!r} has codes of {got}: make the shards "
            f"with `lavit-tok shards --budget {patches}`"
        )
    return image

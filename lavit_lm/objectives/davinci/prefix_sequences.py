"""The sequences of DaVinci, a prefix and a suffix, once it is decided what goes into each.

[image, "a red"]  ->  <s> <img> v v v v </img> a red      attended to in both directions, no targets
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int64
from torch import Tensor

from lavit_lm.objectives.base import require_pixels
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_lm.sequences.token_sequence import Flags, Role, SequenceBuilder
from lavit_lm.vocabulary.processor import MultimodalProcessor


@dataclass(frozen=True)
class PrefixSequences:
    """Builds sequences.

    Args:
        processor: text tokenizer and visual vocabulary.
        lower_case: lower-case all text.
        nested_vectors: codes are nested, and each image has so many vectors; see DaVinci.
    """

    processor: MultimodalProcessor
    lower_case: bool
    nested_vectors: int | None = None

    @property
    def start(self) -> list[int]:
        """The first ids of a prefix and of a text suffix."""
        return self.processor.start or [self.processor.stop]

    def split(self, text: str) -> list[str]:
        """The whitespace-separated terms of a text."""
        return (text.lower() if self.lower_case else text).split()

    def ids(self, terms: Sequence[str]) -> list[int]:
        """Ids of terms."""
        return self.processor.text(" ".join(terms))

    def as_vectors(
        self, image: ImageSegment, key: str = "", count: int | None = None
    ) -> ImageSegment:
        """The image without codes, its first `count` vectors kept, by default all.

        Raises:
            ValueError: an image without pixels, or without a code for each of its patches unless
                codes are nested.
        """
        if self.nested_vectors is None:
            vectors = require_all_patches(image, key)
        else:
            require_pixels(image, "davinci", key)
            vectors = self.nested_vectors
        return image.as_vectors(vectors, count)

    def read(self, segments: Sequence[Segment], key: str = "") -> list[Segment]:
        """The segments with images as all their vectors. Raises as as_vectors."""
        return [self.as_vectors(s, key) if isinstance(s, ImageSegment) else s for s in segments]

    def prefix(self, segments: Sequence[Segment]) -> SequenceBuilder:
        """The prefix; it begins with the start ids, so that none is empty."""
        processor, flags = self.processor, Flags(prefix=True)
        delimiters = processor.vocabulary.begin, processor.vocabulary.end
        builder = SequenceBuilder().text(self.start, **flags)
        for segment in segments:
            if isinstance(segment, TextSegment):
                builder.text(self.ids(self.split(segment.text)), **flags)
                continue
            assert segment.keep is not None
            ids, embed = [processor.pad] * int(segment.keep.sum()), replace(segment, codes=None)
            builder.image(delimiters, ids, flags, flags, flags, embed)
        return builder

    def append_text(self, builder: SequenceBuilder, terms: Sequence[str]) -> SequenceBuilder:
        """Start, terms and </s> as the suffix."""
        return self.append_terms(builder.text(self.start), terms)

    def append_terms(self, builder: SequenceBuilder, terms: Sequence[str]) -> SequenceBuilder:
        """Terms and </s>, predicted."""
        return builder.text([*self.ids(terms), self.processor.stop], predict=True)

    def append_image(self, builder: SequenceBuilder, ids: Sequence[int]) -> SequenceBuilder:
        """<img> and predicted code ids as the suffix; of nested codes </img> too."""
        builder.add([self.processor.vocabulary.begin], Role.BEGIN)
        builder.add(ids, Role.VISUAL, predict=True)
        if self.nested_vectors is None or not ids:
            return builder
        return builder.add([self.processor.vocabulary.end], Role.END, predict=True)


def text_only(segments: Sequence[Segment]) -> Sequence[Segment]:
    """The segments, if none is an image. Raises ValueError."""
    if any(segment.is_image for segment in segments):
        raise ValueError(
            "davinci generates images from text only, and the prompt contains an image"
        )
    return segments


def codes_of(image: ImageSegment) -> Int64[Tensor, " n"]:
    """Raises ValueError for an image without codes."""
    if image.codes is None:
        raise ValueError("davinci predicts codes, and an image has none: tokenize it first")
    return image.codes


def number_of_patches(image: ImageSegment) -> int:
    """Of an image with a code for each patch."""
    return len(codes_of(image)) if image.keep is None else len(image.keep)


def require_all_patches(image: ImageSegment, key: str = "") -> int:
    """The number of patches of an image with pixels and a code per patch. Raises ValueError."""
    require_pixels(image, "davinci", key)
    if image.keep is None or not bool(image.keep.all()):
        patches = "PATCHES" if image.keep is None else len(image.keep)
        got = "unknown" if image.keep is None else f"{int(image.keep.sum())} of {patches} patches"
        raise ValueError(
            f"davinci needs a code for every patch of an image, example {key!r} has codes of "
            f"{got}: "
            f"create the shards with `lavit-tok shards --budget {patches}`"
        )
    return len(image.keep)

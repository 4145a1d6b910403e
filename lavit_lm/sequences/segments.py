"""An example before it becomes a sequence: text and image segments, and their lengths alone.

[TextSegment("a cat"), ImageSegment(codes 7 3 9)]  -Objective.layout->  TokenSequence
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True)
class TextSegment:
    """Text of an example.

    Args:
        text: any string; it is never encoded as image ids, whatever it contains.
        is_target: whether the model is trained to generate it; False for a question or an
            instruction.
    """

    is_image: ClassVar[bool] = False
    text: str
    is_target: bool = True


@dataclass(frozen=True)
class ImageSegment:
    """An image of an example: its codes, its pixels (for a bridge), or both.

    Args:
        codes: int64 [n], n >= 1, of one image; None for an objective that uses vectors only.
        image: uint8 [3 h w], or a function that opens it, which is called only when the vectors are
            needed; None embeds the codes. For objectives/vector_codes.py float [n d], the vectors
            that another model generated for the image.
        keep: bool [patches], the patches that the bridge turns into vectors; the kept patches of
            the codes, if there are codes.
        is_target: whether the model is trained to generate it.

    Raises:
        ValueError: neither codes nor pixels, no codes at all, or pixels without the keep mask of
            the codes.
    """

    is_image: ClassVar[bool] = True
    codes: Int64[Tensor, " n"] | None = None
    image: (
        UInt8[Tensor, "3 h w"] | Float[Tensor, "n d"] | Callable[[], UInt8[Tensor, "3 h w"]] | None
    ) = None
    keep: Bool[Tensor, " patches"] | None = None
    is_target: bool = True

    def __post_init__(self) -> None:
        if self.codes is None:
            if self.image is None:
                raise ValueError("an image segment needs codes or pixels, got neither")
            return
        if self.codes.ndim != 1 or len(self.codes) == 0:
            raise ValueError(
                f"an image needs at least one code, got codes of shape {list(self.codes.shape)}"
            )
        kept = None if self.keep is None else int(self.keep.sum())
        if self.image is not None and kept != len(self.codes):
            raise ValueError(
                f"pixels of an image with {len(self.codes)} codes need a mask that keeps as many "
                f"patches, got {kept}"
            )

    def as_vectors(self, vectors: int, kept: int | None = None) -> ImageSegment:
        """The image without codes, with so many vectors, of which the first `kept` are used."""
        keep = torch.arange(vectors) < (vectors if kept is None else kept)
        return replace(self, codes=None, keep=keep)


Segment = TextSegment | ImageSegment


@dataclass(frozen=True)
class SegmentLength:
    """How long a segment is, known without reading its codes or opening its image.

    Args:
        tokens: text tokens, or codes (0 for an image without codes).
        text: the text; None for an image.
        is_target: see the segments.
    """

    tokens: int
    text: str | None = None
    is_target: bool = True

    @property
    def is_image(self) -> bool:
        """Whether this is an image."""
        return self.text is None

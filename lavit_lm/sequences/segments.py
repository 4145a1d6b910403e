"""A sample is a list of Text and Image segments; a Row is the same sample, position by position.

    [Text("a cat"), Image(codes 7 3 9)]  ->

    place      0     1     2     3      4     5     6     7      8
    id         <s>   a     cat   <|img| 7     3     9     |img>  </s>
    role       TEXT  TEXT  TEXT  BEGIN  CODE  CODE  CODE  END    TEXT
    predict    .     x     x     x      x     x     x     x      x

An objective (objectives/) says which places are predicted, which are given as vectors, and which are seen by all of the
row; nothing here knows a model. What stands at place i is what the model must say at place i - 1: the one shift in this
package is in objectives/losses.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TypedDict, Unpack

import torch
from jaxtyping import Bool, Int8, Int64, UInt8
from torch import Tensor


class Role(IntEnum):
    """What stands at a place."""

    TEXT = 0
    """A text token, the row's first and last among them."""
    BEGIN = 1
    """The id that opens an image."""
    VISUAL = 2
    """A code, or a continuous vector in the place of one."""
    END = 3
    """The id that closes an image."""


@dataclass(frozen=True)
class TextSegment:
    """Words of a sample.

    Args:
        text: any string; it can never become an image id, whatever it says.
        learn: whether the model is trained to say it; False for a question or an instruction.
    """

    text: str
    is_target: bool = True


@dataclass(frozen=True)
class ImageSegment:
    """A picture of a sample: its codes, the picture itself where a model is fed vectors made from it, or both.

    Args:
        codes: int64 [n], n >= 1, of one image; None for an objective that knows vectors only.
        picture: uint8 [3 h w], from which a bridge (bridge.py, resampler.py) makes vectors, or a function that opens
            it, called only once the vectors are needed; None feeds the codes.
        keep: bool [patches], the patches that the bridge makes vectors of; those behind the codes, if there are codes.
        learn: whether the model is trained to say it.

    Raises:
        ValueError: neither codes nor a picture, no codes at all, or a picture without the mask that tells which patches
            its codes stand for.
    """

    codes: Int64[Tensor, " n"] | None = None
    image: UInt8[Tensor, "3 h w"] | Callable[[], UInt8[Tensor, "3 h w"]] | None = None
    keep: Bool[Tensor, " patches"] | None = None
    is_target: bool = True

    def __post_init__(self) -> None:
        if self.codes is None:
            if self.image is None:
                raise ValueError(
                    "an image needs codes, or a picture to make vectors of, got neither"
                )
            return
        if self.codes.ndim != 1 or len(self.codes) == 0:
            raise ValueError(
                f"an image needs at least one code, got codes of shape {list(self.codes.shape)}"
            )
        if self.image is not None and (
            self.keep is None or int(self.keep.sum()) != len(self.codes)
        ):
            keep = "none" if self.keep is None else int(self.keep.sum())
            raise ValueError(
                f"a picture of {len(self.codes)} codes needs a mask of as many patches, got {keep}"
            )


Segment = TextSegment | ImageSegment


class Flags(TypedDict, total=False):
    """Of some places; see Row."""

    predict: bool
    regress: bool
    prefix: bool


@dataclass(frozen=True)
class TokenSequence:
    """One sample as places of a sequence; every tensor has one entry for each place.

    Args:
        ids: int64 [n], what stands there; where a vector is fed, the id is still what would be predicted.
        roles: int8 [n], see Role.
        predict: bool [n], True where the id is a target of cross-entropy (read at the place before).
        regress: bool [n], True where what is fed, a vector or the id's embedding, is a target of regression (read
            at the place before).
        prefix: bool [n], True where the place is seen by the whole row, also by places before it.
        fed: bool [n], True where a vector is fed instead of the id's embedding.
        images: those the vectors are made from, in order; the bridge makes as many vectors as there are fed places.
        key: name of the sample, for messages.
    """

    ids: Int64[Tensor, " n"]
    roles: Int8[Tensor, " n"]
    predict: Bool[Tensor, " n"]
    regress: Bool[Tensor, " n"]
    prefix: Bool[Tensor, " n"]
    is_embedding: Bool[Tensor, " n"]
    image_segments: tuple[ImageSegment, ...] = ()
    key: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def images(self) -> UInt8[Tensor, "k 3 h w"]:
        """uint8 [k 3 h w] of the images, opened now; k is 0 if there are none."""
        opened = [
            image.image() if callable(image.image) else image.image for image in self.image_segments
        ]
        found = [image for image in opened if image is not None]
        return torch.stack(found) if found else torch.zeros(0, 3, 0, 0, dtype=torch.uint8)

    @property
    def keep(self) -> Bool[Tensor, "k patches"]:
        """bool [k patches], the patches of the images that get a vector; k is 0 where the bridge asks for none."""
        masks = [image.keep for image in self.image_segments if image.keep is not None]
        return torch.stack(masks) if masks else torch.zeros(0, 0, dtype=torch.bool)


@dataclass
class SequenceBuilder:
    """Collects places one after another; `row` closes it."""

    ids: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    flags: list[tuple[bool, bool, bool, bool]] = field(default_factory=list)
    is_embedding: list[ImageSegment] = field(default_factory=list)

    def add(
        self,
        ids: Sequence[int],
        role: Role,
        *,
        predict: bool = False,
        regress: bool = False,
        prefix: bool = False,
        feed: ImageSegment | None = None,
    ) -> SequenceBuilder:
        """Append places of one role; `feed` is an image with a picture, whose vectors stand there. Returns itself."""
        self.ids += ids
        self.roles += [int(role)] * len(ids)
        self.flags += [(predict, regress, prefix, feed is not None)] * len(ids)
        if feed is not None:
            self.is_embedding.append(feed)
        return self

    def text(self, ids: Sequence[int], **flags: Unpack[Flags]) -> SequenceBuilder:
        """Append text ids."""
        return self.add(ids, Role.TEXT, **flags)

    def image(
        self,
        edges: tuple[int, int],
        ids: Sequence[int],
        begin: Flags,
        visual: Flags,
        end: Flags,
        feed: ImageSegment | None = None,
    ) -> SequenceBuilder:
        """Append an image between its edges, each of the three parts with flags of its own, as `add` takes them.

        Args:
            edges: the ids that open and close it.
            ids: what stands between them; for vectors without codes as many ids that nobody reads.
            feed: an image with a picture, whose vectors stand there.
        """
        self.add(edges[:1], Role.BEGIN, **begin)
        self.add(ids, Role.VISUAL, **visual, feed=feed)
        return self.add(edges[1:], Role.END, **end)

    def row(self, key: str = "") -> TokenSequence:
        flags = torch.tensor(self.flags, dtype=torch.bool).reshape(-1, 4)
        flags[:1, :2] = False  # nothing stands before the first place to predict it from
        return TokenSequence(
            torch.tensor(self.ids, dtype=torch.int64),
            torch.tensor(self.roles, dtype=torch.int8),
            *(flags[:, 0], flags[:, 1], flags[:, 2], flags[:, 3]),
            tuple(self.is_embedding),
            key,
        )

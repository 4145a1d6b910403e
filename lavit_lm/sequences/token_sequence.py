"""TokenSequence: one example position by position, and the builder that objectives write it with.

    [TextSegment("a cat"), ImageSegment(codes 7 3 9)]  ->

    position  0     1     2     3      4       5       6       7       8
    id        <s>   a     cat   <img>  7       3       9       </img>  </s>
    role      TEXT  TEXT  TEXT  BEGIN  VISUAL  VISUAL  VISUAL  END     TEXT
    predict   .     x     x     x      x       x       x       x       x

An objective (objectives/) decides which positions are predicted, which are given as vectors, and
which attend in both directions. The id at position i is predicted from the hidden state at position
i - 1: the one shift of this package is in models/losses.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8, Int64, UInt8
from torch import Tensor

from lavit_lm.sequences.segments import ImageSegment


class Role(IntEnum):
    """What a position holds."""

    TEXT = 0
    """A text token; also the first and the last token of a sequence."""
    BEGIN = 1
    """The id that begins an image."""
    VISUAL = 2
    """A code of an image, or a continuous vector."""
    END = 3
    """The id that ends an image."""


class Flags(TypedDict, total=False):
    """Flags of several positions; see TokenSequence."""

    predict: bool
    regress: bool
    prefix: bool


@dataclass(frozen=True)
class TokenSequence:
    """One example as a sequence; every tensor has one entry for each position.

    Args:
        ids: int64 [n]; at a position whose input is a vector, the id is still the cross-entropy
            target.
        roles: int8 [n], see Role.
        predict: bool [n], True where the id is a cross-entropy target (of the position before).
        regress: bool [n], True where the input embedding is a regression target (of the position
            before).
        prefix: bool [n], True where the position is attended to by the whole prefix, also from
            positions before it.
        is_embedding: bool [n], True where the input is a vector of the bridge instead of the id's
            embedding.
        image_segments: the images that the vectors are computed from, in order; the bridge returns
            as many vectors as is_embedding has positions.
        key: name of the example, for messages.
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
    def images(self) -> UInt8[Tensor, "k 3 h w"] | Float[Tensor, "k n d"]:
        """Pixels of image_segments, opened now, or their vectors; k is 0 if there are none."""
        opened = [s.image() if callable(s.image) else s.image for s in self.image_segments]
        pixels = [image for image in opened if image is not None]
        return torch.stack(pixels) if pixels else torch.zeros(0, 3, 0, 0, dtype=torch.uint8)

    @property
    def keep(self) -> Bool[Tensor, "k patches"]:
        """The patches of image_segments with a vector; k is 0 where the bridge needs no mask."""
        masks = [s.keep for s in self.image_segments if s.keep is not None]
        return torch.stack(masks) if masks else torch.zeros(0, 0, dtype=torch.bool)


@dataclass
class SequenceBuilder:
    """Appends positions one after another; `build` makes the TokenSequence."""

    ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Positions of each call of `add`."""
    roles: list[int] = field(default_factory=list)
    """One for each of `lengths`, as `flags`."""
    flags: list[tuple[bool, bool, bool, bool]] = field(default_factory=list)
    image_segments: list[ImageSegment] = field(default_factory=list)

    def add(
        self,
        ids: Sequence[int],
        role: Role,
        *,
        predict: bool = False,
        regress: bool = False,
        prefix: bool = False,
        embed: ImageSegment | None = None,
    ) -> SequenceBuilder:
        """Append positions of one role; `embed` is an image whose vectors are their inputs."""
        self.ids += ids
        self.lengths.append(len(ids))
        self.roles.append(int(role))
        self.flags.append((predict, regress, prefix, embed is not None))
        if embed is not None:
            self.image_segments.append(embed)
        return self

    def text(self, ids: Sequence[int], **flags: Unpack[Flags]) -> SequenceBuilder:
        """Append text ids. Returns itself."""
        return self.add(ids, Role.TEXT, **flags)

    def image(
        self,
        delimiters: tuple[int, int],
        ids: Sequence[int],
        begin: Flags,
        visual: Flags,
        end: Flags,
        embed: ImageSegment | None = None,
    ) -> SequenceBuilder:
        """Append an image between its delimiters. Returns itself.

        Args:
            delimiters: the ids that begin and end it.
            ids: its code ids; for vectors without codes as many pad ids.
            begin: flags of the first delimiter.
            visual: flags of the codes or vectors.
            end: flags of the second delimiter.
            embed: an image whose vectors are the inputs between the delimiters.
        """
        self.add(delimiters[:1], Role.BEGIN, **begin)
        self.add(ids, Role.VISUAL, **visual, embed=embed)
        return self.add(delimiters[1:], Role.END, **end)

    def build(self, key: str = "") -> TokenSequence:
        """The sequence of all positions appended so far."""
        columns = [(role, *flags) for role, flags in zip(self.roles, self.flags, strict=True)]
        table = np.array(columns, dtype=np.int8).reshape(-1, 5).repeat(self.lengths, 0)
        table[:1, 1:3] = 0  # the first position has no position before it to be predicted from
        roles, *flags = torch.from_numpy(table).unbind(1)
        predict, regress, prefix, is_embedding = (flag.view(torch.bool) for flag in flags)
        return TokenSequence(
            torch.from_numpy(np.array(self.ids, dtype=np.int64)),
            roles,
            predict,
            regress,
            prefix,
            is_embedding,
            tuple(self.image_segments),
            key,
        )

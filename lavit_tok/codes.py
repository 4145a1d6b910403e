"""What passes between the rooms, said once: RaggedLayout (how ragged rows lie) and VisualCodes (a batch of code sequences).

This is the only file that knows that images have different numbers of codes. Everything ragged is stored as all images'
rows, one after another, and `lengths`:

    image 0 has 3 rows, image 1 has 1:     values  a b c d      lengths  3 1
    padded(fill=-1):                       a  b  c
                                           d -1 -1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor


class CodeError(ValueError):
    """Codes that do not fit: out of range, of another codebook's size, or lengths that do not add up."""


@dataclass(frozen=True, eq=False)
class RaggedLayout:
    """Where each row of a ragged batch lies: its image (`row`) and its place in the image's sequence (`column`)."""

    lengths: Int64[Tensor, " batch"]

    @classmethod
    def of(cls, mask: Bool[Tensor, "batch n"]) -> RaggedLayout:
        """The layout of the rows picked by a mask, raster order, images one after another."""
        return cls(mask.sum(1))

    @cached_property
    def width(self) -> int:
        """The longest image's number of rows; 0 for none."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    @cached_property
    def mask(self) -> Bool[Tensor, "batch width"]:
        """True where a padded slot holds a row."""
        return torch.arange(self.width, device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def slots(self) -> Int64[Tensor, " total"]:
        """Index of every row in the flattened padded batch."""
        return self.mask.flatten().nonzero().squeeze(1)

    @cached_property
    def column(self) -> Int64[Tensor, " total"]:
        """Index of every row in its own image's sequence, from 0."""
        return self.slots % max(self.width, 1)

    @cached_property
    def full(self) -> bool:
        """True when all images have the same number of rows, so that no padded slot is free."""
        return len(self.lengths) == 0 or int(self.lengths.min()) == self.width

    @cached_property
    def sources(self) -> Int64[Tensor, " slots"]:
        """For every padded slot a row to put there: its own, or for a free slot the nearest row before or after it."""
        ends = self.lengths.cumsum(0)
        last = (ends - 1).clamp(min=0)[:, None]
        place = (ends - self.lengths)[:, None] + torch.arange(
            self.width, device=self.lengths.device
        )
        return torch.minimum(place, last).flatten()

    def pad(
        self, rows: Shaped[Tensor, "total *rest"], fill: int | float = 0
    ) -> Shaped[Tensor, "batch width *rest"]:
        """Rows one after another -> a rectangle, the free slots filled."""
        batch = len(self.lengths)
        padded = rows.new_full((batch * self.width, *rows.shape[1:]), fill)
        return padded.index_copy_(0, self.slots, rows).view(batch, self.width, *rows.shape[1:])

    def spread(self, rows: Shaped[Tensor, "total *rest"]) -> Shaped[Tensor, "batch width *rest"]:
        """pad for attention, whose mask hides free slots: they repeat a row, which costs one copy, or none.

        With lengths 3 and 1 the rows a b c d become  a b c
                                                      d d d
        """
        padded = rows if self.full else rows.index_select(0, self.sources)
        return padded.view(len(self.lengths), self.width, *rows.shape[1:])

    def unpad(self, padded: Shaped[Tensor, "batch width *rest"]) -> Shaped[Tensor, "total *rest"]:
        """The inverse of pad; what lies in free slots is dropped."""
        flat = padded.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.slots)


@dataclass(frozen=True, eq=False)
class VisualCodes:
    """The codes of a batch of images, each of its own length.

    Args:
        values: int64 [total], every image's codes, one after another, each 0..K-1.
        lengths: int64 [batch], codes of each image.
        keep: bool [batch patches], the patches behind the codes; None when the codes came without a picture.
        codebook_size: K of the tokenizer that made them, checked by every tokenizer that reads them; None if unknown.

    Raises:
        CodeError: wrong type or shape, lengths that do not add up, codes outside 0..K-1.
    """

    values: Tensor
    lengths: Tensor
    keep: Tensor | None = None
    codebook_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("values", "lengths"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.ndim != 1:
                got = (
                    f"{tensor.dtype} {list(tensor.shape)}"
                    if isinstance(tensor, Tensor)
                    else type(tensor).__name__
                )
                raise CodeError(f"{name}: expected an int64 tensor of one dimension, got {got}")
        if len(self.lengths) and int(self.lengths.min()) < 0:
            raise CodeError(f"lengths: expected none below 0, got {int(self.lengths.min())}")
        if int(self.lengths.sum()) != len(self.values):
            raise CodeError(
                f"lengths add up to {int(self.lengths.sum())}, but there are {len(self.values)} codes"
            )
        if self.keep is not None:
            if self.keep.dtype != torch.bool or self.keep.ndim != 2:
                raise CodeError(
                    f"keep: expected bool [batch patches], got {self.keep.dtype} {list(self.keep.shape)}"
                )
            if not torch.equal(self.keep.sum(1), self.lengths):
                raise CodeError(
                    "keep: each image's number of kept patches must equal its number of codes"
                )
        self.check(self.codebook_size)

    def check(self, codebook_size: int | None) -> None:
        """Raise CodeError unless every code is a row of a codebook of this size."""
        if codebook_size is None:
            if len(self.values) and int(self.values.min()) < 0:
                raise CodeError(f"codes must not be negative, got {int(self.values.min())}")
            return
        if self.codebook_size not in (None, codebook_size):
            raise CodeError(
                f"these codes index a codebook of {self.codebook_size} rows, this one has {codebook_size}: codes of "
                "another tokenizer would decode to an unrelated picture"
            )
        if len(self.values):
            low, high = int(self.values.min()), int(self.values.max())
            if low < 0 or high >= codebook_size:
                raise CodeError(f"codes must lie in 0..{codebook_size - 1}, got {low}..{high}")

    def check_lengths(self, patches: int) -> None:
        """Raise CodeError unless there are images, each of 1..patches codes, as a reconstructor can read."""
        if len(self) == 0 or int(self.lengths.min()) < 1 or self.layout.width > patches:
            got = (
                "no images"
                if len(self) == 0
                else f"lengths {int(self.lengths.min())}..{self.layout.width}"
            )
            raise CodeError(
                f"expected at least one image and 1..{patches} codes an image, got {got}"
            )

    @classmethod
    def from_list(cls, codes: Sequence[Any], codebook_size: int | None = None) -> VisualCodes:
        """From one sequence of integers (list or tensor) per image."""
        rows = [_row(c, i) for i, c in enumerate(codes)]
        values = (
            torch.cat([row.long() for row in rows]) if rows else torch.empty(0, dtype=torch.int64)
        )
        return cls(
            values,
            torch.tensor([len(r) for r in rows], dtype=torch.int64),
            codebook_size=codebook_size,
        )

    def to_list(self) -> list[list[int]]:
        return [row.tolist() for row in self]

    @cached_property
    def layout(self) -> RaggedLayout:
        return RaggedLayout(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def padded(self, fill: int = -1) -> Int64[Tensor, "batch width"]:
        """int64 [batch, longest], free slots filled."""
        return self.layout.pad(self.values, fill)

    def to(self, device: torch.device | str) -> VisualCodes:
        keep = None if self.keep is None else self.keep.to(device)
        return VisualCodes(
            self.values.to(device), self.lengths.to(device), keep, self.codebook_size
        )

    def take(self, indices: Sequence[int]) -> VisualCodes:
        """Some of the images, in the order asked for; an image may be taken twice."""
        wanted = [int(i) for i in indices]
        rows = [self[i] for i in wanted]
        values = torch.cat(rows) if rows else self.values[:0]
        keep = None if self.keep is None else self.keep[wanted]
        return VisualCodes(values, self.lengths[wanted], keep, self.codebook_size)

    @classmethod
    def cat(cls, batches: Sequence[VisualCodes]) -> VisualCodes:
        """Several batches one after another; masks survive if all have one."""
        if not batches:
            raise CodeError("expected at least one batch of codes to join, got none")
        sizes = {b.codebook_size for b in batches}
        if len(sizes) > 1:
            raise CodeError(
                f"expected codes of one tokenizer, got codebook sizes {sorted(map(str, sizes))}"
            )
        masks = [b.keep for b in batches if b.keep is not None]
        keep = torch.cat(masks) if len(masks) == len(batches) else None
        values, lengths = (
            torch.cat([b.values for b in batches]),
            torch.cat([b.lengths for b in batches]),
        )
        return cls(values, lengths, keep, sizes.pop())

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *self.lengths.cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Int64[Tensor, " n"]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        return self.values[self._starts[index] : self._starts[index + 1]]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def _row(codes: Any, image: int) -> Int64[Tensor, " n"]:
    """One image's codes as int64; CodeError unless they are one sequence of integers that fit."""
    try:
        row = torch.as_tensor(codes)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CodeError(f"image {image}: expected a sequence of integer codes: {error}") from None
    if row.ndim != 1:
        raise CodeError(
            f"image {image}: expected one sequence of codes for each image, got shape {list(row.shape)}"
        )
    if len(row) and (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool):
        raise CodeError(f"image {image}: expected integer codes, got {row.dtype}")
    return row.long()

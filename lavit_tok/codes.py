"""Batches of code sequences: VisualCodes, and RaggedLayout, the layout of a ragged batch.

Images have different numbers of codes, and only this file handles that. A ragged batch is stored
as the items of all images, concatenated, and `lengths`:

    image 0 has 3 codes, image 1 has 1:    values  a b c d      lengths  3 1
    padded(fill=-1):                       a  b  c
                                           d -1 -1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from lavit_tok.nn.nested_order import nested_order


class CodeError(ValueError):
    """Codes out of range, of another codebook's size, or with lengths that do not add up."""


@dataclass(frozen=True, eq=False)
class RaggedLayout:
    """Position of each item of a ragged batch in the padded batch [batch width]."""

    lengths: Int64[Tensor, " batch"]

    @classmethod
    def of(cls, mask: Bool[Tensor, "batch n"]) -> RaggedLayout:
        """The layout of the items selected by a mask, in raster order, images concatenated."""
        return cls(mask.sum(1))

    @cached_property
    def width(self) -> int:
        """Number of items of the longest image; 0 for an empty batch."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    @cached_property
    def mask(self) -> Bool[Tensor, "batch width"]:
        """True at padded positions that hold an item."""
        return torch.arange(self.width, device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def positions(self) -> Int64[Tensor, " total"]:
        """Index of each item in the flattened padded batch."""
        return self.mask.flatten().nonzero().squeeze(1)

    @cached_property
    def full(self) -> bool:
        """True if all images have the same number of items, so that nothing is padded."""
        return len(self.lengths) == 0 or int(self.lengths.min()) == self.width

    @cached_property
    def sources(self) -> Int64[Tensor, " padded"]:
        """For each padded position an item: its own, or at padding the nearest one."""
        ends = self.lengths.cumsum(0)
        last = (ends - 1).clamp(min=0)[:, None]
        index = torch.arange(self.width, device=self.lengths.device)
        return torch.minimum((ends - self.lengths)[:, None] + index, last).flatten()

    def pad(
        self, items: Shaped[Tensor, "total *rest"], fill: int | float = 0
    ) -> Shaped[Tensor, "batch width *rest"]:
        """Concatenated items -> a rectangle padded with `fill`."""
        batch, rest = len(self.lengths), items.shape[1:]
        padded = items.new_full((batch * self.width, *rest), fill)
        return padded.index_copy_(0, self.positions, items).view(batch, self.width, *rest)

    def spread(self, items: Shaped[Tensor, "total *rest"]) -> Shaped[Tensor, "batch width *rest"]:
        """Pad by repeating items, which costs one copy or none; for attention with a mask.

        With lengths 3 and 1 the items a b c d become  a b c
                                                       d d d
        """
        padded = items if self.full else items.index_select(0, self.sources)
        return padded.view(len(self.lengths), self.width, *items.shape[1:])

    def unpad(self, padded: Shaped[Tensor, "batch width *rest"]) -> Shaped[Tensor, "total *rest"]:
        """The inverse of pad."""
        flat = padded.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.positions)


@dataclass(frozen=True, eq=False)
class VisualCodes:
    """The codes of a batch of images, each with its own number of codes.

    Args:
        values: int64 [total], every image's codes, one after another, each 0..K-1.
        lengths: int64 [batch], codes of each image.
        keep: bool [batch patches], the patches behind the codes; None when the codes came without
            images.
        codebook_size: K of the tokenizer that made them, checked by every tokenizer that reads
            them; None if unknown.
        nested: codes are in the nested order (nn/nested_order.py), so that the first of them are
            codes of the image too.
        predicted_error: float [batch], each image's error at its number of codes, as predicted or
            measured by encode.

    Raises:
        CodeError: wrong type or shape, lengths that do not add up, codes outside 0..K-1.
    """

    values: Tensor
    lengths: Tensor
    keep: Tensor | None = None
    codebook_size: int | None = None
    nested: bool = False
    predicted_error: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("values", "lengths"):
            x = getattr(self, name)
            if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.ndim != 1:
                got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise CodeError(f"{name}: expected an int64 tensor of one dimension, got {got}")
        if len(self.lengths) and int(self.lengths.min()) < 0:
            raise CodeError(f"lengths: expected none below 0, got {int(self.lengths.min())}")
        if int(self.lengths.sum()) != len(self.values):
            total = int(self.lengths.sum())
            raise CodeError(f"lengths add up to {total}, but there are {len(self.values)} codes")
        if self.keep is not None:
            if self.keep.dtype != torch.bool or self.keep.ndim != 2:
                got = f"{self.keep.dtype} {list(self.keep.shape)}"
                raise CodeError(f"keep: expected bool [batch patches], got {got}")
            if not torch.equal(self.keep.sum(1), self.lengths):
                raise CodeError(
                    "keep: each image's number of kept patches must equal its number of codes"
                )
        if self.predicted_error is not None and self.predicted_error.shape != self.lengths.shape:
            raise CodeError(
                f"predicted_error: expected one number for each of {len(self.lengths)} images, "
                f"got shape {list(self.predicted_error.shape)}"
            )
        self.check(self.codebook_size)

    def truncate(self, counts: int | Sequence[int] | Int64[Tensor, " batch"]) -> VisualCodes:
        """The first codes of every image, as encode returns them at that budget.

        Args:
            counts: codes of every image at most, for all or for each; at least 1.

        Raises:
            CodeError: codes that are not nested, or counts below 1.
        """
        if not self.nested:
            raise CodeError(
                "truncate: only nested codes can be cut; others lose the parts of the image that "
                "they cover"
            )
        limits = torch.as_tensor(counts, device=self.device)
        fits = limits.ndim == 0 or limits.shape == self.lengths.shape
        if limits.is_floating_point() or not fits:
            raise CodeError(
                f"truncate: expected one integer, or one for each of {len(self)} images, "
                f"got {counts!r}"
            )
        if limits.numel() and int(limits.min()) < 1:
            smallest = int(limits.min())
            raise CodeError(f"truncate: expected at least 1 code per image, got {smallest}")
        lengths = torch.minimum(self.lengths, limits)
        ranks = torch.arange(self.layout.width, device=self.device).expand(len(self), -1)
        ranks = ranks[self.layout.mask]
        values = self.values[ranks < lengths.repeat_interleave(self.lengths)]
        keep = None if self.keep is None else first_ranks(lengths, self.keep.shape[1])
        return VisualCodes(values, lengths, keep, self.codebook_size, nested=True)

    def check(self, codebook_size: int | None) -> None:
        """Raise CodeError unless every code indexes a codebook of this size."""
        if None not in (self.codebook_size, codebook_size) and self.codebook_size != codebook_size:
            raise CodeError(
                f"these codes index a codebook of {self.codebook_size} entries, this one has "
                f"{codebook_size}: codes of another tokenizer would decode to an unrelated image"
            )
        low, high = (int(x) for x in self.values.aminmax()) if len(self.values) else (0, 0)
        if low < 0 or (codebook_size is not None and high >= codebook_size):
            end = "" if codebook_size is None else codebook_size - 1
            raise CodeError(f"expected codes in 0..{end}, got {low}..{high}")

    def check_lengths(self, patches: int) -> None:
        """Raise CodeError unless each image has 1..patches codes, as a reconstructor requires."""
        if len(self) == 0 or int(self.lengths.min()) < 1 or self.layout.width > patches:
            lengths = f"lengths {int(self.lengths.min())}..{self.layout.width}" if len(self) else ""
            raise CodeError(
                f"expected at least one image and 1..{patches} codes per image, "
                f"got {lengths or 'no images'}"
            )

    @classmethod
    def from_list(
        cls, codes: Sequence[Any], codebook_size: int | None = None, nested: bool = False
    ) -> VisualCodes:
        """From one sequence of integers (list or tensor) per image. Raises CodeError."""
        sequences = [_sequence(c, i) for i, c in enumerate(codes)]
        values = torch.cat(sequences) if sequences else torch.empty(0, dtype=torch.int64)
        lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
        return cls(values, lengths, codebook_size=codebook_size, nested=nested)

    def to_list(self) -> list[list[int]]:
        """One list of codes per image."""
        return [codes.tolist() for codes in self]

    @cached_property
    def layout(self) -> RaggedLayout:
        """How the codes are arranged in a padded batch."""
        return RaggedLayout(self.lengths)

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.values.device

    def padded(self, fill: int = -1) -> Int64[Tensor, "batch width"]:
        """int64 [batch, longest], padded with `fill`."""
        return self.layout.pad(self.values, fill)

    def to(self, device: torch.device | str) -> VisualCodes:
        """The same codes on another device."""
        return self._changed(self.values.to(device), lambda x: x.to(device))

    def take(self, indices: Sequence[int]) -> VisualCodes:
        """The images at these indices, in this order; an index may occur twice."""
        wanted = [int(i) for i in indices]
        values = torch.cat([self.values[:0], *(self[i] for i in wanted)])
        return self._changed(values, lambda x: x[wanted])

    def _changed(self, values: Tensor, change: Callable[[Tensor], Tensor]) -> VisualCodes:
        """With these values, and every tensor that has a row for each image changed likewise."""
        rows = {name: getattr(self, name) for name in ("lengths", "keep", "predicted_error")}
        changed: Any = {name: change(x) for name, x in rows.items() if x is not None}
        return replace(self, values=values, **changed)

    @classmethod
    def cat(cls, batches: Sequence[VisualCodes]) -> VisualCodes:
        """Concatenate batches; the result has keep masks if all of them have.

        Raises:
            CodeError: no batch, or codes of different tokenizers.
        """
        if not batches:
            raise CodeError("expected at least one batch of codes to join, got none")
        sizes = {b.codebook_size for b in batches}
        if len(sizes) > 1:
            sizes_text = sorted(map(str, sizes))
            raise CodeError(f"expected codes of one tokenizer, got codebook sizes {sizes_text}")
        masks = [b.keep for b in batches if b.keep is not None]
        keep = torch.cat(masks) if len(masks) == len(batches) else None
        values, lengths = (
            torch.cat([getattr(b, n) for b in batches]) for n in ("values", "lengths")
        )
        if len({b.nested for b in batches}) > 1:
            raise CodeError("expected codes of one tokenizer, got nested codes and others")
        errors = [b.predicted_error for b in batches if b.predicted_error is not None]
        error = torch.cat(errors) if len(errors) == len(batches) else None
        return cls(values, lengths, keep, sizes.pop(), batches[0].nested, error)

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


def first_ranks(counts: Int64[Tensor, " batch"], patches: int) -> Bool[Tensor, "batch patches"]:
    """The keep mask of every image's first `counts` patches in the nested order."""
    return nested_order(patches).rank.to(counts.device) < counts[:, None]


def _sequence(codes: Any, image: int) -> Int64[Tensor, " n"]:
    """One image's codes as int64. Raises CodeError for anything but a sequence of integers."""
    try:
        values = torch.as_tensor(codes)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CodeError(f"image {image}: expected a sequence of integer codes: {error}") from None
    if values.ndim != 1:
        shape = list(values.shape)
        raise CodeError(
            f"image {image}: expected one sequence of codes per image, got shape {shape}"
        )
    is_integer = not (values.is_floating_point() or values.is_complex())
    if len(values) and (not is_integer or values.dtype == torch.bool):
        raise CodeError(f"image {image}: expected integer codes, got {values.dtype}")
    return values.long()

"""Rows of many lengths -> blocks of one length, nearly without waste, and without leaks between documents.

    rows of 3, 2, 4 places, blocks of 8            block 0                        block 1
                                       ids         b0 b1 b2 b3 a0 a1 a2 .        c0 c1 .  .  .  .  .  .
                                       documents   0  0  0  0  1  1  1  -1       0  0  -1 -1 -1 -1 -1 -1
                                       positions   0  1  2  3  0  1  2  0        0  1  0  1  2  3  4  5

Blocks are filled one after another with the longest rows that fit, and closed by rows that leave no place free.
Positions start anew with each document; masks.py keeps documents from seeing each other. Free places form a document of
their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Int8, Int64, UInt8
from torch import Tensor

from lavit_lm.sequences.segments import Role, TokenSequence

FREE = -1  # document of the free places


@dataclass  # not frozen: for weights of 16 bits Lightning rebuilds a batch field by field
class Packed:
    """A batch of blocks; see Row for what the flags mean.

    Args:
        ids: int64 [b l]; free places hold the pad id.
        roles: int8 [b l].
        predict, regress, prefix, fed: bool [b l].
        pictures: uint8 [k 3 h w], behind the fed places, block after block; k is 0 if there are none.
        kept: bool [j patches]; j is k, or 0 where the bridge asks for no mask.
        documents: int64 [b l], 0, 1, ... within a block; -1 at free places.
        positions: int64 [b l], places within the document.
        keys: for each block the names of its documents, in order.
    """

    ids: Int64[Tensor, "b l"]
    roles: Int8[Tensor, "b l"]
    predict: Bool[Tensor, "b l"]
    regress: Bool[Tensor, "b l"]
    prefix: Bool[Tensor, "b l"]
    is_embedding: Bool[Tensor, "b l"]
    images: UInt8[Tensor, "k 3 h w"]
    keep: Bool[Tensor, "j patches"]
    documents: Int64[Tensor, "b l"]
    positions: Int64[Tensor, "b l"]
    keys: tuple[tuple[str, ...], ...]

    @property
    def fill(self) -> float:
        """Share of the places that hold a document."""
        return (self.documents != FREE).float().mean().item()

    def to(self, device: torch.device | str) -> Packed:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "keys"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def plan(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Which rows share a block: lists of row numbers, each row once, in O(n block).

    A block is closed by one row, or by two, that leave no place free; while there are none such, the longest row that
    fits goes in. A few blocks at the end, when little is left to choose from, are emptier.

    Raises:
        ValueError: a row longer than a block, or without any place.
    """
    left: dict[int, list[int]] = {}  # length -> rows of it, the first one last
    for i in reversed(range(len(lengths))):
        if not 0 < lengths[i] <= block:
            raise ValueError(
                f"row {i}: expected 1 to {block} places, which is what a block holds, got {lengths[i]}"
            )
        left.setdefault(lengths[i], []).append(i)
    blocks: list[list[int]] = []
    while left:
        rows: list[int] = []
        room = block
        while chosen := _closing(left, room) or _longest(left, room):
            for length in chosen:
                rows.append(left[length].pop())
                room -= length
                if not left[length]:
                    del left[length]
        blocks.append(rows)
    return blocks


def _closing(left: dict[int, list[int]], room: int) -> tuple[int, ...]:
    """Lengths of one row, or of two, that fill the room exactly; of several pairs the one with the longest row."""
    if room in left:
        return (room,)
    halves = [
        n
        for n in left
        if n >= room - n and room - n in left and (n != room - n or len(left[n]) > 1)
    ]
    return (max(halves), room - max(halves)) if halves else ()


def _longest(left: dict[int, list[int]], room: int) -> tuple[int, ...]:
    return tuple(sorted((length for length in left if length <= room), reverse=True)[:1])


def embedded_images(
    rows: Sequence[TokenSequence],
) -> tuple[UInt8[Tensor, "k 3 h w"], Bool[Tensor, "j patches"]]:
    """(pictures, kept) of all rows, in order: what a bridge makes the vectors of their fed places from."""
    is_embedding = [row for row in rows if row.image_segments]
    images = (
        torch.cat([row.images for row in is_embedding])
        if is_embedding
        else torch.zeros(0, 3, 0, 0, dtype=torch.uint8)
    )
    keep = (
        torch.cat([row.keep for row in is_embedding])
        if is_embedding
        else torch.zeros(0, 0, dtype=torch.bool)
    )
    return images, keep


def pack(blocks: Sequence[Sequence[TokenSequence]], length: int, pad: int) -> Packed:
    """The rows of each block, laid out one after another.

    Args:
        blocks: for each block its rows, at least one block; one without rows is all free places.
        length: places of a block.
        pad: id at free places.

    Raises:
        ValueError: no block at all, or rows that do not fit into theirs.
    """
    if not blocks:
        raise ValueError("expected at least one block to lay out, got none")
    for rows in blocks:
        if sum(map(len, rows)) > length:
            raise ValueError(
                f"rows of {[len(row) for row in rows]} places do not fit into a block of {length}"
            )
    size = (len(blocks), length)
    ids = torch.full(size, pad, dtype=torch.int64)
    roles = torch.full(size, int(Role.TEXT), dtype=torch.int8)
    flags = {
        name: torch.zeros(size, dtype=torch.bool)
        for name in ("predict", "regress", "prefix", "is_embedding")
    }
    documents = torch.full(size, FREE, dtype=torch.int64)
    positions = torch.zeros(size, dtype=torch.int64)
    for b, rows in enumerate(blocks):
        start = 0
        for number, row in enumerate(rows):
            place = slice(start, start + len(row))
            ids[b, place], roles[b, place], documents[b, place] = row.ids, row.roles, number
            positions[b, place] = torch.arange(len(row))
            for name, flag in flags.items():
                flag[b, place] = getattr(row, name)
            start += len(row)
        positions[b, start:] = torch.arange(length - start)
    images, keep = embedded_images([row for rows in blocks for row in rows])
    keys = tuple(tuple(row.key for row in rows) for rows in blocks)
    return Packed(
        ids,
        roles,
        **flags,
        images=images,
        keep=keep,
        documents=documents,
        positions=positions,
        keys=keys,
    )


def pad(rows: Sequence[TokenSequence], pad: int) -> Packed:
    """One row a block, as long as the longest: what packing is measured against."""
    return pack([[row] for row in rows], max(map(len, rows), default=1), pad)

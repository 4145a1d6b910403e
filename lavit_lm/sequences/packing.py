"""Sequences of many lengths -> blocks of one length, with little padding.

    sequences of 3, 2, 4 tokens    block 0                        block 1
                         ids       b0 b1 b2 b3 a0 a1 a2 .         c0 c1 .  .  .  .  .  .
                         documents 0  0  0  0  1  1  1  -1        0  0  -1 -1 -1 -1 -1 -1
                         positions 0  1  2  3  0  1  2  0         0  1  0  1  2  3  4  5

Blocks are filled one after another with the longest sequences that fit, and completed by one or two
that leave no padding. Positions restart with each document; masks.py prevents attention between
documents. Padding is a document of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int8, Int64, UInt8
from torch import Tensor

from lavit_lm.sequences.token_sequence import Role, TokenSequence

PADDING = -1
"""Document number of padding."""


@dataclass  # not frozen: for 16-bit weights Lightning rebuilds a batch field by field
class PackedBatch:
    """A batch of blocks; the flags are TokenSequence's.

    Args:
        ids: int64 [b l]; the pad id at padding.
        roles: int8 [b l].
        predict: bool [b l]; the id of this position is predicted.
        regress: bool [b l]; the vector of this position is predicted.
        prefix: bool [b l]; the whole prefix attends to this position.
        is_embedding: bool [b l]; a vector of an image is at this position, no id.
        images: uint8 [k 3 h w], the images of the `is_embedding` positions, block after block, or
            float [k n d], vectors of them that another model generated; k is 0 without any.
        keep: bool [j patches]; j is k, or 0 where the bridge needs no mask.
        documents: int64 [b l], 0, 1, ... within a block; -1 at padding.
        positions: int64 [b l], positions within the document.
        keys: for each block the keys of its documents, in order.
    """

    ids: Int64[Tensor, "b l"]
    roles: Int8[Tensor, "b l"]
    predict: Bool[Tensor, "b l"]
    regress: Bool[Tensor, "b l"]
    prefix: Bool[Tensor, "b l"]
    is_embedding: Bool[Tensor, "b l"]
    images: UInt8[Tensor, "k 3 h w"] | Float[Tensor, "k n d"]
    keep: Bool[Tensor, "j patches"]
    documents: Int64[Tensor, "b l"]
    positions: Int64[Tensor, "b l"]
    keys: tuple[tuple[str, ...], ...]

    @property
    def fill(self) -> float:
        """Ratio of positions that are not padding."""
        return (self.documents != PADDING).float().mean().item()

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "keys"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def plan_blocks(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Which sequences share a block: lists of indices, each sequence once, in O(n block).

    A block is completed by one sequence, or by two, that leave no padding; as long as there are
    none, the longest sequence that fits is added. A few blocks at the end, when few sequences
    remain, have more padding.

    Raises:
        ValueError: a sequence longer than a block, or an empty one.
    """
    remaining: dict[int, list[int]] = {}  # length -> sequences of this length, the first one last
    for i in reversed(range(len(lengths))):
        if not 0 < lengths[i] <= block:
            raise ValueError(
                f"sequence {i}: expected 1 to {block} tokens, the length of a block, got "
                f"{lengths[i]}"
            )
        remaining.setdefault(lengths[i], []).append(i)
    blocks: list[list[int]] = []
    while remaining:
        sequences: list[int] = []
        space = block
        while chosen := _completing(remaining, space) or _longest(remaining, space):
            for length in chosen:
                sequences.append(remaining[length].pop())
                space -= length
                if not remaining[length]:
                    del remaining[length]
        blocks.append(sequences)
    return blocks


def _completing(remaining: dict[int, list[int]], space: int) -> tuple[int, ...]:
    """Lengths of one or two sequences that fill the space; of pairs, the one with the longest."""
    if space in remaining:
        return (space,)
    longer = [n for n in remaining if n >= space - n and space - n in remaining]
    longer = [n for n in longer if n != space - n or len(remaining[n]) > 1]
    return (max(longer), space - max(longer)) if longer else ()


def _longest(remaining: dict[int, list[int]], space: int) -> tuple[int, ...]:
    fitting = [length for length in remaining if length <= space]
    return (max(fitting),) if fitting else ()


def embedded_images(
    sequences: Sequence[TokenSequence],
) -> tuple[UInt8[Tensor, "k 3 h w"] | Float[Tensor, "k n d"], Bool[Tensor, "j patches"]]:
    """(images, keep) of all sequences, in order: the input of a bridge."""
    with_images = [sequence for sequence in sequences if sequence.image_segments]
    if not with_images:
        return torch.zeros(0, 3, 0, 0, dtype=torch.uint8), torch.zeros(0, 0, dtype=torch.bool)
    return torch.cat([s.images for s in with_images]), torch.cat([s.keep for s in with_images])


def pack(blocks: Sequence[Sequence[TokenSequence]], length: int, pad_id: int) -> PackedBatch:
    """Concatenate the sequences of each block.

    Args:
        blocks: for each block its sequences, at least one block; one without sequences is all
            padding.
        length: positions of a block.
        pad_id: id at padding.

    Raises:
        ValueError: no block, or sequences that do not fit into theirs.
    """
    if not blocks:
        raise ValueError("expected at least one block, got none")
    every = [sequence for sequences in blocks for sequence in sequences]
    lengths = [[len(sequence) for sequence in sequences] for sequences in blocks]
    for of_block in lengths:
        if sum(of_block) > length:
            raise ValueError(f"sequences of {of_block} tokens do not fit into a block of {length}")
    gaps = torch.tensor([length - sum(of_block) for of_block in lengths])
    # Documents and their lengths, block by block, with the padding as the last of each block.
    spans = [
        n for of_block, gap in zip(lengths, gaps.tolist(), strict=True) for n in (*of_block, gap)
    ]
    numbers = [n for of_block in lengths for n in (*range(len(of_block)), PADDING)]
    size, counts = (len(blocks), length), torch.tensor(spans)
    documents = torch.tensor(numbers).repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    positions = torch.arange(len(blocks) * length) - starts
    filled = documents != PADDING

    def packed(name: str, padding: int, dtype: torch.dtype) -> Tensor:
        values = torch.full((len(blocks) * length,), padding, dtype=dtype)
        if every:
            values[filled] = torch.cat([getattr(sequence, name) for sequence in every])
        return values.reshape(size)

    ids = packed("ids", pad_id, torch.int64)
    roles = packed("roles", int(Role.TEXT), torch.int8)
    names = ("predict", "regress", "prefix", "is_embedding")
    flags = {name: packed(name, 0, torch.bool) for name in names}
    documents, positions = documents.reshape(size), positions.reshape(size)
    images, keep = embedded_images(every)
    keys = tuple(tuple(s.key for s in sequences) for sequences in blocks)
    return PackedBatch(
        ids,
        roles,
        **flags,
        images=images,
        keep=keep,
        documents=documents,
        positions=positions,
        keys=keys,
    )


def pad(sequences: Sequence[TokenSequence], pad_id: int) -> PackedBatch:
    """One sequence a block, as long as the longest."""
    return pack([[s] for s in sequences], max(map(len, sequences), default=1), pad_id)

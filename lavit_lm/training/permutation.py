"""A seeded order of any number of examples, whose state does not grow with that number."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int64

ROUNDS = 8
CHUNK, CHUNKS = 4096, 64
"""Consecutive examples that are read together, and how many such chunks are shuffled together."""
ORDER_OF_CHUNKS = 2**32 - 1
"""The number of a pool that no pool has: the permutation of the chunks."""


class Permutation:
    """A pseudo-random permutation of 0..size-1: `order[5:8]` are the examples at positions 5, 6, 7.

    A Feistel network (Luby and Rackoff, 1988) on pairs (left, right) of digits to the base
    b = ceil(sqrt(size)) permutes 0..b^2-1; a result outside 0..size-1 goes through it again
    (cycle walking; Black and Rogaway, 2002), which b^2 < size + 2 sqrt(size) + 1 makes rare:

        (left, right) -> (right, (left + F_key(right)) mod b)      eight rounds, a key for each

    Args:
        size: number of examples.
        seed: integers of at least 0, e.g. seed and epoch.
    """

    def __init__(self, size: int, *seed: int) -> None:
        self.size, self.base = size, math.isqrt(max(size - 1, 0)) + 1
        self.keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, positions: slice) -> Int64[np.ndarray, " count"]:
        """The examples at consecutive positions, in time proportional to their number."""
        numbers = np.arange(*positions.indices(self.size), dtype=np.uint64)
        outside = np.ones(len(numbers), dtype=bool)
        while outside.any():
            numbers[outside] = self._walk(numbers[outside])
            outside = numbers >= self.size
        return numbers.astype(np.int64)

    def _walk(self, numbers: np.ndarray) -> np.ndarray:
        base = np.uint64(self.base)
        left, right = numbers // base, numbers % base
        for key in self.keys:
            left, right = right, (left + _mixed(right + key)) % base
        return left * base + right


class LocalPermutation:
    """A permutation of 0..size-1 whose neighbors are in few chunks, so that files are read once.

    The chunks of 4,096 consecutive examples are permuted; each 64 of them that follow one another
    are a pool, and the examples of a pool are permuted:

        size 9, chunks of 2, pools of 2 chunks, seed 3     chunks     0 3     | 1 2     | 4
                                                           examples   0 1 7 6 | 4 2 3 5 | 8

    An incomplete last chunk is in the last pool. Up to one pool, 262,144 examples, this is
    `Permutation(size, *seed)`.

    Args:
        size: number of examples.
        seed: integers of at least 0, e.g. seed, epoch and source.
        chunk: consecutive examples of a chunk.
        chunks: of a pool.
    """

    def __init__(self, size: int, *seed: int, chunk: int = CHUNK, chunks: int = CHUNKS) -> None:
        self.size, self.seed, self.chunk, self.chunks = size, seed, chunk, chunks

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, positions: slice) -> Int64[np.ndarray, " count"]:
        """The examples at consecutive positions, in time proportional to their number."""
        start, stop, _ = positions.indices(self.size)
        pool = self.chunk * self.chunks
        parts = [np.empty(0, np.int64)]
        for number in range(start // pool, -(-stop // pool) if stop > start else 0):
            first, last = number * pool, min((number + 1) * pool, self.size)
            order = Permutation(last - first, *self.seed, number)
            inside = order[max(start, first) - first : min(stop, last) - first]
            parts.append(inside if self.size <= pool else self._of_chunks(number, inside))
        return np.concatenate(parts)

    def _of_chunks(self, pool: int, inside: np.ndarray) -> np.ndarray:
        """The examples at positions of a pool, before those are permuted."""
        order = Permutation(self.size // self.chunk, *self.seed, ORDER_OF_CHUNKS)
        chunks = order[pool * self.chunks : (pool + 1) * self.chunks]
        chunks = np.append(chunks, self.size // self.chunk)  # an incomplete one
        return chunks[inside // self.chunk] * self.chunk + inside % self.chunk


def _mixed(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele et al., 2014), reduced so that sums do not wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(16)

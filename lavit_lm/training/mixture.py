"""The example at every position of a run that draws from several sources with weights.

    position  -weights->  (source, how many of it came before)  -LocalPermutation->  example

Both steps are computed from the position alone: a run continues from any position, with any number
of processes, and no state grows with the number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from lavit_lm.training.permutation import LocalPermutation

ExampleIndex = tuple[int, int]
"""(epoch, number of the example): with the seed, what its random draws depend on."""
BITS = 31
"""Of the fractions that weights are rounded to."""


class Mixture:
    """`mixture[5:8]` are the (epoch, number) of the examples at positions 5, 6 and 7.

        sources A, B, C of 3, 2 and 4 examples with weights 0.5, 0.3 and 0.2; permutations
        left out: each letter has the number of the example in its source

        position   0   1   2   3   4   5   6   7   8   9   10  11
        source     A   B   A   C   A   B   A   C   A   B   A   B
        example    A0  B0  A1  C0  A2  B1  A0  C1  A1  B0  A2  B1
        epoch      0   0   0   0   0   0   1   0   1   1   1   1

    Source A has the positions at which the rounded number of positions times its weight increases,
    B likewise those of the remaining positions, and so on. The number of examples of a source among
    any consecutive positions differs from their number times its weight by at most the number of
    sources. Each source goes through all its examples before it repeats one, in another order in
    each of its own epochs. Numbers count through the sources: those of B begin at 3.

    Args:
        sizes: examples of each source.
        weights: of each source, in any unit; not needed for a single source.
        seed: of the permutations.

    Raises:
        ValueError: a weight that is not a finite number above 0, or a source without examples.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] = (1.0,), seed: int = 0
    ) -> None:
        for size, weight in zip(sizes, weights, strict=True):
            if not (isinstance(weight, int | float) and 0 < weight < math.inf):
                raise ValueError(f"weight: expected a finite number above 0, got {weight}")
            if size < 1:
                raise ValueError(f"expected sources with at least one example, got {[*sizes]}")
        self.sizes, self.seed = [*sizes], seed
        rest = np.cumsum(np.array(weights, dtype=float)[::-1])[::-1]
        self._ratios = [round(w / r * 2**BITS) for w, r in zip(weights, rest, strict=True)]

    def __len__(self) -> int:
        """Examples of all sources."""
        return sum(self.sizes)

    def __getitem__(self, positions: slice) -> list[ExampleIndex]:
        """The examples at consecutive positions, in time proportional to their number."""
        sources, before = self.assign(np.arange(positions.start, positions.stop, dtype=np.int64))
        examples = np.empty((len(sources), 2), dtype=np.int64)
        first = 0
        for source, size in enumerate(self.sizes):
            at = sources == source
            if at.any():  # their counts are consecutive
                start, stop = int(before[at][0]), int(before[at][-1]) + 1
                examples[at] = self._examples(source, size, start, stop)
                examples[at, 1] += first
            first += size
        return [(epoch, number) for epoch, number in examples.tolist()]

    def assign(
        self, positions: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(source, number of positions of this source before) of each position."""
        sources = np.full(len(positions), len(self.sizes) - 1)
        before, left = positions.copy(), np.arange(len(positions))
        for source, ratio in enumerate(self._ratios[:-1]):
            rest = before[left]
            earlier = _part(rest, ratio)
            chosen = _part(rest + 1, ratio) > earlier
            sources[left[chosen]] = source
            before[left] = np.where(chosen, earlier, rest - earlier)
            left = left[~chosen]
        return sources, before

    def _examples(self, source: int, size: int, start: int, stop: int) -> np.ndarray:
        """(epoch, number in the source) of consecutive examples of a source."""
        parts = []
        for epoch in range(start // size, (stop - 1) // size + 1):
            order = LocalPermutation(size, self.seed, epoch, source)
            numbers = order[max(start - epoch * size, 0) : min(stop - epoch * size, size)]
            parts.append(np.stack([np.full_like(numbers, epoch), numbers], 1))
        return np.concatenate(parts)


def _part(count: np.ndarray, ratio: int) -> np.ndarray:
    """The rounded count * ratio / 2**BITS; exact for counts below 2**61."""
    low = (count & (2**BITS - 1)) * ratio + 2 ** (BITS - 1)
    return (count >> BITS) * ratio + (low >> BITS)

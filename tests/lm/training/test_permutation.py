"""The order of examples: a permutation at every size, uniform, and the same at any position."""

from __future__ import annotations

import numpy as np
import pytest

from lavit_lm.training.permutation import Permutation


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 16, 17, 100, 4097])
def test_every_example_once(size: int) -> None:
    order = Permutation(size, 3, 0)
    assert sorted(order[:]) == list(range(size)) and len(order) == size
    parts = [order[start : start + 7] for start in range(0, size, 7)]
    assert np.concatenate([np.empty(0, np.int64), *parts]).tolist() == order[:].tolist()


def test_seed_and_epoch_change_the_order() -> None:
    orders = {tuple(Permutation(50, *seed)[:]) for seed in ((0, 0), (0, 1), (1, 0), (1, 1))}
    assert len(orders) == 4
    assert Permutation(50, 2, 1)[:].tolist() == Permutation(50, 2, 1)[:].tolist()


def test_positions_are_uniform() -> None:
    """Chi-square of example by position, over seeds; neighbors and positions do not correlate."""
    size, seeds = 12, 2000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), Permutation(size, seed)[:]] += 1
    expected, freedom = seeds / size, (size - 1) ** 2
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
    order = Permutation(100_000, 7)[:].astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.02


def test_a_window_of_a_trillion() -> None:
    """No time or memory in proportion to the size: this would need 8 TB."""
    size = 10**12
    examples = Permutation(size, 0, 5)[size - 5000 : size]
    assert len({*examples.tolist()}) == 5000 and 0 <= examples.min() <= examples.max() < size
    assert abs(examples.mean() / size - 0.5) < 0.03

"""The number of codes of an image: each rule against trying everything, on random and on drawn
curves."""

from __future__ import annotations

import itertools

import pytest
import torch

from lavit_tok.encode.rate_distortion import (
    counts_at_error,
    counts_at_price,
    counts_at_total,
    lower_hull,
    search,
)

DRAWN = torch.tensor([[0.9, 0.8, 0.4, 0.4, 0.3]])


def curves(batch: int, most: int, seed: int = 0) -> torch.Tensor:
    """Noisy falling curves."""
    generator = torch.Generator().manual_seed(seed)
    falling = (
        torch.rand(batch, most, generator=generator, dtype=torch.float64)
        .sort(1, descending=True)
        .values
    )
    return falling + 0.05 * torch.rand(batch, most, generator=generator, dtype=torch.float64)


def reference_hull(row: list[float]) -> list[float]:
    """The lowest of all lines between two points, or to the right of the last."""
    n = len(row)
    best = [min(row[: k + 1]) for k in range(n)]
    values = []
    for k in range(n):
        lines = [
            best[a] + (best[b] - best[a]) * (k - a) / (b - a)
            for a in range(k)
            for b in range(k + 1, n)
        ]
        values.append(min([best[k], *lines]))
    return values


def test_the_drawn_hull():
    assert torch.allclose(
        lower_hull(DRAWN), torch.tensor([[0.9, 0.65, 0.4, 0.35, 0.3]], dtype=torch.float64)
    )
    assert counts_at_price(DRAWN, 0.06).tolist() == [3]
    assert counts_at_price(DRAWN, 0.04).tolist() == [5]


@pytest.mark.parametrize("most", [1, 2, 7, 20])
def test_hull_and_price_equal_trying_everything(most):
    errors = curves(6, most)
    hull = lower_hull(errors)
    expected = torch.tensor([reference_hull(row) for row in errors.tolist()], dtype=torch.float64)
    assert torch.allclose(hull, expected)
    for price in (0.0, 0.01, 0.05, 0.2, 1.0):
        cost = errors.cummin(1).values + price * torch.arange(1, most + 1)
        counts = counts_at_price(errors, price)
        assert torch.allclose(cost.gather(1, counts[:, None] - 1)[:, 0], cost.min(1).values)


def test_a_total_is_dealt_as_well_as_any_other_way_on_convex_curves():
    errors = lower_hull(curves(3, 5))
    for total in range(3, 16):
        counts = counts_at_total(errors, total)
        assert int(counts.sum()) == total
        spent = float(errors.gather(1, counts[:, None] - 1).sum())
        ways = (way for way in itertools.product(range(1, 6), repeat=3) if sum(way) == total)
        assert spent == pytest.approx(
            min(sum(float(errors[i, k - 1]) for i, k in enumerate(way)) for way in ways)
        )


def test_totals_out_of_reach():
    errors = curves(2, 4)
    assert counts_at_total(errors, 0).tolist() == [1, 1]
    assert counts_at_total(errors, 99).tolist() == [4, 4]
    flat = torch.zeros(2, 4)
    assert counts_at_total(flat, 5).tolist() == [4, 1]  # equal gains: the earlier image wins
    with pytest.raises(ValueError, match="price"):
        counts_at_price(errors, -1.0)


@pytest.mark.parametrize("most", [1, 2, 16, 256])
def test_search_finds_what_trying_everything_finds(most):
    errors = curves(8, most, seed=most).sort(1, descending=True).values
    asked = []

    def measure(counts):
        asked.append(counts)
        return errors.gather(1, counts[:, None] - 1)[:, 0]

    for target in (-1.0, 0.3, 0.7, 2.0):
        asked.clear()
        start = torch.randint(1, most + 1, (8,), generator=torch.Generator().manual_seed(1))
        counts, error = search(measure, start, target, most, passes=20)
        assert torch.equal(counts, counts_at_error(errors, target))
        assert torch.equal(error, errors.gather(1, counts[:, None] - 1)[:, 0])


def test_few_passes_still_keep_the_promise():
    errors = curves(50, 256, seed=3).sort(1, descending=True).values
    measure = lambda counts: errors.gather(1, counts[:, None] - 1)[:, 0]  # noqa: E731
    counts, error = search(measure, torch.full((50,), 3), 0.4, 256)
    assert bool((error <= 0.4).all())
    assert bool((counts >= counts_at_error(errors, 0.4)).all())

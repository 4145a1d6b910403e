"""The nested order and its levels: the drawings, even covers, and areas of patches."""

from __future__ import annotations

import math

import pytest
import torch

from lavit_tok.nn.nested_order import (
    distance_bias,
    join_areas,
    levels,
    nested_order,
    split_areas,
)


def test_the_drawn_order() -> None:
    drawn = [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]
    assert nested_order(16).rank.view(4, 4).tolist() == drawn


def test_the_drawn_levels() -> None:
    found = levels(16)
    assert [(v.side, v.first, v.stages) for v in found] == [(1, 0, 1), (1, 1, 3), (2, 4, 3)]
    by_rank = torch.empty(4, dtype=torch.int64)
    by_rank[found[2].area[0]] = torch.arange(4, 8)
    areas = split_areas(torch.arange(16.0).view(1, 16, 1), 2)[0].long()
    drawn = torch.empty(16, dtype=torch.int64)
    for area in range(4):
        drawn[areas[area]] = by_rank[area]
    expected = [[4, 4, 6, 6], [4, 4, 6, 6], [7, 7, 5, 5], [7, 7, 5, 5]]
    assert drawn.view(4, 4).tolist() == expected


@pytest.mark.parametrize("side", [1, 2, 8])
def test_every_beginning_is_an_even_cover(side: int) -> None:
    order = nested_order(side * side)
    assert sorted(order.patch.tolist()) == list(range(side * side))
    assert torch.equal(order.patch[order.rank], torch.arange(side * side))
    for level in levels(side * side):
        size = side // level.side
        for stage in range(level.stages):
            first = level.first + stage * level.side**2
            patch = order.patch[first : first + level.side**2]
            area = patch // side // size * level.side + patch % side // size
            assert torch.equal(area, level.area[stage])
            assert sorted(area.tolist()) == list(range(level.side**2))
    last = levels(side * side)[-1]
    assert last.first + last.stages * last.side**2 == side * side


@pytest.mark.parametrize("patches", [0, 12, 9, 144])
def test_other_numbers_of_patches_are_refused(patches: int) -> None:
    with pytest.raises(ValueError, match=f"1, 4, 16, 64, 256, ... patches, got {patches}"):
        nested_order(patches)


def test_areas_are_joined_as_they_were_split() -> None:
    x = torch.randn(2, 64, 3)
    for side in (1, 2, 4, 8):
        areas = split_areas(x, side)
        assert areas.shape == (2, side * side, 64 // side**2 * 3)
        assert torch.equal(join_areas(areas, side, 64), x)


def test_biases_fall_with_the_distance() -> None:
    bias = distance_bias(16, 3)
    assert bias.shape == (3, 16, 16) and bool((bias[2] == 0).all())
    assert bias[0, 0, :4].tolist() == [0, -2, -4, -6] and bias[1, 0, 4] == -1
    assert float(bias[0, 0, 5]) == pytest.approx(-2 * math.sqrt(2))

"""One order of the patches for all images, of which every prefix covers the image evenly.

    rank of 16 patches    0  8  2 10     The code of rank i is that of one patch. The first code
                         12  4 14  6     covers the image, the first 4 a quarter each, the first 16
                          3 11  1  9     a sixteenth each.
                         15  7 13  5

The numbers are those of the Bayer matrix. Ranks that follow each other form stages, and the ranks
of a stage are of one area each:

    stage    0   1   2   3   4      5       6           areas of stage 4    4 4 6 6
    ranks    0   1   2   3   4..7   8..11   12..15      by rank             4 4 6 6
    areas    1   1   1   1   4      4       4                               7 7 5 5
    level    0   1   1   1   2      2       2                               7 7 5 5

A level is finer than the one before; after level 0 it has three stages with the same areas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from lavit_tok.nn.precision import float32_default

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class NestedOrder:
    """The patch of every rank."""

    patch: Int64[Tensor, " patches"]
    """Patch of every rank (raster index)."""
    rank: Int64[Tensor, " patches"]
    """Rank of every patch: the inverse."""


@dataclass(frozen=True, eq=False)
class Level:
    """Stages whose codes are of the same areas."""

    side: int
    """Areas per side of the image."""
    first: int
    """Rank of the first code."""
    stages: int
    """1 or 3, each of side * side ranks."""
    area: Int64[Tensor, "stages areas"]
    """Area of every rank (raster index)."""


def on_cpu(function: Callable[..., Result]) -> Callable[..., Result]:
    """Compute in float32 on the CPU, whatever the defaults; models are first built on meta."""

    @wraps(function)
    def wrapped(*args: Any) -> Result:
        with torch.device("cpu"), float32_default():
            return function(*args)

    return wrapped


def bayer(side: int) -> Int64[Tensor, "side side"]:
    """The Bayer matrix of numbers 0, 1, 2, ...; of a side that is no power of two, a part of it."""
    matrix = torch.zeros(1, 1, dtype=torch.int64)
    while len(matrix) < side:
        top, bottom = [4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]
        matrix = torch.cat([torch.cat(top, 1), torch.cat(bottom, 1)])
    return matrix[:side, :side]


@lru_cache(maxsize=8)
@on_cpu
def nested_order(patches: int) -> NestedOrder:
    """The order.

    Raises:
        ValueError: patches that form no square whose side is a power of two.
    """
    side = math.isqrt(patches)
    if side * side != patches or side & (side - 1) or side == 0:
        raise ValueError(
            f"a nested order needs 1, 4, 16, 64, 256, ... patches, got {patches}: the side is no "
            "power of two"
        )
    rank = bayer(side).flatten()
    return NestedOrder(rank.argsort(), rank)


@lru_cache(maxsize=8)
@on_cpu
def levels(patches: int) -> list[Level]:
    """The levels of the order, the coarsest first."""
    order, side = nested_order(patches), math.isqrt(patches)
    found = [Level(1, 0, 1, torch.zeros(1, 1, dtype=torch.int64))]
    areas = 1
    while areas * areas < patches:
        first, count = areas * areas, 3 * areas * areas
        patch, size = order.patch[first : first + count], side // areas
        area = patch // side // size * areas + patch % side // size
        found.append(Level(areas, first, 3, area.view(3, -1)))
        areas *= 2
    return found


def rank_stages(stages: int) -> list[int]:
    """The stage of every rank of the first stages, whatever the number of patches; see above."""
    return [stage for stage in range(stages) for _ in range(4 ** max(0, (stage - 1) // 3))]


def split_areas(
    x: Float[Tensor, "batch patches dim"], side: int
) -> Float[Tensor, "batch areas joined"]:
    """The vectors of an area's patches, joined; `side` areas per side of the image."""
    grid = math.isqrt(x.shape[1])
    shape = {"g": side, "h": side, "p": grid // side, "q": grid // side}
    return rearrange(x, "b (g p h q) d -> b (g h) (p q d)", **shape)


def join_areas(
    x: Float[Tensor, "batch areas joined"], side: int, patches: int
) -> Float[Tensor, "batch patches dim"]:
    """The inverse of split_areas."""
    size = math.isqrt(patches) // side
    return rearrange(x, "b (g h) (p q d) -> b (g p h q) d", g=side, h=side, p=size, q=size)


@on_cpu
def distance_bias(patches: int, heads: int) -> Float[Tensor, "heads patches patches"]:
    """Added to the scores of patches for each other: -slope * distance, in patches.

    Slopes fall by half from head to head, from 2; the last head's is 0. Attention starts as local
    averages, and learns the rest (ALiBi, Press et al., 2022, in two dimensions).
    """
    points = torch.cartesian_prod(*2 * [torch.arange(math.isqrt(patches))]).float().view(-1, 2)
    slopes = 2.0 * 0.5 ** torch.arange(heads)
    slopes[-1] = 0.0
    return -slopes[:, None, None] * torch.cdist(points, points)

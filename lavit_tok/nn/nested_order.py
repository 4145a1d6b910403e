"""One order of the patches for all images, of which every prefix covers the image evenly.

    rank of 16 patches    0  8  2 10     The code of rank i is that of one patch. The first code
                         12  4 14  6     covers the image, the first 4 a quarter each, the first 16
                          3 11  1  9     a sixteenth each. A rank has a cell: the square that it
                         15  7 13  5     covers when it is added, its patch in the first corner.

The numbers are those of the Bayer matrix. The level of a rank is how fine its cell is: rank 0 has
level 0, ranks 1-3 level 1, ranks 4-15 level 2; a cell of level l has 2^-l of the image's side. A
code attends to the patches of its own rank and later ones, most to those near its cell
(merge_bias); a patch attends to the codes whose cells are near it (read_bias). Both biases are
fixed numbers that are added to attention scores, as in ALiBi (Press et al., 2022), in two
dimensions and in units of a cell: attention starts as local averages, and learns the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lavit_tok.nn.precision import float32_default

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class NestedOrder:
    """The patch of every rank, and the cell that it covers."""

    patch: Int64[Tensor, " patches"]
    """Patch of every rank (raster index)."""
    rank: Int64[Tensor, " patches"]
    """Rank of every patch: the inverse."""
    level: Int64[Tensor, " patches"]
    """Level of every rank."""
    size: Float[Tensor, " patches"]
    """Side of every rank's cell, in patches."""
    center: Float[Tensor, "patches 2"]
    """Coordinates (y, x) of the middle of every rank's cell, in patches."""


def on_cpu(function: Callable[..., Result]) -> Callable[..., Result]:
    """Compute in float32 on the CPU, whatever the defaults; models are first built on meta."""

    @wraps(function)
    def wrapped(*args: Any) -> Result:
        with torch.device("cpu"), float32_default():
            return function(*args)

    return wrapped


@lru_cache(maxsize=8)
@on_cpu
def nested_order(patches: int) -> NestedOrder:
    """The order for a square number of patches.

    A side that is no power of two uses a part of the next larger matrix.

    Raises:
        ValueError: patches that form no square.
    """
    side = math.isqrt(patches)
    if side * side != patches or side == 0:
        raise ValueError(f"a nested order needs a square number of patches, got {patches}")
    bayer = torch.zeros(1, 1, dtype=torch.int64)
    while len(bayer) < side:
        bayer = torch.cat(
            [torch.cat([4 * bayer, 4 * bayer + 2], 1), torch.cat([4 * bayer + 3, 4 * bayer + 1], 1)]
        )
    number = bayer[:side, :side].flatten()
    patch = number.argsort()
    # Rank n has the level ceil(log4(n + 1)) in the whole matrix: 0 | 1 2 3 | 4 ... 15 | 16 ...
    level = torch.tensor([((int(n)).bit_length() + 1) // 2 for n in number[patch]])
    size = len(bayer) / 2.0**level
    corner = torch.stack([patch // side, patch % side], 1)
    return NestedOrder(patch, patch.argsort(), level, size, corner + (size[:, None] - 1) / 2)


@on_cpu
def _distances(patches: int) -> Float[Tensor, "ranks patches"]:
    """From the middle of every rank's cell to every patch, in sides of that cell."""
    order, side = nested_order(patches), math.isqrt(patches)
    points = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float().view(-1, 2)
    return torch.cdist(order.center, points) / order.size[:, None]


@on_cpu
def merge_bias(patches: int, heads: int) -> Float[Tensor, "heads ranks patches"]:
    """Added to the scores of rank i for patch p: -slope * distance; forbids earlier ranks.

    Slopes fall by half from head to head, from 4; the last head's is 0: it attends to all later
    patches alike.
    """
    later = nested_order(patches).rank[None, :] >= torch.arange(patches)[:, None]
    slopes = 4.0 * 0.5 ** torch.arange(heads)
    slopes[-1] = 0.0
    bias = -slopes[:, None, None] * _distances(patches)
    return bias.masked_fill(~later, float("-inf"))


@on_cpu
def read_bias(patches: int, heads: int) -> Float[Tensor, "heads patches ranks"]:
    """Added to the scores of patch p for rank j: -slope * distance + preference * level.

    Heads come in pairs of one slope, from 4 on down: the first of a pair treats all levels alike,
    the second prefers fine ones. The last head attends to all codes alike, since what is the same
    everywhere may be encoded by any of them.
    """
    pair, fine = torch.arange(heads) // 2, torch.arange(heads) % 2
    slopes, preference = 4.0 * 0.5**pair, 1.5 * fine
    slopes[-1] = preference[-1] = 0.0
    level = nested_order(patches).level.float()
    bias = -slopes[:, None, None] * _distances(patches) + preference[:, None, None] * level[:, None]
    return bias.transpose(1, 2).contiguous()

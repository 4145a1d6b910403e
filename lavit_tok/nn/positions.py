"""Positions of patches."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def grid_positions(patches: int, width: int) -> Float[Tensor, "patches width"]:
    """Sines and cosines of both coordinates, the initial value of learned positions.

    A quarter of the width each: sin(y w), cos(y w), sin(x w), cos(x w) of patch (y, x), with
    wavelengths from twice the side down to two patches.

    Raises:
        ValueError: a number of patches that is no square, or a width not divisible by 4.
    """
    side = math.isqrt(patches)
    if side * side != patches or width % 4:
        raise ValueError(
            "positions need a square number of patches and a width divisible by 4, got "
            f"{patches} and {width}"
        )
    falling = 1 - torch.arange(width // 4, dtype=torch.float32) / max(1, width // 4 - 1)
    frequency = math.pi * torch.exp(-math.log(max(2, side)) * falling)
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([wave.repeat_interleave(side, 0), wave.repeat(side, 1)], 1)

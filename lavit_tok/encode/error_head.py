"""Predict an image's error at every number of codes from its features, before it is encoded.

    features [b n d] -> mean and deviation of every channel, variance left within cells
                     -> MLP -> errors at 1, 2, 4, ... n codes, never rising
                     -> errors [b n] at every number of codes

Variance within cells is what an image loses when each cell is one color: most of its
rate-distortion curve. The MLP learns the rest from errors measured in training; its gradient stops
at the features. Between two powers of two the error is a straight line over log2 of the number of
codes.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.encode.rate_distortion import lower_hull
from lavit_tok.nn.nested_order import nested_order
from lavit_tok.nn.precision import KeepFloat32

LEAST = 1e-4
"""No error is predicted below this."""


class ErrorHead(KeepFloat32):
    """Features -> predicted errors, in float32 whatever the precision of the rest.

    Args:
        width: of the features.
        patches: of an image, a square number.
        hidden: width of the MLP.
    """

    weights: Tensor

    def __init__(self, width: int, patches: int, hidden: int = 128) -> None:
        super().__init__()
        self.points = len(doublings(patches))
        self.levels = max(1, math.isqrt(patches).bit_length() - 1)
        self.norm = nn.LayerNorm(2 * width + self.levels + 1)
        self.mlp = nn.Sequential(
            nn.Linear(2 * width + self.levels + 1, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            last := nn.Linear(hidden, self.points),
        )
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, -3.0)  # each doubling of the codes then saves .05
        self.register_buffer("weights", interpolation(patches), persistent=False)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch patches"]:
        """Predicted error with 1, 2, ... n codes, float32, never rising."""
        with torch.autocast(features.device.type, enabled=False):
            return self.at_points(summary(features.detach().float(), self.levels)) @ self.weights

    def at_points(self, values: Float[Tensor, "batch values"]) -> Float[Tensor, "batch points"]:
        """Predicted error with 1, 2, 4, ... n codes, from a summary of the features."""
        # The error with all codes, and what each halving of them adds
        steps = F.softplus(self.mlp(self.norm(values)))
        return LEAST + steps.flip(1).cumsum(1).flip(1)


def doublings(patches: int) -> list[int]:
    """1, 2, 4, ... and `patches` itself: the numbers of codes at which errors are predicted."""
    return [*(1 << i for i in range((patches - 1).bit_length())), patches]


def rank_log_odds(
    errors: Float[Tensor, "batch patches"] | None,
    price: float,
    shape: torch.Size,
    device: torch.device,
) -> Float[Tensor, "batch patches"]:
    """Log-odds of keeping each patch: log of what its code saves, less the log of the price.

    The first rank is always kept. Without predicted errors, the earlier a rank the higher.
    """
    batch, patches = shape
    odds = (30 - 20 * torch.arange(patches, dtype=torch.float32, device=device) / patches).expand(
        batch, -1
    )
    if errors is not None and patches > 1:
        hull = lower_hull(errors)
        gains = (hull[:, :-1] - hull[:, 1:]).clamp(min=1e-12).log() - math.log(max(price, 1e-12))
        odds = torch.cat([odds[:, :1], gains.clamp(-30, 29).float()], 1)
    return odds[:, nested_order(patches).rank.to(device)]


def summary(
    features: Float[Tensor, "batch patches width"], levels: int
) -> Float[Tensor, "batch values"]:
    """Mean, deviation, and log of the variance within cells of 1 / 2^l of the side, l = 0, 1, ...

    A side that 2^l does not divide has cells of the next smaller whole number of patches; the rest
    is left out.
    """
    side = math.isqrt(features.shape[1])
    square = rearrange(features, "b (r c) d -> b d r c", r=side)
    within = []
    for level in range(levels + 1):
        cell = max(1, side >> level)
        if cell == 1:  # a single patch has no variance: differences of neighbors in its position
            differences = (square.diff(dim=2), square.diff(dim=3))
            parts = [d.square().mean((1, 2, 3)) for d in differences if d.numel()]
            within.append(torch.stack(parts).mean(0) if parts else square.new_zeros(len(square)))
            continue
        whole = square[:, :, : side // cell * cell, : side // cell * cell]
        means = F.avg_pool2d(whole, cell).square().mean((1, 2, 3))
        within.append(whole.square().mean((1, 2, 3)) - means)
    logs = torch.stack(within, 1).clamp(min=1e-6).log()
    return torch.cat([features.mean(1), features.std(1, correction=0), logs], 1)


def interpolation(patches: int) -> Float[Tensor, "points patches"]:
    """Weights of the values at 1, 2, 4, ... n codes in the value at 1, 2, 3, ... n codes.

    For n = 4:

    codes      1  2  3    4
    point 1    1  .  .    .
    point 2    .  1  .42  .        3 codes: log2(3) - 1 = .58 of the way from 2 to 4
    point 4    .  .  .58  1
    """
    position = torch.arange(1, patches + 1).double().log2()
    grid = torch.tensor(doublings(patches), dtype=torch.float64).log2()
    points = len(grid)
    right = torch.searchsorted(grid, position).clamp(max=points - 1)
    left = (right - 1).clamp(min=0)
    gap = (grid[right] - grid[left]).clamp(min=1e-12)
    ratio = torch.where(right == left, 1.0, ((position - grid[left]) / gap).clamp(0, 1))
    weights = torch.zeros(points, patches, dtype=torch.float64)
    columns = torch.arange(patches)
    weights[left, columns] += 1 - ratio
    weights[right, columns] += ratio
    return weights.float()

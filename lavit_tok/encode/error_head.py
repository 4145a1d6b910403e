"""Predict an image's error at every number of codes, from features and residual errors.

    features [b n d] -> mean and deviation of every channel, variance within cells --.
    residual errors of 1, 2, 3, ... codes [b m]; of 1, 4 and 16 codes ---------------+-> MLP
    -> errors [b m], non-increasing

The residual error of the first k codes is the squared distance of the patches' vectors to the sum
of the entries (nested_quantizer.py), which is computed with the codes. How it relates to the error
of the reconstruction depends on the image: the MLP learns that from errors measured in training;
its gradient stops at the features. A prediction for k codes depends on the first k codes only.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.encode.rate_distortion import lower_hull
from lavit_tok.nn.nested_order import nested_order
from lavit_tok.nn.precision import KeepFloat32

LEAST = 1e-4
"""No error is predicted below this; smaller distances count as this one."""
EARLIER = (1, 4, 16)
"""Numbers of codes whose distances are inputs of every later prediction."""


class ErrorHead(KeepFloat32):
    """Features and distances -> predicted errors, in float32 whatever the precision of the rest.

    Args:
        width: of the features.
        patches: of an image, a square number.
        hidden: width of the MLP.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, patches: int, hidden: int = 128) -> None:
        super().__init__()
        self.patches = patches
        self.levels = max(1, math.isqrt(patches).bit_length() - 1)
        inputs = 2 * width + self.levels + 1
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        self.image = nn.Linear(inputs, hidden)
        self.count = nn.Linear(5 + len(EARLIER), hidden, bias=False)
        self.mlp = nn.Sequential(
            nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), last := nn.Linear(hidden, 1)
        )
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(0.2))

    def forward(
        self,
        features: Float[Tensor, "batch patches width"],
        left: Float[Tensor, "batch most"],
        values: Float[Tensor, "batch inputs"] | None = None,
    ) -> Float[Tensor, "batch most"]:
        """Predicted error with 1, 2, 3, ... codes, float32, non-increasing.

        Args:
            features: of the encoder.
            left: residual errors of these numbers of codes, from NestedQuantizer.encode.
            values: `summary` of the features, if it is known.
        """
        with torch.autocast(features.device.type, enabled=False):
            counts = torch.arange(1, left.shape[1] + 1, device=left.device)
            if values is None:
                values = self.summary(features)
            return self.at(values, left.float(), counts).cummin(1).values

    def summary(
        self, features: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch inputs"]:
        """What the head reads of the features; the same for all heads of a tokenizer."""
        return summary(features.detach().float(), self.levels)

    def at(
        self,
        values: Float[Tensor, "batch inputs"],
        left: Float[Tensor, "batch most"],
        counts: Int64[Tensor, " points"],
    ) -> Float[Tensor, "batch points"]:
        """Predicted errors with some numbers of codes.

        Args:
            values: summary of the features.
            left: residual errors of 1, 2, 3, ... codes.
            counts: numbers of codes, from 1 to `most`.
        """
        image = self.image((values - self.mean) / self.deviation)
        position = counts.float().log2() / max(1.0, math.log2(self.patches)) * math.pi
        waves = [position, position.sin(), position.cos(), (2 * position).sin()]
        logs = left.clamp(min=LEAST).log()
        earlier = [counts.clamp(max=count) for count in EARLIER]
        distances = torch.stack([logs[:, i - 1] for i in (counts, *earlier)], -1)
        point = self.count(
            torch.cat([torch.stack(waves, -1).expand(len(left), -1, -1), distances], -1)
        )
        return LEAST + self.mlp(image[:, None] + point)[..., 0].exp()


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
    within: list[Tensor] = []
    energies: dict[int, Tensor] = {}  # by the side of what is not left out
    for level in range(levels + 1):
        cell = max(1, side >> level)
        if cell == 1:  # a single patch has no variance: differences of neighbors in its position
            differences = (square.diff(dim=2), square.diff(dim=3))
            parts = [d.square().mean((1, 2, 3)) for d in differences if d.numel()]
            within.append(torch.stack(parts).mean(0) if parts else square.new_zeros(len(square)))
            continue
        whole = square[:, :, : (size := side // cell * cell), :size]
        if size not in energies:
            energies[size] = whole.square().mean((1, 2, 3))
        within.append(energies[size] - F.avg_pool2d(whole, cell).square().mean((1, 2, 3)))
    logs = torch.stack(within, 1).clamp(min=1e-6).log()
    # In float64, as std() does, but in half of its time on a CPU or less
    centered = features.to(torch.float64, copy=True)
    centered.sub_(centered.mean(1, keepdim=True))
    deviation = centered.square_().mean(1).sqrt().float()
    return torch.cat([features.mean(1), deviation, logs], 1)

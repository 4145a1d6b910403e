"""FeatureDiscriminator: does a map of a frozen network belong to a true image or a decoded one?

    maps of a frozen network [b c h w] -> 1x1, 3x3, 1x1 convolutions, for each map -> logits [b h w]

Small heads on the maps of a frozen network learn faster than a discriminator of pixels (Sauer et
al., 2021, "Projected GANs Converge Faster"). The losses compare a decoded image with the true image
of the same codes, position by position (Jolicoeur-Martineau, 2018, the relativistic loss):

    discriminator   softplus(D(decoded) - D(true))
    decoder         softplus(D(true) - D(decoded))

Weights have spectral norm 1 (Miyato et al., 2018), which bounds the slope of D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class FeatureDiscriminator(nn.Module):
    """One head for each map.

    Args:
        channels: of the maps.
        width: of the hidden states of each head.
    """

    def __init__(self, channels: Sequence[int], width: int = 32) -> None:
        super().__init__()
        self.heads: Any = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(count, width, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 1, 1)),
            )
            for count in channels
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Float[Tensor, "batch 1 h w"]]:
        """Logits for every map, larger for true images."""
        return [head(x).float() for head, x in zip(self.heads, maps, strict=True)]

    def losses(
        self, true: Sequence[Tensor], decoded: Sequence[Tensor]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Loss of the decoder and loss of the discriminator, means over maps and positions.

        The first has gradients of `decoded` only, the second of the discriminator's weights only,
        so that their sum can be minimized in one step.

        Args:
            true: maps [n c h w] of true images.
            decoded: maps [k * n c h w] of k decoded images for each; image i is of i modulo n.
        """
        times = len(decoded[0]) // len(true[0])
        self.requires_grad_(False)
        of_decoder = self(decoded)
        self.requires_grad_(True)
        of_true, of_decoded = self(true), self([x.detach() for x in decoded])
        repeated = [x.repeat(times, 1, 1, 1) for x in of_true]
        return (
            _relativistic([x.detach() for x in repeated], of_decoder),
            _relativistic(of_decoded, repeated),
        )


def _relativistic(worse: Sequence[Tensor], better: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Mean of softplus(worse - better) over maps and positions."""
    pairs = zip(worse, better, strict=True)
    return torch.stack([F.softplus(w - b).mean() for w, b in pairs]).mean()

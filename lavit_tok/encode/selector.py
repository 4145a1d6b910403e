"""Room 3: features -> keep or drop. How many patches an image keeps depends on the image.

    [b n d] -> log-probabilities [b n 2], index 0 keep, index 1 drop -> bool [b n]

LaVIT (ICLR 2024), section 3.1: half of the channels stay local, half become their mean over the image, so that each
patch is judged against the whole picture.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.nn.precision import KeepFloat32

KEEP, DROP = 0, 1


class Selector(KeepFloat32):
    """LayerNorm, Linear, GELU; global half; Linear, GELU, Linear, GELU, Linear; log-softmax. Stays in float32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(width, eps), nn.Linear(width, width), nn.GELU())
        sizes = (width, width // 2, width // 4)
        self.judge = nn.Sequential(
            nn.Linear(sizes[0], sizes[1]),
            nn.GELU(),
            nn.Linear(sizes[1], sizes[2]),
            nn.GELU(),
            nn.Linear(sizes[2], 2),
        )

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch patches 2"]:
        with torch.autocast(features.device.type, enabled=False):
            x = self.local(features.to(next(self.judge.parameters()).dtype))
            own, shared = x.chunk(2, dim=-1)
            x = torch.cat([own, shared.mean(1, keepdim=True).expand_as(shared)], dim=-1)
            return F.log_softmax(self.judge(x).float(), dim=-1)

    @torch.no_grad()
    def shift(self, amount: float) -> None:
        """Add a number to every keep score (log p_keep - log p_drop)."""
        last = self.judge[-1]
        assert isinstance(last, nn.Linear)
        bias = last.bias
        bias[KEEP] += amount / 2
        bias[DROP] -= amount / 2


def keep_scores(log_probs: Float[Tensor, "batch patches 2"]) -> Float[Tensor, "batch patches"]:
    """log p_keep - log p_drop: above 0 a patch is kept."""
    return log_probs[..., KEEP] - log_probs[..., DROP]

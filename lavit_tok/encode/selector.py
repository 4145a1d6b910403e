"""Patch features -> log-probabilities of keeping and dropping each patch.

    [b n d] -> [b n 2], index 0 keep, index 1 drop

LaVIT (ICLR 2024), section 3.1: half of the channels stay local, half are replaced by their mean
over the image, so that each patch is judged relative to the whole image.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.nn.precision import KeepFloat32, float32_default

KEEP, DROP = 0, 1


class Selector(KeepFloat32):
    """LayerNorm, Linear, GELU; mean of half the channels; two Linear + GELU, Linear; log-softmax.

    Args:
        width: d, dimension of the features, a multiple of 4.
        eps: epsilon of the LayerNorm.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        with float32_default():
            self.local = nn.Sequential(nn.LayerNorm(width, eps), nn.Linear(width, width), nn.GELU())
            first, second = nn.Linear(width, half), nn.Linear(half, quarter)
            self.judge = nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Linear(quarter, 2))

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch patches 2"]:
        """Log-probabilities in float32, whatever the dtype of the features and autocast."""
        # Near-ties are decided here: bfloat16 would change which patches are kept.
        with torch.autocast(features.device.type, enabled=False):
            x = self.local(features.to(next(self.judge.parameters()).dtype))
            local, shared = x.chunk(2, dim=-1)
            x = torch.cat([local, shared.mean(1, keepdim=True).expand_as(shared)], dim=-1)
            return F.log_softmax(self.judge(x).float(), dim=-1)

    @torch.no_grad()
    def shift(self, amount: float) -> None:
        """Add a constant to every keep score (log p_keep - log p_drop)."""
        last = self.judge[-1]
        assert isinstance(last, nn.Linear)
        last.bias[KEEP] += amount / 2
        last.bias[DROP] -= amount / 2


def keep_scores(log_probs: Float[Tensor, "batch patches 2"]) -> Float[Tensor, "batch patches"]:
    """The logits of keeping a patch, log p_keep - log p_drop; above 0 the patch is kept."""
    return log_probs[..., KEEP] - log_probs[..., DROP]

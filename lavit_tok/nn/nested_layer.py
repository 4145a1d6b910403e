"""The layer of the merger and the reconstructor of nested codes: attention with biases."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.nn.attention import Attention


def attend_biased(attention: Attention, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
    """One attention with numbers added to its scores; minus infinity forbids a key."""
    q = attention.split(attention.query(x))
    k, v = (attention.split(projection(context)) for projection in (attention.key, attention.value))
    out = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))
    return attention.out(out.transpose(1, 2).flatten(2))


class NestedLayer(nn.Module):
    """x += self-attention; x += cross-attention; x += MLP, each after a LayerNorm.

    Either attention may be left out (`own`, `cross`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        eps: float,
        own: bool = True,
        cross: bool = True,
    ) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width, eps) if own else None
        self.self_attention = Attention(width, heads) if own else None
        self.norm_cross = nn.LayerNorm(width, eps) if cross else None
        self.cross_attention = Attention(width, heads) if cross else None
        self.norm_mlp = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width)
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        own_bias: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if self.self_attention is not None and self.norm_self is not None:
            y = self.norm_self(x)
            x = x + attend_biased(self.self_attention, y, y, own_bias)
        if self.cross_attention is not None and self.norm_cross is not None:
            assert context is not None
            x = x + attend_biased(self.cross_attention, self.norm_cross(x), context, bias)
        return x + self.mlp(self.norm_mlp(x))

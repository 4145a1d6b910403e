"""Masked multi-head attention, and the block that merger and reconstructor are built of.

A *policy* p in 0..1 of each (query, key) pair is whether the query may attend to the key. Two
formulas turn scores a and a policy into weights (LaVIT, public release; n is the number of keys):

    strict   w = exp(min(a - m, 30)) * p / sum(exp(min(a - m, 30)) * p)
             m = max of a over allowed keys, without gradient
    compat   w = (exp(a - max(a)) * p + eps / n) / (sum(exp(a - max(a)) * p) + eps),  eps = 1e-6

`strict` gives a forbidden key (p = 0) exactly no weight, but keeps the gradient with respect to p,
from which a straight-through keep decision learns. With a bool policy the same numbers come from
the fused `scaled_dot_product_attention`. `compat` is the formula that the released weights were
trained with: its maximum includes forbidden keys, so that a forbidden key with a large score leaks
weight to every key.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6
EXPONENT_CAP = 30.0  # exp(30) is far below float32's maximum; only forbidden keys can reach it
SCORES = 2**22  # scores computed at a time without a fused kernel: 16 MB, about a cache size
Formula = Literal["strict", "compat"]


def attend(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys dim"],
    policy: Float[Tensor, "#batch #heads #queries keys"]
    | Bool[Tensor, "#batch #heads #queries keys"]
    | None = None,
    formula: Formula = "strict",
) -> Float[Tensor, "batch heads queries dim"]:
    """Attention under a policy; None allows all keys.

    A query without any allowed key gives zeros under strict, the mean of all values under compat.
    """
    if policy is None:
        return _fused(q, k, v, None)
    if formula == "strict" and policy.dtype == torch.bool:
        # Softmax over -inf only would be NaN: such queries attend to all keys and become zero.
        empty = ~policy.any(-1, keepdim=True)
        return _fused(q, k, v, policy | empty).masked_fill(empty, 0)
    batch, heads, queries, _ = q.shape
    step = max(1, SCORES // max(1, heads * queries * k.shape[2]))
    if batch > step and not torch.is_grad_enabled():  # same results with less memory
        policies = policy.expand(batch, -1, -1, -1).split(step)
        parts = zip(q.split(step), k.split(step), v.split(step), policies, strict=True)
        return torch.cat([attend(*part, formula) for part in parts])
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return masked_softmax(scores.float(), policy.float(), formula).to(v.dtype) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    dtype = q.dtype
    if q.device.type == "cpu" and q.requires_grad and dtype == torch.bfloat16:
        # The CPU kernel's backward pass takes about 1.5 times as long in bfloat16 as in float32.
        q, k, v = q.float(), k.float(), v.float()
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask).to(dtype)


def masked_softmax(
    scores: Float[Tensor, "batch heads queries keys"],
    policy: Float[Tensor, "#batch #heads #queries keys"],
    formula: Formula,
) -> Float[Tensor, "batch heads queries keys"]:
    """The two formulas of the module docstring, in float32."""
    if formula == "compat":
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * policy
        return (weights + EPS / scores.shape[-1]) / (weights.sum(-1, keepdim=True) + EPS)
    allowed = policy.detach() > 0
    top = scores.detach().masked_fill(~allowed, float("-inf")).amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0)  # queries without allowed keys
    # The cap comes before the product with p: inf * 0 would be NaN for a forbidden key.
    weights = (scores - top).clamp(max=EXPONENT_CAP).exp() * policy
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(~allowed.any(-1, keepdim=True), 1)


class Attention(nn.Module):
    """Multi-head attention: keys and values of the same sequence (self) or another one (cross)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def split(self, x: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch heads n dim"]:
        """Split the width into heads."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def forward(
        self,
        x: Float[Tensor, "batch queries width"],
        context: Float[Tensor, "batch keys width"] | None = None,
        policy: Tensor | None = None,
        formula: Formula = "strict",
        bias: Float[Tensor, "#heads queries keys"] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """Attend from x to the context, or to x itself.

        Policy and formula as in `attend`; in place of a policy, `bias` is added to the scores.
        """
        context = x if context is None else context
        q, k, v = (self.split(y) for y in (self.query(x), self.key(context), self.value(context)))
        out = attend(q, k, v, policy, formula) if bias is None else _fused(q, k, v, bias)
        return self.out(rearrange(out, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """x += self-attention; x += cross-attention to a context; x += MLP; LayerNorm before each."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width, eps)
        self.self_attention = Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width, eps)
        self.cross_attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width, eps)
        expand, contract = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.mlp = nn.Sequential(expand, nn.GELU(), contract)

    def forward(
        self,
        x: Float[Tensor, "batch n width"],
        context: Float[Tensor, "batch keys width"],
        self_policy: Tensor | None,
        cross_policy: Tensor | None,
        formula: Formula = "strict",
    ) -> Float[Tensor, "batch n width"]:
        """One block; the policies are [b 1 n n] and [b 1 n keys] or broadcast to them."""
        x = x + self.self_attention(self.norm_self(x), policy=self_policy, formula=formula)
        x = x + self.cross_attention(self.norm_cross(x), context, cross_policy, formula)
        return x + self.mlp(self.norm_mlp(x))

"""Merger of nested codes: features of all patches -> merged vectors in the nested order.

The code of rank i attends to ranks 0..i, then to the patches of rank i and later (it absorbs them).
No code depends on how many follow, so a shorter encoding is a prefix of a longer one. With n = 4
patches whose ranks are 0 2 3 1:

    cross-attention   patch  0 1 2 3      self-attention   rank  0 1 2 3
    code 0                   x x x x      code 0                 x . . .
    code 1                   . x x x      code 1                 x x . .
    code 2                   . x x .      code 2                 x x x .
    code 3                   . . x .      code 3                 x x x x

Compared with merger.py (LaVIT), where kept patches absorb those dropped at this budget: absorbing
by rank costs nothing measurable, and codes can be cut afterwards (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lavit_tok.nn.nested_layer import NestedLayer
from lavit_tok.nn.nested_order import merge_bias, nested_order
from lavit_tok.nn.positions import grid_positions


class NestedMerger(nn.Module):
    """Features -> merged vectors of the first `count` ranks, [b count d]."""

    bias: Tensor
    causal: Tensor
    patch: Tensor

    def __init__(
        self, width: int, patches: int, depth: int, heads: int, mlp_width: int, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width, eps)
        self.position = nn.Parameter(grid_positions(patches, width))
        self.layers: Any = nn.ModuleList(
            NestedLayer(width, heads, mlp_width, eps) for _ in range(depth)
        )
        self.norm_out = nn.LayerNorm(width, eps)
        self.register_buffer("bias", merge_bias(patches, heads), persistent=False)
        causal = torch.full((patches, patches), float("-inf")).triu(1)
        self.register_buffer("causal", causal, persistent=False)
        self.register_buffer("patch", nested_order(patches).patch, persistent=False)

    def forward(
        self, features: Float[Tensor, "batch patches width"], count: int
    ) -> Float[Tensor, "batch count width"]:
        context = self.norm_in(features) + self.position
        x = context[:, self.patch[:count]]
        for layer in self.layers:
            x = layer(x, context, self.causal[:count, :count], self.bias[:, :count])
        return self.norm_out(x)

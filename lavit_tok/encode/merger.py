"""Room 4: the kept patches absorb the dropped ones.

The kept rows of the features, as they are, enter the first block. In each block they look at the kept patches before
them (raster order) and themselves, then at the dropped patches of LayerNorm(features), then pass an MLP. With n = 5
patches of which 0, 2 and 3 are kept (k) and 1 and 4 dropped:

    self-attention     key  0 1 2 3 4        cross-attention     key  0 1 2 3 4
    query 0 (k)             x . . . .        query 0 (k)              . x . . x
    query 2 (k)             x . x . .        query 2 (k)              . x . . x
    query 3 (k)             x . x x .        query 3 (k)              . x . . x

With `patches` given, places are told: LayerNorm(features) + position[patch] enters the first block and is what the
queries look at. The reconstructor knows a code by its rank only, so a code must say itself where it stands; features of
large pretrained encoders tell, those of a small one may not (docs/log.md).

Cost: in strict mode only kept rows and only the keys they may see are computed; compat and training compute all rows.
Source: LaVIT (ICLR 2024), section 3.1, and the formulas of attention.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.codes import RaggedLayout
from lavit_tok.nn.attention import Attention, Block, Formula


def grid_positions(patches: int, width: int) -> Float[Tensor, "patches width"]:
    """Sines and cosines of row and column, as learned positions start: near patches are alike.

    A quarter of the width each: sin(row w), cos(row w), sin(column w), cos(column w), with wavelengths from twice the
    side down to two patches. Raises ValueError for patches that form no square, or a width that is no multiple of 4.
    """
    side = math.isqrt(patches)
    if side * side != patches or width % 4:
        raise ValueError(
            f"positions need a square number of patches and a width of 4 k, got {patches} and {width}"
        )
    falling = 1 - torch.arange(width // 4) / max(1, width // 4 - 1)
    frequency = math.pi * torch.exp(-math.log(max(2, side)) * falling)
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([wave.repeat_interleave(side, 0), wave.repeat(side, 1)], 1)


def self_policy(policy: Tensor) -> Tensor:
    """[b n] keep policy -> [b 1 n n]: earlier kept patches, and always the patch itself. Bool in, bool out."""
    n = policy.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=policy.device).tril(-1)
    eye = torch.eye(n, dtype=torch.bool, device=policy.device)
    if policy.dtype == torch.bool:
        return ((policy[:, None, :] & causal) | eye)[:, None]
    return (policy[:, None, :] * causal + eye)[:, None]


def cross_policy(policy: Tensor) -> Tensor:
    """[b n] keep policy -> [b 1 1 n]: the dropped patches."""
    return (~policy if policy.dtype == torch.bool else 1 - policy)[:, None, None, :]


class Merger(nn.Module):
    """Blocks over the kept patches, keys and values of the cross-attention from LayerNorm(all features).

    Args:
        patches: of an image, n, a square number; gives every patch a learned position. None as published.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        eps: float,
        formula: Formula,
        patches: int | None = None,
    ) -> None:
        super().__init__()
        self.formula: Formula = formula
        self.norm_in = nn.LayerNorm(width, eps)
        self.position = None if patches is None else nn.Parameter(grid_positions(patches, width))
        self.blocks: Any = nn.ModuleList(Block(width, heads, mlp_width, eps) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, eps)

    def forward(
        self, features: Float[Tensor, "batch patches width"], keep: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "total width"]:
        """Merged kept rows, raster order, images one after another."""
        if self.formula == "compat":
            return self.dense(features, keep)[keep]
        return self._ragged(features, keep)

    def enter(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch patches width"], Float[Tensor, "batch patches width"]]:
        """(what enters the first block, what the queries look at), of all patches."""
        context = self.norm_in(features)
        if self.position is None:
            return features, context
        context = context + self.position
        return context, context

    def dense(
        self, features: Float[Tensor, "batch patches width"], policy: Tensor
    ) -> Float[Tensor, "batch patches width"]:
        """Every row as if it were kept, under a bool or straight-through float policy [b n]; differentiable in it."""
        x, context = self.enter(features)
        own, other = self_policy(policy), cross_policy(policy)
        for block in self.blocks:
            x = block(x, context, own, other, self.formula)
        return self.norm_out(x)

    def _ragged(
        self, features: Float[Tensor, "batch patches width"], keep: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "total width"]:
        """Strict, kept rows only: linear layers see rows one after another, attention sees them padded.

        What all blocks share (places of rows, masks) is worked out once: for small models the many small steps around
        the matrix products would otherwise cost as much as the arithmetic (benchmarks/encode_speed.py).
        """
        kept, dropped = RaggedLayout.of(keep), RaggedLayout.of(~keep)
        flat = keep.flatten()
        taken, left = flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1)
        if self.position is None:
            rows = features.flatten(0, 1)
            x, context = rows.index_select(0, taken), self.norm_in(rows.index_select(0, left))
        else:
            rows = self.enter(features)[0].flatten(0, 1)
            x, context = rows.index_select(0, taken), rows.index_select(0, left)
        bias, blind = _cross_mask(dropped, kept, x.dtype)
        for block in self.blocks:
            attention = block.self_attention
            x = x + _rows(attention, block.norm_self(x), None, kept, kept, causal=True)
            if dropped.width:
                look = _rows(
                    block.cross_attention, block.norm_cross(x), context, kept, dropped, bias, blind
                )
                x = x + look
            else:  # an empty sum of values, then the output projection's bias: as dense gives it
                x = x + block.cross_attention.out.bias
            x = x + block.mlp(block.norm_mlp(x))
        return self.norm_out(x)


def _cross_mask(
    dropped: RaggedLayout, kept: RaggedLayout, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What the kept rows see of the padded dropped rows, made once for all blocks.

    Returns: the additive mask [b 1 1 m], None where no slot is free; and bool [total 1], True for kept rows of images
    with nothing dropped (a row of -inf only would be NaN: they see all slots and are zeroed after), None for none.
    """
    if dropped.full:
        return None, None
    nothing = dropped.lengths == 0
    bias = torch.zeros(dropped.mask.shape, dtype=dtype, device=dropped.mask.device)
    bias = bias.masked_fill_(~(dropped.mask | nothing[:, None]), float("-inf"))[:, None, None, :]
    return bias, nothing.repeat_interleave(kept.lengths)[:, None] if bool(nothing.any()) else None


def _rows(
    attention: Attention,
    x: Tensor,
    context: Tensor | None,
    layout: RaggedLayout,
    keys: RaggedLayout,
    bias: Tensor | None = None,
    blind: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """One attention over ragged rows. Free slots at the end of a sequence are never seen by a causal or masked row."""
    context = x if context is None else context
    q = attention.split(layout.spread(attention.query(x)))
    k = attention.split(keys.spread(attention.key(context)))
    v = attention.split(keys.spread(attention.value(context)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    rows = layout.unpad(out.transpose(1, 2).flatten(2))
    return attention.out(rows if blind is None else rows.masked_fill(blind, 0))

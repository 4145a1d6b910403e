"""Kept patches absorb the information of the dropped ones.

The features of the kept patches enter the first block unchanged. In each block they attend to the
kept patches before them (raster order) and themselves, then to the dropped patches of
LayerNorm(features), then pass an MLP. With n = 5 patches, 0, 2 and 3 kept (k) and 1 and 4 dropped:

    self-attention     key  0 1 2 3 4        cross-attention     key  0 1 2 3 4
    query 0 (k)             x . . . .        query 0 (k)              . x . . x
    query 2 (k)             x . x . .        query 2 (k)              . x . . x
    query 3 (k)             x . x x .        query 3 (k)              . x . . x

With `patches` given, positions are added: LayerNorm(features) + position[patch] enters the first
block and is what the queries attend to. The reconstructor gets only the order of the codes, so a
code itself must contain its position; features of large pretrained encoders do, those of a small
one may not (docs/log.md).

Cost: strict inference computes only kept patches and the keys they may attend to; compat and
training compute all patches. Source: LaVIT (ICLR 2024), section 3.1, and the formulas of
nn/attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.codes import RaggedLayout
from lavit_tok.nn.attention import Attention, Block, Formula
from lavit_tok.nn.positions import grid_positions


class Merger(nn.Module):
    """Blocks over the kept patches; cross-attention to LayerNorm(features of dropped patches).

    Args:
        width: d, dimension of the features.
        depth: number of blocks.
        heads: attention heads.
        mlp_width: intermediate size of the MLPs.
        eps: epsilon of the LayerNorms.
        formula: how attention is masked, see nn/attention.py.
        patches: n, a square number, to learn a position per patch; None for no positions, as
            published.
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
        """Merged features of the kept patches, in raster order, images concatenated."""
        if self.formula == "compat":  # forbidden keys have a weight there, so all are needed
            return self.dense(features, keep)[keep]
        return self._ragged(features, keep)

    def dense(
        self, features: Float[Tensor, "batch patches width"], policy: Tensor
    ) -> Float[Tensor, "batch patches width"]:
        """Compute every patch as if it were kept, differentiably in the policy.

        Args:
            features: of all patches.
            policy: keep decision [b n], bool or straight-through float.
        """
        x, context = self._inputs(features)
        own, other = self_policy(policy), cross_policy(policy)
        for block in self.blocks:
            x = block(x, context, own, other, self.formula)
        return self.norm_out(x)

    def _inputs(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(input of the first block, keys and values of the cross-attention), of all patches."""
        context = self.norm_in(features)
        if self.position is None:
            return features, context
        context = context + self.position
        return context, context

    def _ragged(
        self, features: Float[Tensor, "batch patches width"], keep: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "total width"]:
        """Strict inference: linear layers on concatenated kept patches, attention on padded ones.

        Layouts and masks are computed once for all blocks: in small models they would otherwise
        cost as much as the matrix products.
        """
        kept, dropped = RaggedLayout.of(keep), RaggedLayout.of(~keep)
        flat = keep.flatten()
        kept_index, dropped_index = flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1)
        if self.position is None:  # normalize only the dropped patches
            items = features.flatten(0, 1)
            x = items.index_select(0, kept_index)
            context = self.norm_in(items.index_select(0, dropped_index))
        else:
            items = self._inputs(features)[0].flatten(0, 1)
            x, context = (items.index_select(0, index) for index in (kept_index, dropped_index))
        bias, without_keys = _cross_mask(dropped, kept, x.dtype)
        for block in self.blocks:
            own, cross = block.self_attention, block.cross_attention
            x = x + _attend(own, block.norm_self(x), None, kept, kept, causal=True)
            if dropped.width:
                query = block.norm_cross(x)
                x = x + _attend(cross, query, context, kept, dropped, bias, without_keys)
            else:  # an empty sum of values, then the bias of the output projection, as in dense
                x = x + cross.out.bias
            x = x + block.mlp(block.norm_mlp(x))
        return self.norm_out(x)


def self_policy(policy: Tensor) -> Tensor:
    """[b n] keep policy -> [b 1 n n]: earlier kept patches and the patch itself; same dtype."""
    n = policy.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=policy.device).tril(-1)
    eye = torch.eye(n, dtype=torch.bool, device=policy.device)
    if policy.dtype == torch.bool:
        return ((policy[:, None, :] & causal) | eye)[:, None]
    return (policy[:, None, :] * causal + eye)[:, None]


def cross_policy(policy: Tensor) -> Tensor:
    """[b n] keep policy -> [b 1 1 n]: the dropped patches."""
    return (~policy if policy.dtype == torch.bool else 1 - policy)[:, None, None, :]


def _cross_mask(
    dropped: RaggedLayout, kept: RaggedLayout, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The mask of padded dropped patches, shared by all blocks.

    Returns:
        The additive mask [b 1 1 m], None if nothing is padded; and bool [total 1], True for kept
        patches of images without any dropped patch, None if there are none. Softmax over -inf only
        would be NaN: such queries attend to the padding and their output is set to zero.
    """
    if dropped.full:
        return None, None
    empty = dropped.lengths == 0
    bias = torch.zeros(dropped.mask.shape, dtype=dtype, device=dropped.mask.device)
    bias = bias.masked_fill_(~(dropped.mask | empty[:, None]), float("-inf"))[:, None, None, :]
    return bias, empty.repeat_interleave(kept.lengths)[:, None] if bool(empty.any()) else None


def _attend(
    attention: Attention,
    x: Tensor,
    context: Tensor | None,
    queries: RaggedLayout,
    keys: RaggedLayout,
    bias: Tensor | None = None,
    without_keys: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """One attention over ragged items [total d]; causal or `bias` masks exclude the padding."""
    context = x if context is None else context
    q = attention.split(queries.spread(attention.query(x)))
    k = attention.split(keys.spread(attention.key(context)))
    v = attention.split(keys.spread(attention.value(context)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    items = queries.unpad(out.transpose(1, 2).flatten(2))
    return attention.out(items if without_keys is None else items.masked_fill(without_keys, 0))

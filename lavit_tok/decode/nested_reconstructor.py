"""Reconstructor of nested codes: an image's first k codes -> features and colors of its patches.

    codebook entries [b m c] -> Linear + position of the rank -> attend to each other -> keys
    position of the patch + number of codes -> n queries -> cross-attention and MLP
                                                -> features [b n d], colors [b n p]

Queries do not attend to each other, so that some patches can be reconstructed without the others;
training does so. A rank means a position, which the biases of the cross-attention encode
(nn/nested_order.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lavit_tok.codes import RaggedLayout
from lavit_tok.nn.nested_layer import NestedLayer
from lavit_tok.nn.nested_order import nested_order, read_bias
from lavit_tok.nn.positions import grid_positions


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction of some or all patches."""

    features: Float[Tensor, "batch patches width"]
    """The encoder's features."""
    colors: Float[Tensor, "batch patches out"]
    """Mean colors of the cells of every patch, in 0..1, ordered color, y, x
    (efficientnet.patch_colors)."""

    @property
    def joined(self) -> Float[Tensor, "batch patches joined"]:
        """Condition of a pixel decoder: the features, then the colors from -1 to 1."""
        return torch.cat([self.features, 2 * self.colors.to(self.features.dtype) - 1], -1)


class NestedReconstructor(nn.Module):
    """The first k codes of every image -> features and colors of its patches.

    Args:
        width: of the features and of all layers.
        patches: of an image, a square number.
        code_dim: width of a codebook entry.
        depth: layers of the patches' queries.
        heads: attention heads.
        mlp_width: hidden width of every MLP.
        eps: of the LayerNorms.
        colors: outputs of the color head, 3 * cells * cells; 0 for none.
        code_depth: layers over the codes.
    """

    bias: Tensor

    def __init__(
        self,
        width: int,
        patches: int,
        code_dim: int,
        depth: int,
        heads: int,
        mlp_width: int,
        eps: float = 1e-5,
        colors: int = 48,
        code_depth: int = 1,
    ) -> None:
        super().__init__()
        order = nested_order(patches)
        positions = grid_positions(patches, width)
        self.project_in = nn.Linear(code_dim, width)
        self.position = nn.Parameter(positions[order.patch].clone())
        self.queries = nn.Parameter(positions)
        self.count = nn.Linear(8, width)
        self.code_layers: Any = nn.ModuleList(
            NestedLayer(width, heads, mlp_width, eps, cross=False) for _ in range(code_depth)
        )
        self.norm_codes = nn.LayerNorm(width, eps)
        self.layers: Any = nn.ModuleList(
            NestedLayer(width, heads, mlp_width, eps, own=False) for _ in range(depth)
        )
        self.norm_out = nn.LayerNorm(width, eps)
        self.project_out = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)
        )
        self.colors = nn.Linear(width, colors) if colors else None
        self.register_buffer("bias", read_bias(patches, heads), persistent=False)

    def ragged(
        self, vectors: Float[Tensor, "total code_dim"], layout: RaggedLayout
    ) -> Reconstruction:
        """Forward for all patches, from the codebook entries of all images one after another."""
        return self(layout.pad(vectors), layout.lengths)

    def forward(
        self,
        vectors: Float[Tensor, "batch m code_dim"],
        lengths: Int64[Tensor, " batch"],
        subset: Int64[Tensor, " subset"] | None = None,
    ) -> Reconstruction:
        """Features and colors.

        Args:
            vectors: codebook entries by rank, padded to a rectangle.
            lengths: codes of every image, 1..m.
            subset: patches to reconstruct; None for all.
        """
        m = vectors.shape[1]
        hidden = torch.arange(m, device=vectors.device) >= lengths[:, None]
        dtype = self.project_in.weight.dtype
        mask = torch.zeros(hidden.shape, device=vectors.device, dtype=dtype)
        mask = mask.masked_fill(hidden, float("-inf"))[:, None, None]
        codes = self.project_in(vectors.to(dtype)) + self.position[:m]
        for layer in self.code_layers:
            codes = layer(codes, own_bias=mask)
        codes = self.norm_codes(codes)
        queries: Tensor = self.queries
        bias = self.bias[:, :, :m]
        if subset is not None:
            queries, bias = queries[subset], bias[:, subset]
        x = queries + self.count(self._count_waves(lengths))[:, None]
        for layer in self.layers:
            x = layer(x, codes, bias=bias + mask)
        x = self.norm_out(x)
        colors = x.new_zeros(*x.shape[:2], 0) if self.colors is None else self.colors(x)
        return Reconstruction(self.project_out(x), colors)

    def _count_waves(self, lengths: Int64[Tensor, " batch"]) -> Float[Tensor, "batch 8"]:
        """Sines and cosines of log2 of the number of codes, over log2 of the number of patches."""
        ratio = lengths.float().log2() / max(1.0, math.log2(len(self.queries)))
        angle = ratio[:, None] * math.pi * ratio.new_tensor([1, 2, 4, 8])
        return torch.cat([angle.sin(), angle.cos()], 1).to(self.count.weight.dtype)

"""Reconstructor of nested codes: the sum of their entries -> features and colors of the patches.

    vectors of the patches [b n p] -> Linear ---------------------------------> + = features [b n d]
                                   -> Linear ---------------------------------> + = colors [b n q]
       + position of the patch + number of codes -> blocks -> LayerNorm, Linear ^

The first two layers are a linear decoder of the codes. The blocks add a correction that depends on
the surrounding patches, e.g. to continue an edge across areas; it is initialized to zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lavit_tok.codes import VisualCodes
from lavit_tok.decode.reconstructor import Reconstruction
from lavit_tok.encode.nested_quantizer import NestedCodebook
from lavit_tok.nn.attention import Attention
from lavit_tok.nn.nested_order import distance_bias
from lavit_tok.nn.positions import grid_positions


class BiasedBlock(nn.Module):
    """x += self-attention with numbers added to its scores; x += MLP; LayerNorm before each."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width, eps)
        self.self_attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width, eps)
        expand, contract = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.mlp = nn.Sequential(expand, nn.GELU(), contract)

    def forward(
        self, x: Float[Tensor, "batch n width"], bias: Float[Tensor, "heads n n"]
    ) -> Float[Tensor, "batch n width"]:
        """One block."""
        x = x + self.self_attention(self.norm_self(x), bias=bias)
        return x + self.mlp(self.norm_mlp(x))


class NestedReconstructor(nn.Module):
    """The vectors of the patches, as NestedCodebook.decode sums them -> features and colors.

    Args:
        width: of the features and of all blocks.
        patches: of an image, a square number.
        patch_dim: dimension of a patch's vector.
        depth: blocks.
        heads: attention heads.
        mlp_width: hidden width of every MLP.
        eps: of the LayerNorms.
        colors: outputs for colors, 3 * cells * cells; 0 for none.
    """

    bias: Tensor

    def __init__(
        self,
        width: int,
        patches: int,
        patch_dim: int,
        depth: int,
        heads: int,
        mlp_width: int,
        eps: float = 1e-5,
        colors: int = 48,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(patch_dim, width + colors)
        self.project_in = nn.Linear(patch_dim, width)
        self.position = nn.Parameter(grid_positions(patches, width))
        self.count = nn.Linear(8, width)
        self.blocks: Any = nn.ModuleList(
            BiasedBlock(width, heads, mlp_width, eps) for _ in range(depth)
        )
        self.norm_out = nn.LayerNorm(width, eps)
        self.project_out = nn.Linear(width, width + colors)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)
        self.register_buffer("bias", distance_bias(patches, heads), persistent=False)

    def of_codes(self, codes: VisualCodes, codebook: NestedCodebook) -> Reconstruction:
        """forward, from a batch of codes."""
        vectors = codebook.decode(codes.layout.pad(codes.values), codes.lengths)
        found: Reconstruction = self(vectors, codes.lengths)
        return found

    def linear_part(self, vectors: Float[Tensor, "batch patches patch_dim"]) -> Reconstruction:
        """The output of the linear decoder alone."""
        return self._parts(self.linear(vectors.to(self.linear.weight.dtype)))

    def forward(
        self,
        vectors: Float[Tensor, "batch patches patch_dim"],
        lengths: Int64[Tensor, " batch"],
    ) -> Reconstruction:
        """Features and colors.

        Args:
            vectors: sums of codebook entries.
            lengths: codes of every image, 1..patches.
        """
        vectors = vectors.to(self.linear.weight.dtype)
        count = self.count(self._count_waves(lengths))[:, None]
        x = self.project_in(vectors) + self.position + count
        for block in self.blocks:
            x = block(x, self.bias)
        return self._parts(self.linear(vectors) + self.project_out(self.norm_out(x)))

    def _parts(self, joined: Tensor) -> Reconstruction:
        width = self.position.shape[1]
        return Reconstruction(joined[..., :width], joined[..., width:])

    def _count_waves(self, lengths: Int64[Tensor, " batch"]) -> Float[Tensor, "batch 8"]:
        """Sines and cosines of log2 of the number of codes, over log2 of the number of patches."""
        ratio = lengths.float().log2() / max(1.0, math.log2(len(self.position)))
        angle = ratio[:, None] * math.pi * ratio.new_tensor([1, 2, 4, 8])
        return torch.cat([angle.sin(), angle.cos()], 1).to(self.count.weight.dtype)

"""Codes -> features of every patch.

    codebook entries [b m c] -> Linear + position in the code sequence
                             -> keys and values of n learned queries -> [b n d]

The position is the index in the code sequence, not in the image: where a code belongs must be
encoded in the code itself. LaVIT (ICLR 2024), section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lavit_tok.codes import RaggedLayout, VisualCodes
from lavit_tok.encode.quantizer import Codebook
from lavit_tok.nn.attention import Block


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction of all patches."""

    features: Float[Tensor, "batch patches width"]
    """The encoder's features."""
    colors: Float[Tensor, "batch patches out"]
    """Mean colors of the cells of every patch, in 0..1, ordered color, y, x
    (efficientnet.patch_colors); of width 0 without."""

    @property
    def joined(self) -> Float[Tensor, "batch patches joined"]:
        """Condition of a pixel decoder: the features, then the colors from -1 to 1."""
        return torch.cat([self.features, 2 * self.colors.to(self.features.dtype) - 1], -1)


class Reconstructor(nn.Module):
    """One learned query per patch; blocks of self-attention, cross-attention to the codes and MLP.

    Args:
        width: d, dimension of the features.
        patches: n, number of queries.
        code_dim: c, dimension of the codebook entries.
        depth: number of blocks.
        heads: attention heads.
        mlp_width: intermediate size of the MLPs.
        eps: epsilon of the LayerNorms.
    """

    def __init__(
        self,
        width: int,
        patches: int,
        code_dim: int,
        depth: int,
        heads: int,
        mlp_width: int,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.project_in = nn.Linear(code_dim, width)
        self.position = nn.Parameter(torch.randn(patches, width) * 0.02)
        self.queries = nn.Parameter(torch.randn(patches, width) * 0.02)
        self.blocks: Any = nn.ModuleList(Block(width, heads, mlp_width, eps) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, eps)
        first, second = nn.Linear(width, width), nn.Linear(width, width)
        self.project_out = nn.Sequential(first, nn.Tanh(), second)

    def of_codes(self, codes: VisualCodes, codebook: Codebook) -> Reconstruction:
        """The features that a batch of codes describes; no columns of colors."""
        features = self.ragged(codebook.lookup(codes.values), codes.layout)
        return Reconstruction(features, features[..., :0])

    def ragged(
        self, vectors: Float[Tensor, "total code_dim"], layout: RaggedLayout
    ) -> Float[Tensor, "batch patches width"]:
        """forward, from the concatenated codebook entries of all images."""
        index = torch.arange(layout.width, device=vectors.device)[None]
        return self(layout.pad(vectors), index, layout.mask)

    def forward(
        self,
        vectors: Float[Tensor, "batch m code_dim"],
        index: Int64[Tensor, "#batch m"],
        policy: Tensor,
    ) -> Float[Tensor, "batch patches width"]:
        """Reconstructed features.

        Args:
            vectors: codebook entries, padded.
            index: position of each entry in its image's code sequence, 0..n-1.
            policy: bool [b m], False at padding; or the straight-through keep decision [b m].
        """
        dtype = self.project_in.weight.dtype
        codes = self.project_in(vectors.to(dtype)) + self.position[index]
        x = self.queries.expand(len(vectors), -1, -1)
        for block in self.blocks:
            x = block(x, codes, None, policy[:, None, None, :])
        return self.project_out(self.norm_out(x))

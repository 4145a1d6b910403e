"""Room 6: codes -> features of every patch.

    codebook rows [b m c] -> Linear + position in the code sequence -> keys for n learned queries -> [b n d_teacher]

The position is the index in the sequence of codes, not the place in the picture: where a code belongs must be written
in the code itself. LaVIT (ICLR 2024), section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lavit_tok.codes import RaggedLayout
from lavit_tok.nn.attention import Block


class Reconstructor(nn.Module):
    """A learned query a patch; blocks of self-attention, cross-attention to the codes, MLP; Linear, Tanh, Linear."""

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
        self.project_out = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)
        )

    def ragged(
        self, vectors: Float[Tensor, "total code_dim"], layout: RaggedLayout
    ) -> Float[Tensor, "batch patches width"]:
        """forward, from the rows of all images one after another."""
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
            vectors: codebook rows, padded to a rectangle.
            index: each row's place in its image's code sequence, 0..n-1.
            policy: bool [b m], False where there is no code; or the straight-through keep decision as float [b m].
        """
        dtype = self.project_in.weight.dtype
        codes = self.project_in(vectors.to(dtype)) + self.position[index]
        x = self.queries.expand(len(vectors), -1, -1)
        visible = policy[:, None, None, :]
        for block in self.blocks:
            x = block(x, codes, None, visible)
        return self.project_out(self.norm_out(x))

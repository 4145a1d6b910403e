"""Merged features as vectors for a language model, without quantization.

    features [b n d], keep [b n] -> Merger -> [total d] -> Linear -> [total, LM hidden size]

LaVIT (ICLR 2024) uses these vectors for input images and codes for generated ones. This merger is
trained with the language model and separate from the one before the quantizer; both use the same
keep mask, so that there is one vector per code.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from lavit_tok.encode.merger import Merger
from lavit_tok.nn.attention import Formula


class ContinuousPath(nn.Module):
    """A merger and a projection to the hidden size of a language model.

    Args:
        width: dimension of the features.
        depth: number of blocks.
        heads: attention heads.
        mlp_width: intermediate size of the MLPs.
        eps: epsilon of the LayerNorms.
        formula: see Merger.
        out: hidden size of the language model.
        patches: see Merger.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        eps: float,
        formula: Formula,
        out: int,
        patches: int | None = None,
    ) -> None:
        super().__init__()
        self.merger = Merger(width, depth, heads, mlp_width, eps, formula, patches)
        self.projection = nn.Linear(width, out)

    def forward(
        self, features: Float[Tensor, "batch patches width"], keep: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "total out"]:
        """One vector per kept patch, in raster order, images concatenated."""
        return self.projection(self.merger(features, keep))

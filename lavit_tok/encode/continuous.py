"""Beside room 5: merged features -> vectors for a language model, without rounding to codes.

    features [b n d], keep [b n] -> Merger -> [total d] -> Linear -> [total width of the language model]

LaVIT (ICLR 2024) reads pictures this way and writes them as codes. The merger is a second one, trained with the
language model, while the merger behind the codes stays as it was; both share one keep mask: a vector for each code.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from lavit_tok.encode.merger import Merger
from lavit_tok.nn.attention import Formula


class ContinuousPath(nn.Module):
    """A merger of its own and a projection to the width of a language model.

    Args: see Merger; out is the language model's width.
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
        """A vector for each kept patch, raster order, images one after another."""
        return self.projection(self.merger(features, keep))

"""Images -> vectors of a language model's width, one for each code (LaVIT, ICLR 2024).

    images [k 3 s s] -> frozen encoder -> features [k n d] -> merger, projection -> vectors [m
    width]

Merger and projection are trained with the LM. The merger starts as a copy of the tokenizer's, which
stays as it was trained for the codes; both use the same keep mask.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from lavit_lm.vision.trained_encoder import EncoderConnector
from lavit_tok import ContinuousPath, VisualTokenizer


class ContinuousBridge(EncoderConnector):
    """LaVIT's continuous path, trained with the language model.

    Args:
        tokenizer: the visual tokenizer, frozen.
        width: of the language model.
    """

    def __init__(self, tokenizer: VisualTokenizer, width: int) -> None:
        super().__init__(tokenizer)
        c = tokenizer.config
        sizes = c.width, c.merger_depth, c.num_heads, c.mlp_width, c.layer_norm_eps
        self.path = ContinuousPath(*sizes, c.attention, width, c.positions)
        if not next(self.path.parameters()).is_meta:  # on meta only shapes are of interest
            self.path.merger.load_state_dict(tokenizer.merger.state_dict())

    def forward(
        self, images: UInt8[Tensor, "k 3 h w"], keep: Bool[Tensor, "k patches"]
    ) -> Float[Tensor, "m width"]:
        """A vector for each kept patch, in raster order, images one after another.

        Raises:
            ValueError: images of another size than the tokenizer's.
        """
        return self.path(self.encoded(self.pixels(images), self.path.projection.weight.dtype), keep)

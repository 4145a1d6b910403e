"""Pictures -> vectors at a language model's width, one for each code: what LaVIT reads in place of codes.

    pictures [k 3 s s] -> frozen encoder -> features [k n d] -> merger and projection, trained with the LM -> [m width]

The merger starts as a copy of the one behind the codes, which stays as stage 1 left it; both share one keep mask.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from lavit_tok import ContinuousPath, VisualTokenizer


class ContinuousBridge(nn.Module):
    """LaVIT's continuous path, trained with the language model.

    Args:
        tokenizer: the visual tokenizer, frozen: it is no part of this module's parameters or weights.
        width: the language model's.
    """

    def __init__(self, tokenizer: VisualTokenizer, width: int) -> None:
        super().__init__()
        c = tokenizer.config
        self._frozen = [
            tokenizer.requires_grad_(False).eval()
        ]  # in a list, out of sight of parameters() and state_dict()
        self.path = ContinuousPath(
            c.width,
            c.merger_depth,
            c.num_heads,
            c.mlp_width,
            c.layer_norm_eps,
            c.attention,
            width,
            c.positions,
        )
        self.path.merger.load_state_dict(tokenizer.merger.state_dict())

    def forward(
        self, images: UInt8[Tensor, "k 3 h w"], keep: Bool[Tensor, "k patches"]
    ) -> Float[Tensor, "m width"]:
        """A vector for each kept patch, raster order, pictures one after another.

        Raises:
            ValueError: pictures of another size than the tokenizer's.
        """
        tokenizer = self._frozen[0].to(images.device)
        with torch.no_grad():
            features = tokenizer.features(tokenizer.preprocess(images))
        return self.path(features.to(self.path.projection.weight.dtype), keep)

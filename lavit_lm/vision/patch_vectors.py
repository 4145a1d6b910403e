"""Images -> vectors of a language model's width, one for each patch or square of patches.

Fewer vectors than patches are means over squares of patches, here 4 of 16:

    a a b b
    a a b b      ->  vectors a b c d
    c c d d
    c c d d
"""

from __future__ import annotations

from math import isqrt

import torch
from einops import reduce, repeat
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from lavit_lm.vision.trained_encoder import EncoderConnector
from lavit_tok import VisualTokenizer


class PatchBridge(EncoderConnector):
    """Images -> a vector of the LM's hidden size for each patch of their upper lines.

        images [k 3 s s], blank below -> encoder -> [means over squares] -> norm, linear
                                      -> + learned positions -> [m width]

    DaVinci trains a ResNet-101 of stride 16; any encoder with patches can be used. Its class token
    is left out: the embedding of <img> is a learned vector before the patches already.

    Args:
        tokenizer: the visual tokenizer, whose encoder computes the features; frozen, not a
            submodule.
        width: the LM's hidden size.
        train_encoder: train a copy of the encoder, the submodule "encoder"; otherwise the
            tokenizer's own is used, frozen.
        vectors: of an image; by default one for each patch.

    Raises:
        ValueError: vectors that are no means over squares of patches.
    """

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        width: int,
        train_encoder: bool = False,
        vectors: int | None = None,
    ) -> None:
        super().__init__(tokenizer, train_encoder)
        c = tokenizer.config
        vectors = c.num_patches if vectors is None else vectors
        require_squares(vectors, c.num_patches)
        self.norm = nn.LayerNorm(c.width, c.layer_norm_eps)
        self.projection = nn.Linear(c.width, width)
        self.positions = nn.Parameter(torch.randn(vectors, width) * 0.02)

    def forward(
        self, images: UInt8[Tensor, "k 3 h w"], keep: Bool[Tensor, "k vectors"]
    ) -> Float[Tensor, "m width"]:
        """The kept vectors in raster order, images one after another; other patches are blank.

        Raises:
            ValueError: images of another size than the tokenizer's.
        """
        side, pixels = isqrt(keep.shape[1]), self.pixels(images)
        patch = pixels.shape[-1] // side
        pixels = pixels * repeat(keep, "k (r c) -> k 1 (r p) (c q)", r=side, p=patch, q=patch)
        features = mean_of_squares(self.encoded(pixels, self.positions.dtype), keep.shape[1])
        return (self.projection(self.norm(features)) + self.positions)[keep]


def mean_of_squares(
    features: Float[Tensor, "k patches d"], vectors: int
) -> Float[Tensor, "k vectors d"]:
    """The drawing above: a mean over each square of patches, in raster order."""
    side = isqrt(vectors)
    square = isqrt(features.shape[1]) // side
    return reduce(
        features, "k (r p c q) d -> k (r c) d", "mean", r=side, p=square, c=side, q=square
    )


def require_squares(vectors: int, patches: int) -> None:
    """Raises ValueError for vectors that are no means over squares of so many patches."""
    side = isqrt(patches)
    possible = [n * n for n in range(1, side + 1) if side % n == 0]
    if vectors not in possible:
        raise ValueError(
            f"expected vectors that are means over squares of {side} x {side} patches, one of "
            f"{possible}, got {vectors}"
        )

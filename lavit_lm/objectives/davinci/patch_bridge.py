"""DaVinci's image prefix, the upper lines as vectors, and image suffix, the lower lines as codes.

    image    kept (2 lines)     input of the encoder        input of the tokenizer
    a a a a  x x x x           a a a a                     c c c c
    b b b b  x x x x           b b b b                     d d d d
    c c c c  . . . .           . . . .                     . . . .
    d d d d  . . . .           . . . .                     . . . .
                               vectors of lines a and b     codes of its first two lines: c and d

Neither input contains what the other one encodes, so that the prefix has no information about the
lines below it, and the codes of these lines do not depend on the lines above (DaVinci, "prefix
image modeling"). Blank patches have the mean color.

Fewer vectors than patches are means over squares of patches, here 4 of 16:

    a a b b
    a a b b      ->  vectors a b c d
    c c d d
    c c d d
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

import torch
from einops import reduce, repeat
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.vision.trained_encoder import EncoderConnector
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualTokenizer

LATER = -1
"""Placeholder of an id that with_codes_below computes; it is outside every vocabulary, so that a
forgotten one is an error.
"""


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
        side = isqrt(c.num_patches)
        possible = [n * n for n in range(1, side + 1) if side % n == 0]
        if vectors not in possible:
            raise ValueError(
                f"expected vectors that are means over squares of {side} x {side} patches, one of "
                f"{possible}, got {vectors}"
            )
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
        features = self.encoded(pixels, self.positions.dtype)
        square = isqrt(features.shape[1]) // side
        features = reduce(
            features, "k (r p c q) d -> k (r c) d", "mean", r=side, p=square, c=side, q=square
        )
        return (self.projection(self.norm(features)) + self.positions)[keep]


@torch.no_grad()
def codes_below(
    tokenizer: VisualTokenizer, images: UInt8[Tensor, "k 3 h w"], keep: Bool[Tensor, "k patches"]
) -> Int64[Tensor, " total"]:
    """Codes of every patch below the kept lines in raster order, images one after another.

    The lines below are moved to the top of a blank image and encoded there, so that their codes do
    not depend on the upper lines. This works for tokenizers of a fixed image size.

    Raises:
        ValueError: kept patches that are not the whole upper lines of an image.
    """
    patches, side = keep.shape[1], isqrt(keep.shape[1])
    counts = keep.sum(1)
    upper = torch.arange(patches, device=keep.device) < counts[:, None]
    if bool((counts % side != 0).any()) or not torch.equal(upper, keep):
        raise ValueError(
            f"expected masks of whole upper lines of {side} patches, got {counts.tolist()} patches"
        )
    pixels = tokenizer.preprocess(images)
    moved, height = torch.zeros_like(pixels), pixels.shape[2]
    for i, start in enumerate((counts // side * (height // side)).tolist()):
        moved[i, :, : height - start] = pixels[i, :, start:]
    codes = tokenizer.encode_pixels(moved, budget=patches).padded()
    return codes[torch.arange(patches, device=keep.device) < (patches - counts)[:, None]]


def with_codes_below(
    batch: PackedBatch, visual: VisualTokenizer, processor: MultimodalProcessor
) -> PackedBatch:
    """The batch with the code ids of its images instead of LATER, encoded on its device."""
    cut = ~batch.keep.all(1)
    if not bool(cut.any()):
        return batch
    codes = codes_below(visual.to(batch.ids.device), batch.images[cut], batch.keep[cut])
    return replace(
        batch, ids=batch.ids.masked_scatter(batch.ids == LATER, processor.vocabulary.to_ids(codes))
    )

"""The upper rows of a picture as vectors, one a patch, and the lower rows as codes: what DaVinci reads, and paints.

    picture, 4 rows    kept (2 rows)     the encoder of vectors sees    the tokenizer of codes sees
    a a a a            x x x x           a a a a                        c c c c
    b b b b            x x x x           b b b b                        d d d d
    c c c c            . . . .           . . . .                        . . . .
    d d d d            . . . .           . . . .                        . . . .
                                         vectors of rows a and b        codes of the first two rows: c and d

Neither sees what the other one stands for, so that a prefix of rows cannot tell the rows below it, and the codes of
the rows below say the same wherever they are cut off (DaVinci, "prefix image modelling"). What is blank has the mean
colour.
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from lavit_lm.sequences.packing import Packed
from lavit_lm.vision.trained_encoder import EncoderConnector
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualTokenizer

LATER = -1
"""An id that with_codes_below will tell; no embedding has such a row, so that it cannot be forgotten."""


class PatchBridge(EncoderConnector):
    """Pictures -> a vector of the language model's width for each patch of their upper rows.

        pictures [k 3 s s], blank below -> encoder -> norm, linear, + learned positions -> [m width]

    DaVinci's encoder is a trained ResNet-101 of stride 16; any encoder of patches will do. Its class token has no place
    here: the id that opens the picture is a learned vector in front of the grid already.

    Args:
        tokenizer: the visual tokenizer, whose encoder makes the features; itself frozen and no part of this module.
        width: the language model's.
        train_encoder: train a copy of the encoder, the submodule "encoder"; else the tokenizer's own is used, frozen.
    """

    def __init__(self, tokenizer: VisualTokenizer, width: int, train_encoder: bool = False) -> None:
        super().__init__(tokenizer, train_encoder)
        c = tokenizer.config
        self.norm = nn.LayerNorm(c.width, c.layer_norm_eps)
        self.projection = nn.Linear(c.width, width)
        self.positions = nn.Parameter(torch.randn(c.num_patches, width) * 0.02)

    def forward(
        self, images: UInt8[Tensor, "k 3 h w"], keep: Bool[Tensor, "k patches"]
    ) -> Float[Tensor, "m width"]:
        """A vector for each kept patch, raster order, pictures one after another; other patches are not looked at.

        Raises:
            ValueError: pictures of another size than the tokenizer's.
        """
        side, pixels = isqrt(keep.shape[1]), self.pixels(images)
        patch = pixels.shape[-1] // side
        pixels = pixels * repeat(keep, "k (r c) -> k 1 (r p) (c q)", r=side, p=patch, q=patch)
        features = self.encoded(pixels, self.positions.dtype)
        return (self.projection(self.norm(features)) + self.positions)[keep]


@torch.no_grad()
def codes_below(
    tokenizer: VisualTokenizer, images: UInt8[Tensor, "k 3 h w"], keep: Bool[Tensor, "k patches"]
) -> Int64[Tensor, " total"]:
    """Codes of every patch below the kept rows, raster order, pictures one after another.

    The rows below are moved to the top of a blank picture and encoded from there, so a picture whose upper rows are
    other ones has the same codes. Tokenizers of a fixed picture size need no other.

    Raises:
        ValueError: kept patches that are not the whole upper rows of a picture.
    """
    patches, side = keep.shape[1], isqrt(keep.shape[1])
    counts = keep.sum(1)
    upper = torch.arange(patches, device=keep.device) < counts[:, None]
    if bool((counts % side != 0).any()) or not torch.equal(upper, keep):
        raise ValueError(
            f"expected whole upper rows of {side} patches, got masks of {counts.tolist()} patches"
        )
    pixels = tokenizer.preprocess(images)
    moved, height = torch.zeros_like(pixels), pixels.shape[2]
    for i, start in enumerate((counts // side * (height // side)).tolist()):
        moved[i, :, : height - start] = pixels[i, :, start:]
    codes = tokenizer.encode_pixels(moved, budget=patches).padded()
    return codes[torch.arange(patches, device=keep.device) < (patches - counts)[:, None]]


def with_codes_below(
    batch: Packed, visual: VisualTokenizer, processor: MultimodalProcessor
) -> Packed:
    """The batch with codes in the places of LATER, of all its pictures together, made on its device."""
    cut = ~batch.keep.all(1)
    if not bool(cut.any()):
        return batch
    codes = codes_below(visual.to(batch.ids.device), batch.images[cut], batch.keep[cut])
    return replace(
        batch, ids=batch.ids.masked_scatter(batch.ids == LATER, processor.vocabulary.to_ids(codes))
    )

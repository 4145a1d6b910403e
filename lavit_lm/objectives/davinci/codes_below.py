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
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualTokenizer

LATER = -1
"""Placeholder of an id that with_codes_below computes; it is outside every vocabulary, so that a
forgotten one is an error.
"""


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

"""Figures of what the tokenizer does: kept patches, and sheets of several images.

An image of 2 x 2 patches, the first and the last of which are kept, before and after
`kept_overlay`:

    a a | b b          a a | . .          a, d   unchanged
    a a | b b          a a | . .          .      dimmed: a quarter of b's or c's brightness
    ----+----    ->    ----+----
    c c | d d          . . | d d
    c c | d d          . . | d d

A `sheet` of two lines; a cell is as wide as the widest and as high as the highest image, which are
at its top left:

    g g g g g g g g g       g   gap, white
    g titles        g       titles of the columns, if any
    g A A A g B B B g       line 0
    g labels of 0   g       labels below the images, if any
    g g g g g g g g g
    g C C C g D D D g       line 1
    g labels of 1   g
    g g g g g g g g g
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lavit_tok.encode.image_files import open_image

DIM = 0.25  # brightness of a dropped patch
TEXT_HEIGHT = 16
LUMA_LEVELS, CHROMA_LEVELS, CHROMA_RANGE = 16, 5, (64, 192)  # of a thumbnail


def kept_overlay(image: Any, keep: Any, grid: tuple[int, int], dim: float = DIM) -> Image.Image:
    """The image with its dropped patches dimmed.

    Args:
        image: PIL image, or uint8 [h w 3] / [3 h w] array or tensor of any size.
        keep: bool [patches], raster order: an array, tensor or list.
        grid: vertical and horizontal number of patches.
        dim: factor on the brightness of dropped patches, 0..1.

    Raises:
        ValueError: another number of decisions than patches.
    """
    rows, columns = grid
    kept = np.asarray(keep, dtype=bool).reshape(-1)
    if rows < 1 or columns < 1 or kept.size != rows * columns:
        raise ValueError(f"keep: expected {rows} x {columns} decisions, got {kept.size}")
    pixels = np.asarray(open_image(image))
    # The patch that each line of pixels belongs to; sizes need not be multiples of the grid.
    row = np.arange(pixels.shape[0]) * rows // pixels.shape[0]
    column = np.arange(pixels.shape[1]) * columns // pixels.shape[1]
    visible = kept.reshape(rows, columns)[row[:, None], column[None]]
    return Image.fromarray(np.where(visible[..., None], pixels, (pixels * dim).astype(np.uint8)))


def thumbnail(image: Image.Image, bits: float | int) -> Image.Image:
    """The image as a thumbnail of at most so many bits, enlarged: what codes are compared with.

    s x s pixels of brightness in 16 levels and two colors (Cb, Cr) of s/2 x s/2 pixels in 5 levels,
    with the largest s whose levels, at log2(levels) bits each, fit into the bits: 7 for 238 bits.

    Args:
        image: PIL image of any size, which is that of the result.
        bits: of the thumbnail; below 9 it is one pixel all the same.
    """
    fitting = (s for s in range(max(image.size), 1, -1) if thumbnail_bits(s) <= bits)
    side = next(fitting, 1)
    planes = []
    for number, plane in enumerate(image.convert("YCbCr").split()):
        size, levels = (side, LUMA_LEVELS) if number == 0 else (max(1, side // 2), CHROMA_LEVELS)
        low, high = (0, 255) if number == 0 else CHROMA_RANGE
        small = np.asarray(plane.resize((size, size), Image.Resampling.BOX), dtype=float)
        index = ((small - low) / (high - low) * (levels - 1)).round().clip(0, levels - 1)
        values = (low + index / (levels - 1) * (high - low)).round().astype(np.uint8)
        planes.append(Image.fromarray(values).resize(image.size, Image.Resampling.BICUBIC))
    return Image.merge("YCbCr", planes).convert("RGB")


def thumbnail_bits(side: int) -> float:
    """Bits of a thumbnail of this side; see thumbnail."""
    luma, chroma = side**2, 2 * max(1, side // 2) ** 2
    return luma * math.log2(LUMA_LEVELS) + chroma * math.log2(CHROMA_LEVELS)


def sheet(
    images: Sequence[Sequence[Image.Image]],
    titles: Sequence[str] = (),
    labels: Sequence[Sequence[str]] = (),
    gap: int = 4,
) -> Image.Image:
    """Arrange images in lines on white; empty lines are left out, lines may differ in length.

    Args:
        images: the images of each line.
        titles: one text per column, above the first line.
        labels: one text per image of each line, below it.
        gap: white pixels between and around the images.

    Raises:
        ValueError: no image.
    """
    lines = [line for line in images if len(line)]
    if not lines:
        raise ValueError("expected at least one image to arrange, got none")
    width = max(image.width for line in lines for image in line)
    height = max(image.height for line in lines for image in line)
    step = height + gap + (TEXT_HEIGHT if labels else 0)
    top = gap + (TEXT_HEIGHT if titles else 0)
    count = max(map(len, lines))
    canvas = Image.new("RGB", (gap + count * (width + gap), top + len(lines) * step), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), gap), title, "black", font)
    for index, line in enumerate(lines):
        for column, image in enumerate(line):
            corner = (gap + column * (width + gap), top + index * step)
            canvas.paste(image, corner)
            if labels:
                text = _shortened(labels[index][column], width, font)
                draw.text((corner[0], corner[1] + height + 1), text, "black", font)
    return canvas


def _shortened(text: str, width: int, font: Any) -> str:
    """The text, its start replaced by dots if it is too wide: of a path the end matters most."""
    short = text
    while len(short) > 1 and font.getlength(short) > width:
        text = text[1:]
        short = f"..{text}"
    return short

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

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lavit_tok.encode.image_processor import open_image

DIM = 0.25  # brightness of a dropped patch
TEXT_HEIGHT = 16


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

"""Pictures of what the tokenizer does: which patches it kept, and sheets of several pictures side by side.

A picture of 2 x 2 patches of which the first and the last are kept, before and after `kept_overlay`:

    a a | b b          a a | . .          a, d   as they were
    a a | b b          a a | . .          .      dimmed: a quarter of b's or c's brightness
    ----+----    ->    ----+----
    c c | d d          . . | d d
    c c | d d          . . | d d

A `sheet` of two rows; a cell is as wide as the widest and as high as the highest picture, which lie at its top left:

    g g g g g g g g g       g   gap, white
    g titles        g       titles of the columns, if there are any
    g A A A g B B B g       row 0
    g labels of 0   g       labels under the row's pictures, if there are any
    g g g g g g g g g
    g C C C g D D D g       row 1
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
    """The picture with its dropped patches dimmed.

    Args:
        image: PIL image, or uint8 [h w 3] / [3 h w] array or tensor; h and w need not be multiples of the grid.
        keep: bool [patches], raster order: an array, tensor or list.
        grid: rows and columns of patches.
        dim: factor on the brightness of dropped patches, 0..1.

    Raises:
        ValueError: as many decisions as the grid has patches were expected.
    """
    rows, columns = grid
    kept = np.asarray(keep, dtype=bool).reshape(-1)
    if rows < 1 or columns < 1 or kept.size != rows * columns:
        raise ValueError(f"keep: expected {rows} x {columns} decisions, got {kept.size}")
    pixels = np.asarray(open_image(image))
    row = (
        np.arange(pixels.shape[0]) * rows // pixels.shape[0]
    )  # which patch row each line of pixels belongs to
    column = np.arange(pixels.shape[1]) * columns // pixels.shape[1]
    visible = kept.reshape(rows, columns)[row[:, None], column[None]]
    return Image.fromarray(np.where(visible[..., None], pixels, (pixels * dim).astype(np.uint8)))


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str] = (),
    labels: Sequence[Sequence[str]] = (),
    gap: int = 4,
) -> Image.Image:
    """Rows of pictures on white. Empty rows take no room; a row may be shorter than the others.

    Args:
        rows: the pictures.
        titles: one text for each column, above the first row.
        labels: one text for each picture, under it, for each row.
        gap: white pixels between and around the pictures.

    Raises:
        ValueError: not a single picture.
    """
    rows = [row for row in rows if len(row)]
    if not rows:
        raise ValueError("expected at least one picture to lay out, got none")
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    step = height + gap + (TEXT_HEIGHT if labels else 0)
    top = gap + (TEXT_HEIGHT if titles else 0)
    count = max(map(len, rows))
    canvas = Image.new("RGB", (gap + count * (width + gap), top + len(rows) * step), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), gap), title, "black", font)
    for line, row in enumerate(rows):
        for column, image in enumerate(row):
            corner = (gap + column * (width + gap), top + line * step)
            canvas.paste(image, corner)
            if labels:
                text = _shortened(labels[line][column], width, font)
                draw.text((corner[0], corner[1] + height + 1), text, "black", font)
    return canvas


def _shortened(text: str, width: int, font: Any) -> str:
    """The text, its start replaced by dots where it is too wide: the end of a path says more than its start."""
    short = text
    while len(short) > 1 and font.getlength(short) > width:
        text = text[1:]
        short = f"..{text}"
    return short

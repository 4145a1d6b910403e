"""Frames of animated image files: GIF, APNG, WebP."""

from __future__ import annotations

import os
from collections.abc import Iterable

from PIL import Image

from lavit_tok.encode.image_files import ImageError, open_image


def count_frames(file: str | os.PathLike[str]) -> int:
    """Number of frames of an image file, 1 of a still image. Raises ImageError."""
    open_image(file)  # whatever is no image has its message there
    try:
        with Image.open(file) as opened:
            return int(getattr(opened, "n_frames", 1))
    except Exception as error:  # decoders of damaged files raise nearly any exception
        raise ImageError(f"{file}: frames cannot be counted: {error}") from None


def read_frames(file: str | os.PathLike[str], numbers: Iterable[int]) -> list[Image.Image]:
    """Frames by increasing number, as upright RGB, transparent pixels white. Raises ImageError."""
    images = []
    number = 0
    try:
        with Image.open(file) as opened:
            for number in numbers:
                opened.seek(number)
                images.append(open_image(opened.copy()))
    except Exception as error:
        raise ImageError(f"{file}: frame {number} cannot be read: {error}") from None
    return images

"""The items of a command: images by name, chunks of them, progress, and PNG files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lavit_tok.checkpoints.files import atomic
from lavit_tok.checkpoints.weights import SHIPPED
from lavit_tok.data.decode_batch import png
from lavit_tok.data.rejects import Rejects
from lavit_tok.encode.image_files import ImageError, find_images
from lavit_tok.encode.image_processor import VisualImageProcessor

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "camera.png",
    "coins.png",
)
"""Photographs in the package scikit-image: six in color, two gray."""
REJECTS, SHEET = "rejects.jsonl", "sheet.png"
Item = TypeVar("Item")


def list_images(names: Sequence[str]) -> list[Path]:
    """Files, and the images of folders; "-" reads further names from stdin, one a line.

    Raises:
        ImageError: there are none.
    """
    lines: list[str] = []
    if "-" in names:
        binary = getattr(sys.stdin, "buffer", None)  # names need not be UTF-8
        text = sys.stdin.read() if binary is None else os.fsdecode(binary.read())
        lines = text.replace("\r\n", "\n").split("\n")
    paths = find_images([*(n for n in names if n != "-"), *(line for line in lines if line)])
    if not paths:
        raise ImageError(f"{', '.join(names)}: no images found")
    return paths


def decoder_name(decoder: object, tokenizer: object) -> str:
    """The decoder that is named, else the shipped one for this tokenizer."""
    return str(decoder or (tokenizer if str(tokenizer) in SHIPPED else "default"))


def photographs() -> list[Path]:
    """The photographs in the package scikit-image. Raises ImageError if it is not installed."""
    spec = find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    paths = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()] if folder else []
    if not paths:
        raise ImageError(
            "no images given, and scikit-image, whose photographs are the default, is not "
            "installed: pip install scikit-image"
        )
    return paths


def open_images(
    paths: Iterable[tuple[int, Path]],
    rejects: Rejects,
    image_processor: VisualImageProcessor,
    sizes: Sequence[int | None] = (None,),
) -> list[tuple[int, Path, list[UInt8[Tensor, "3 side side"]]]]:
    """The numbered images that can be opened, resized to each of `sizes`; others are rejected.

    Each image is resized before the next one is opened, so that only one is in memory at full size.
    None is the processor's size, and its `resize` does not change an image that has it.
    """
    images = []
    for number, path in paths:
        try:
            image = image_processor.open(path)
        except ImageError as error:
            rejects.add(str(path), error)
            continue
        rejects.warn(str(path), image.info.get("warnings", ()))
        images.append((number, path, [image_processor.resize(image, size) for size in sizes]))
    return images


def limit_images(image_processor: VisualImageProcessor, arguments: argparse.Namespace) -> None:
    """Apply --max-bytes and --max-pixels."""
    image_processor.max_bytes = arguments.max_bytes
    image_processor.max_pixels = arguments.max_pixels
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, arguments.max_pixels)


def device(name: str) -> torch.device:
    """The device. Raises ValueError if it cannot be used."""
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # "meta" has no data
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None


def save_png(image: Image.Image, path: Path) -> None:
    """Save an image, marked as this program's; the file appears when it is complete."""
    content = png(image)
    with atomic(path) as partial:
        partial.write_bytes(content)


def progress(items: Iterable[Item], title: str) -> Iterable[Item]:
    """A progress bar on stderr if that is a terminal."""
    return tqdm(items, title, file=sys.stderr, disable=None)


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk

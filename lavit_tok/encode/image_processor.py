"""Room 1: any image input -> pixels. The only preprocessing of the library.

    PIL | path | bytes | file | uint8 [h w 3] / [3 h w] array or tensor  ->  RGB picture  ->  float [b 3 h w]

The published LaVIT tokenizer resizes with PIL bicubic to exactly the model's square (aspect ratio not kept), divides by
255 and normalises by the CLIP mean and standard deviation. Two paths that preprocess the same picture in two ways are a
known defect of the release; here there is one.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 89_478_485  # where PIL begins to warn of a decompression bomb; here always an error
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
)

ImageLike = (
    Image.Image | str | os.PathLike[str] | bytes | bytearray | BinaryIO | np.ndarray | Tensor
)


class ImageError(ValueError):
    """A picture that cannot be used; the message names the picture and the reason."""


def open_image(source: Any, name: str | None = None) -> Image.Image:
    """Open one picture as upright 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, CMYK and palettes are converted, 16-bit grey is scaled to
    8 bits, and of an animation the first frame is taken.

    Args:
        source: PIL image, path, encoded bytes, binary file, or uint8 [h w 3] / [3 h w] / [h w] array or tensor.
        name: what to call the picture in errors; derived from the source by default.

    Raises:
        ImageError: unreadable, truncated, empty, too large, or an array of wrong type, range or shape.
    """
    label = name or _label(source)
    if isinstance(source, (np.ndarray, Tensor)):
        return _from_array(source, label)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, label)
        if isinstance(source, (str, os.PathLike)):
            source = Path(source).read_bytes()
        if isinstance(source, (bytes, bytearray)):
            if not source:
                raise ImageError(f"{label}: empty file (0 bytes), expected an encoded picture")
            source = io.BytesIO(source)
        if not hasattr(source, "read"):
            raise ImageError(
                f"{label}: expected a PIL image, path, bytes or uint8 array, got {type(source).__name__}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{opened.width}x{opened.height} pixels")
                if (
                    opened.format == "EPS"
                ):  # a program, not a picture: reading it would start Ghostscript on it
                    raise ImageError(f"{label}: EPS is not read, expected a raster picture")
                return _to_rgb(opened, label)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{label}: not a picture in a format that Pillow knows") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{label}: more than {MAX_PIXELS} pixels (decompression bomb?): {error}"
        ) from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ImageError(f"{label}: cannot be read: {error}") from None


def resize(image: Image.Image, size: int, crop: bool = False) -> UInt8[Tensor, "3 {size} {size}"]:
    """Bicubic resize to exactly size x size; with crop=True the shorter side is resized and the centre cut out."""
    if crop:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_uint8(images: Any, size: int, crop: bool = False) -> UInt8[Tensor, "batch 3 {size} {size}"]:
    """Open and resize one image or a sequence of them. Raises ImageError for the first bad one, ValueError for none."""
    pixels = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4
    if pixels and len(images) and tuple(images.shape[1:]) == (3, size, size):
        return images  # already the model's pixels, not yet normalised
    batch = as_list(images)
    if not batch:
        raise ValueError("expected at least one image, got an empty batch")
    opened = []
    for i, image in enumerate(batch):
        label = _label(image)  # pictures without a name are told apart by their place
        opened.append(
            open_image(
                image, f"image {i} of {len(batch)} {label}" if label.startswith("<") else label
            )
        )
    return torch.stack([resize(image, size, crop) for image in opened])


def normalize(
    pixels: UInt8[Tensor, "batch 3 h w"],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Float[Tensor, "batch 3 h w"]:
    """uint8 0..255 -> (x / 255 - mean) / std."""
    shape = (1, 3, 1, 1)
    centre = torch.tensor(mean, device=pixels.device).view(shape)
    return (pixels.float() / 255 - centre) / torch.tensor(std, device=pixels.device).view(shape)


def as_list(images: Any) -> list[Any]:
    """One image or a batch of them -> a list of single images; a 4-D array is a batch, a 3-D or 2-D one an image."""
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image)) or hasattr(
        images, "read"
    ):
        return [images]
    if isinstance(images, Iterable):
        return list(images)
    return [images]


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as given, folders walked in sorted order for files with a picture's suffix."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(
                p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
            )
        else:
            found.append(path)
    return found


def _label(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return str(name) if name else f"<{type(source).__name__}>"


def _from_array(array: np.ndarray | Tensor, label: str) -> Image.Image:
    if isinstance(array, Tensor):
        broken = array.is_floating_point() and not bool(array.isfinite().all())
    else:
        broken = np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()
    if broken:
        raise ImageError(f"{label}: holds NaN or infinity, expected uint8 values 0..255")
    if array.dtype not in (torch.uint8, np.uint8):
        raise ImageError(
            f"{label}: expected uint8 values 0..255, got {array.dtype}; scaling a float picture by guesswork would "
            "silently give black or clipped pixels (use (x * 255).round() as uint8 for 0..1)"
        )
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if values.ndim == 3 and _channels_first(values.shape, isinstance(array, Tensor)):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if (
        values.ndim not in (2, 3)
        or 0 in values.shape
        or (values.ndim == 3 and values.shape[2] not in (3, 4))
    ):
        raise ImageError(f"{label}: expected shape [h w 3] or [3 h w], got {list(array.shape)}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(values)), label)


def _channels_first(shape: tuple[int, ...], tensor: bool) -> bool:
    """Whether [a b c] is [channels h w]. If both ends could be: colour before grey, then a tensor's come first."""
    first, last = (size in (3, 4) for size in (shape[0], shape[2]))
    if first and last:
        return tensor
    return first or (shape[0] == 1 and not last and (shape[2] != 1 or tensor))


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{label}: expected at least one pixel, got {image.width}x{image.height}")
    image.load()  # decodes now, so that a truncated file fails here; an animation stays at its first frame
    # Pillow keeps 8-bit values as they are in its own 32-bit modes; a 16-bit file always means 0..65535.
    eight_bit = image.mode in ("I", "F") and image.format not in ("PNG", "PPM")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16- and 32-bit grey
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ImageError(f"{label}: holds NaN or infinity")
        low, high = values.min(), values.max()
        if low < 0 or high > 65535 or (image.mode == "F" and 0 < high <= 1):
            raise ImageError(
                f"{label}: expected grey values 0..255 or 0..65535, got {low:g}..{high:g} (mode {image.mode}); "
                "guessing their scale would give a black or clipped picture"
            )
        top = 255.0 if high <= 255 and eight_bit else 65535.0
        return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")

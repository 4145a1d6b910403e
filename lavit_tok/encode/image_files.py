"""Any image -> upright RGB -> a square of uint8, without torch, whose import takes seconds.

PIL | path | bytes | file | uint8 [h w 3] / [3 h w] array or tensor
-open->    upright RGB PIL image, transparency on a background color
-resize->  uint8 [3 size size]
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

WHITE = (255, 255, 255)
MAX_PIXELS = 89_478_485  # where PIL begins to warn of a decompression bomb; here always an error
MAX_BYTES = 256 << 20  # of an encoded image
MAX_SIDE = 1 << 18  # pixels; resizing a longer image of few pixels takes seconds
STRIP = 1 << 18  # pixels that are converted at a time
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the process or system, not of a file
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
if TYPE_CHECKING:
    Encoded = str | os.PathLike[str] | bytes | bytearray | IO[bytes]
    One = Encoded | Image.Image | np.ndarray | Tensor
    Images = One | Iterable[One]
else:
    # Checked by open(), whose errors name the image.
    Images = Any
ResizeMode = Literal["square", "center_crop", "pad"]


class ImageError(ValueError):
    """An image that cannot be used; the message names the image and the reason."""


@dataclass(frozen=True)
class ImageReader:
    """What processes that only open images need of a `VisualImageProcessor`, which see."""

    size: int
    resize_mode: ResizeMode = "square"
    background: tuple[int, ...] = WHITE
    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS

    def open(self, source: Any, name: str | None = None) -> Image.Image:
        """Open one image as upright RGB; see `open_image`. Raises ImageError."""
        return open_image(source, name, self.background, self.max_bytes, self.max_pixels)

    def resize(self, image: Image.Image, size: int | None = None) -> np.ndarray:
        """Resize an RGB image to a square of side `size`: uint8 [3 size size], contiguous."""
        square = (self.size if size is None else size,) * 2
        if self.resize_mode == "center_crop":
            image = ImageOps.fit(image, square, Image.Resampling.BICUBIC)
        else:
            image = self.pad(image) if self.resize_mode == "pad" else image
            image = image.resize(square, Image.Resampling.BICUBIC)
        return np.array(image).transpose(2, 0, 1).copy()

    def pad(self, image: Image.Image) -> Image.Image:
        """Extend the shorter side with the background color, equally on both sides, to a square."""
        return ImageOps.pad(image, (max(image.size),) * 2, color=self.background)


def open_image(
    source: Any,
    name: str | None = None,
    background: tuple[int, ...] = WHITE,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Open one image as upright 8-bit RGB.

    EXIF rotation is applied, transparent pixels are composited on the background color, CMYK and
    palettes are converted, 16-bit gray is scaled to 8 bits, and of an animation the first frame is
    used. Warnings of Pillow, e.g. of damaged metadata, are not printed: they are in
    `image.info["warnings"]`, a list of str that is absent without any.

    Args:
        source: PIL image, path of a regular file, encoded bytes, binary file, or uint8 [h w 3] /
            [3 h w] / [h w] array or tensor.
        name: name of the image in errors; derived from the source by default.
        background: RGB color under transparent pixels.
        max_bytes: largest encoded size.
        max_pixels: largest number of pixels, compared before any is decoded. Pillow itself refuses
            more than twice PIL.Image.MAX_IMAGE_PIXELS.

    Raises:
        ImageError: unreadable, truncated, empty, too large, not a regular file, or an array of
            wrong dtype, range or shape.
        OSError: too many open files or no memory, which is no reason to skip the image.
    """
    label = name or image_label(source)
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return _from_array(source, label, background)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Pillow warns at its own limit, also of images inside a file; here it is an error.
            action: Literal["error", "ignore"] = "error" if max_pixels <= MAX_PIXELS else "ignore"
            warnings.simplefilter(action, Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                image = _to_rgb(source, label, background)
            else:
                with _opened(source, label, max_bytes) as file, Image.open(file) as opened:
                    size = f"{opened.width}x{opened.height}"
                    if opened.width * opened.height > max_pixels:
                        raise Image.DecompressionBombError(f"{size} pixels")
                    if max(opened.size) > MAX_SIDE:
                        raise ImageError(f"{label}: expected sides up to {MAX_SIDE}, got {size}")
                    if opened.format == "EPS":  # loading it would run Ghostscript on a program
                        reason = "EPS is not supported, expected a raster image"
                        raise ImageError(f"{label}: {reason}")
                    image = _to_rgb(opened, label, background)
        if caught:
            image.info["warnings"] = list(dict.fromkeys(str(w.message).strip() for w in caught))
        return image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{label}: not an image in a format that Pillow supports") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"more than {max_pixels} pixels (decompression bomb?)"
        raise ImageError(f"{label}: {limit}: {error}") from None
    except Exception as error:  # decoders of damaged files raise nearly any exception
        if isinstance(error, OSError) and error.errno in SCARCE:
            raise
        raise ImageError(f"{label}: cannot be read: {error}") from None


@contextmanager
def _opened(source: Any, label: str, max_bytes: int) -> Iterator[Any]:
    """A binary file of at most max_bytes, which is not read before its format is known."""
    if isinstance(source, (str, os.PathLike)):
        # Before it is opened: opening a FIFO waits for a writer, and /dev/zero never ends.
        _require_regular(os.stat(source), label, max_bytes)
        with open(source, "rb") as file:
            yield file
        return
    if isinstance(source, (bytes, bytearray)):
        _require_size(len(source), label, max_bytes)
        source = io.BytesIO(source)
    if not hasattr(source, "read"):
        kinds = "a PIL image, path, bytes or uint8 array"
        raise ImageError(f"{label}: expected {kinds}, got {type(source).__name__}")
    if not (hasattr(source, "seekable") and source.seekable()):
        # Pillow would read all of it, however long it is.
        source = io.BytesIO(source.read(max_bytes + 1))
        _require_size(source.getbuffer().nbytes, label, max_bytes)
    yield source


def _require_regular(status: os.stat_result, label: str, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise ImageError(
            f"{label}: expected a regular file, got {kind}: reading it might never end"
        )
    _require_size(status.st_size, label, max_bytes)


def _require_size(size: int, label: str, max_bytes: int) -> None:
    if size == 0:
        raise ImageError(f"{label}: empty file (0 bytes), expected an encoded image")
    if size > max_bytes:
        raise ImageError(
            f"{label}: expected an encoded image of at most {max_bytes} bytes, got {size}"
        )


def encoded_image(value: Any, label: str) -> bytes | str:
    """The bytes, else the path, of an undecoded image of `datasets`; or the bytes themselves.

    Raises:
        ImageError: neither.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ImageError(f"{label}: the example has no image")
    return value


def as_list(images: Any) -> list[Any]:
    """One image or a batch -> a list; a 4-D array is a batch, a 2-D or 3-D one an image."""
    if isinstance(images, np.ndarray) or _is_tensor(images):
        return list(images) if images.ndim == 4 else [images]
    is_one = isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image))
    if is_one or hasattr(images, "read") or not isinstance(images, Iterable):
        return [images]
    return list(images)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The given files, and the image files of the given folders, recursively in sorted order."""
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        files += [p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file()]
        files += [] if path.is_dir() else [path]
    return files


def _is_tensor(value: Any) -> bool:
    """Whether this is a tensor; nothing is one before torch has been imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def image_label(source: Any) -> str:
    """A path, the name of a file, or the type of anything else, for messages."""
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return str(name) if name else f"<{type(source).__name__}>"


def _from_array(array: Any, label: str, background: tuple[int, ...]) -> Image.Image:
    if _is_tensor(array):
        is_broken = array.is_floating_point() and not bool(array.isfinite().all())
    else:
        is_broken = np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()
    if is_broken:
        raise ImageError(f"{label}: contains NaN or infinity, expected uint8 values 0..255")
    if str(array.dtype) not in ("uint8", "torch.uint8"):
        raise ImageError(
            f"{label}: expected uint8 values 0..255, got {array.dtype}; guessing the scale of a "
            "float image could give black or clipped pixels (use (x * 255).round() as uint8 for "
            "0..1)"
        )
    values = array.detach().cpu().numpy() if _is_tensor(array) else array
    if values.ndim == 3 and _channels_first(values.shape, _is_tensor(array)):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    is_image = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if not is_image or 0 in values.shape:
        raise ImageError(f"{label}: expected shape [h w 3] or [3 h w], got {list(array.shape)}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(values)), label, background)


def _channels_first(shape: tuple[int, ...], is_tensor: bool) -> bool:
    """Whether [a b c] is [channels h w].

    If both ends could be channels: color before gray, then first for tensors, last for arrays.
    """
    first, last = (size in (3, 4) for size in (shape[0], shape[2]))
    if first and last:
        return is_tensor
    return first or (shape[0] == 1 and not last and (shape[2] != 1 or is_tensor))


def _to_rgb(image: Image.Image, label: str, background: tuple[int, ...]) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{label}: expected at least one pixel, got {image.width}x{image.height}")
    # Decode now, so that a truncated file fails here; an animation stays at its first frame.
    image.load()
    # Pillow keeps 8-bit values unscaled in its 32-bit modes; a 16-bit file always has 0..65535.
    may_be_8_bit = image.mode in ("I", "F") and image.format not in ("PNG", "PPM")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # it copies all other images, too
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16- and 32-bit gray
        scale = _gray_scale(image, label, may_be_8_bit)

        def convert(strip: Image.Image) -> Image.Image:
            scaled = np.asarray(strip).astype(np.float64) / scale * 255
            return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8)).convert("RGB")

        return _by_strips(image, convert)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:

        def convert(strip: Image.Image) -> Image.Image:
            strip = strip.convert("RGBA")
            opaque = Image.new("RGBA", strip.size, (*background, 255))
            return Image.alpha_composite(opaque, strip).convert("RGB")

        return _by_strips(image, convert)
    return image.convert("RGB")


def _gray_scale(image: Image.Image, label: str, may_be_8_bit: bool) -> float:
    """The value of white in a 16- or 32-bit gray image: 255 or 65535."""
    low, high = float("inf"), float("-inf")
    for strip in _strips(image):
        values = np.asarray(strip)
        if not np.isfinite(values).all():
            raise ImageError(f"{label}: contains NaN or infinity")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low < 0 or high > 65535 or (image.mode == "F" and 0 < high <= 1):
        raise ImageError(
            f"{label}: expected gray values 0..255 or 0..65535, got {low:g}..{high:g} (mode "
            f"{image.mode}); guessing their scale could give a black or clipped image"
        )
    return 255.0 if high <= 255 and may_be_8_bit else 65535.0


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """Strips of about STRIP pixels from top to bottom."""
    height = max(1, STRIP // image.width)
    for top in range(0, image.height, height):
        yield image.crop((0, top, image.width, min(top + height, image.height)))


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert pixels strip by strip: intermediate results need no memory of the image's size."""
    converted, top = Image.new("RGB", image.size), 0
    for strip in _strips(image):
        converted.paste(convert(strip), (0, top))
        top += strip.height
    return converted

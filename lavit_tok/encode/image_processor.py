"""Any image -> pixels: the one preprocessing object, stored as preprocessor_config.json.

    PIL | path | bytes | file | uint8 [h w 3] / [3 h w] array or tensor
        -open->       upright RGB PIL image, transparency on a background color
        -resize->     uint8 [3 size size]
        -normalize->  float [b 3 size size]

The published LaVIT tokenizer resizes with PIL bicubic to the model's square (aspect ratio not
kept), divides by 255 and normalizes by CLIP's mean and standard deviation. The release contains two
different implementations of this; here every stage shares one `VisualImageProcessor`.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from lavit_tok.checkpoints.weights import find_directory
from lavit_tok.config import ConfigError, read_config, require_known
from lavit_tok.nn.ranges import is_number

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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


class VisualImageProcessor(BaseImageProcessor):
    """Preprocessing of a visual tokenizer: a `transformers` image processor without torchvision.

        a wide image, its middle third white, on a gray background:

        square        both sides resized      black white black
        center_crop   the middle square       white white white
        pad           background above        gray  gray  gray
                      the whole image         black white black
                      background below        gray  gray  gray

    Args:
        size: side of the square output, in pixels.
        resize_mode: "square" resizes both sides whatever the aspect ratio (as published);
            "center_crop" resizes the shorter side and crops the center; "pad" extends the image to
            a square with the background color first. PIL bicubic in each case.
        image_mean: mean of each channel, subtracted after division by 255.
        image_std: standard deviation of each channel.
        background: RGB color, 0..255, under transparent pixels and around padded images.

    The attributes `max_bytes` (256 MiB) and `max_pixels` (89 million) limit the images that `open`
    accepts. They can be set, and are not saved: they depend on the machine, not on the model.
    Images are always decoded at full size (no JPEG draft mode), so that codes depend on no limit.

    Raises:
        ConfigError: naming the argument, what was expected and what was received.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' name and type)

    def __init__(
        self,
        size: int,
        resize_mode: ResizeMode = "square",
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        background: Sequence[int] = WHITE,
    ) -> None:
        super().__init__()
        if type(size) is not int or size < 1:
            raise ConfigError(f"size: expected a positive integer, got {size!r}")
        if resize_mode not in get_args(ResizeMode):
            modes = ", ".join(get_args(ResizeMode))
            raise ConfigError(f"resize_mode: expected one of {modes}, got {resize_mode!r}")
        self.size, self.resize_mode = size, resize_mode
        self.max_bytes, self.max_pixels = MAX_BYTES, MAX_PIXELS
        self.image_mean = _triple("image_mean", image_mean, "finite numbers", is_number)
        self.image_std = _triple(
            "image_std", image_std, "positive numbers", lambda x: is_number(x) and x > 0
        )
        self.background = _triple(
            "background", background, "integers 0..255", lambda x: type(x) is int and 0 <= x <= 255
        )

    def open(self, source: Any, name: str | None = None) -> Image.Image:
        """Open one image as upright RGB; see `open_image`. Raises ImageError."""
        return open_image(source, name, self.background, self.max_bytes, self.max_pixels)

    def resize(self, image: Image.Image, size: int | None = None) -> UInt8[Tensor, "3 size size"]:
        """Resize an RGB image to a square of side `size`, by default the configured one."""
        square = (self.size if size is None else size,) * 2
        if self.resize_mode == "center_crop":
            image = ImageOps.fit(image, square, Image.Resampling.BICUBIC)
        else:
            image = self.pad(image) if self.resize_mode == "pad" else image
            image = image.resize(square, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def pad(self, image: Image.Image) -> Image.Image:
        """Extend the shorter side with the background color, equally on both sides, to a square."""
        return ImageOps.pad(image, (max(image.size),) * 2, color=self.background)

    def to_uint8(self, images: Any) -> UInt8[Tensor, "batch 3 size size"]:
        """Open and resize one image or a batch.

        A uint8 tensor [b 3 size size] is taken to be resized already and is returned unchanged.

        Raises:
            ImageError: naming the first image that cannot be used, and why.
            ValueError: empty batch.
        """
        is_batch = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4
        if is_batch and len(images) and tuple(images.shape[1:]) == (3, self.size, self.size):
            return images
        batch = as_list(images)
        if not batch:
            raise ValueError("expected at least one image, got an empty batch")
        resized = []
        for i, image in enumerate(batch):
            label = _label(image)
            if label.startswith("<"):  # no file name: errors give the index in the batch
                label = f"image {i} of {len(batch)} {label}"
            resized.append(self.resize(self.open(image, label)))
        return torch.stack(resized)

    def normalize(self, pixels: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """uint8 0..255 -> float32 (x / 255 - mean) / std, on the device of `pixels`."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        return (pixels.float() / 255 - mean) / std

    def preprocess(self, images: Images, return_tensors: str | None = "pt") -> BatchFeature:
        """One image or a batch -> {"pixel_values": float [b 3 size size]}; `__call__` calls it."""
        pixel_values = self.normalize(self.to_uint8(images))
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open what processors of `transformers` are given: also URLs and nested lists."""
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(one) for one in source]
        if isinstance(source, str) and not os.path.isfile(source):
            return super().fetch_images(source)
        images = [self.open(one) for one in as_list(source)]
        return images if len(images) != 1 else images[0]

    def to_dict(self) -> dict[str, Any]:
        """The arguments of the constructor, without a class name: no file chooses a class."""
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any]) -> VisualImageProcessor:
        """Raises ConfigError for unknown, missing or invalid entries."""
        require_known(image_processor_dict, set(inspect.signature(cls).parameters))
        return cls(**{"size": None, **image_processor_dict})

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> VisualImageProcessor:
        """Raises ConfigError naming the file."""
        return read_config(json_file, cls.from_dict)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str] = "default", **hub: Any
    ) -> VisualImageProcessor:
        """Load from "default" (shipped), a directory of a tokenizer or processor, or a Hub id.

        Raises:
            ConfigError, WeightsError: unreadable file or directory, or a wrong entry.
        """
        hub.pop("_from_auto", None)  # of AutoImageProcessor
        directory = find_directory(name, "tokenizer", **hub)
        inside = directory / PROCESSOR_NAME  # a processor's file contains its image processor's
        if inside.exists() and not (directory / IMAGE_PROCESSOR_NAME).exists():
            return read_config(inside, lambda x: cls.from_dict(x.get("image_processor", {})))
        return cls.from_json_file(directory / IMAGE_PROCESSOR_NAME)


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
    label = name or _label(source)
    if isinstance(source, (np.ndarray, Tensor)):
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


def as_list(images: Any) -> list[Any]:
    """One image or a batch -> a list; a 4-D array is a batch, a 2-D or 3-D one an image."""
    if isinstance(images, (np.ndarray, Tensor)):
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


def _label(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return str(name) if name else f"<{type(source).__name__}>"


def _from_array(array: np.ndarray | Tensor, label: str, background: tuple[int, ...]) -> Image.Image:
    if isinstance(array, Tensor):
        is_broken = array.is_floating_point() and not bool(array.isfinite().all())
    else:
        is_broken = np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()
    if is_broken:
        raise ImageError(f"{label}: contains NaN or infinity, expected uint8 values 0..255")
    if array.dtype not in (torch.uint8, np.uint8):
        raise ImageError(
            f"{label}: expected uint8 values 0..255, got {array.dtype}; guessing the scale of a "
            "float image could give black or clipped pixels (use (x * 255).round() as uint8 for "
            "0..1)"
        )
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if values.ndim == 3 and _channels_first(values.shape, isinstance(array, Tensor)):
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


def _triple(name: str, values: Any, expected: str, valid: Callable[[Any], bool]) -> tuple[Any, ...]:
    if not (isinstance(values, (list, tuple)) and len(values) == 3 and all(map(valid, values))):
        raise ConfigError(f"{name}: expected 3 {expected}, got {values!r}")
    return tuple(values)

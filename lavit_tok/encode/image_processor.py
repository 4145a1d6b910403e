"""Images -> pixels: the one preprocessing object, stored as preprocessor_config.json.

    PIL | path | bytes | file | uint8 [h w 3] / [3 h w] array or tensor
        -open, resize->  uint8 [3 size size]; see image_files.py
        -normalize->     float [b 3 size size]

The published LaVIT tokenizer resizes with PIL bicubic to the model's square (aspect ratio not
kept), divides by 255 and normalizes by CLIP's mean and standard deviation. The release contains two
different implementations of this; here every stage shares one `VisualImageProcessor`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from lavit_tok.checkpoints.weights import find_directory
from lavit_tok.config import ConfigError, read_config, require_known
from lavit_tok.encode.image_files import (
    MAX_BYTES,
    MAX_PIXELS,
    WHITE,
    ImageReader,
    Images,
    ResizeMode,
    as_list,
    image_label,
)
from lavit_tok.nn.ranges import is_number

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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

    @property
    def reader(self) -> ImageReader:
        """Opens and resizes as this object does, in processes that do not need torch."""
        return ImageReader(
            self.size, self.resize_mode, self.background, self.max_bytes, self.max_pixels
        )

    def open(self, source: Any, name: str | None = None) -> Image.Image:
        """Open one image as upright RGB; see `open_image`. Raises ImageError."""
        return self.reader.open(source, name)

    def resize(self, image: Image.Image, size: int | None = None) -> UInt8[Tensor, "3 size size"]:
        """Resize an RGB image to a square of side `size`, by default the configured one."""
        return torch.from_numpy(self.reader.resize(image, size))

    def pad(self, image: Image.Image) -> Image.Image:
        """Extend the shorter side with the background color, equally on both sides, to a square."""
        return self.reader.pad(image)

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
            label = image_label(image)
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
        return (pixels.float() / 255).sub_(mean).div_(std)

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


def _triple(name: str, values: Any, expected: str, valid: Callable[[Any], bool]) -> tuple[Any, ...]:
    if not (isinstance(values, (list, tuple)) and len(values) == 3 and all(map(valid, values))):
        raise ConfigError(f"{name}: expected 3 {expected}, got {values!r}")
    return tuple(values)

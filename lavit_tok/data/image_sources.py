"""Torch data sets of uint8 squares from the splits of any data set; see splits.py.

split  ->  {"images": uint8 [3 s s], "index": int, "captions": str}
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lavit_tok.data.splits import read_image
from lavit_tok.encode.image_processor import VisualImageProcessor


class Augmentation:
    """Random horizontal flip and random resized crop, a pure function of (seed, epoch, index).

    Args:
        image_processor: resizes to the square; its resize mode applies to crops too.
        flip: probability of a horizontal flip.
        crop_scale: smallest and largest fraction of the image's area that a crop keeps; (1, 1) for
            no crops. Crops keep the aspect ratio.
        seed: seed of all random numbers.
        variants: number of different augmentations of an image, repeated from then on; 0 for
            another one in every epoch.
    """

    def __init__(
        self,
        image_processor: VisualImageProcessor,
        flip: float = 0.0,
        crop_scale: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
        variants: int = 0,
    ):
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale: expected 0 < smallest <= largest <= 1, got {tuple(crop_scale)}"
            )
        self.image_processor = image_processor
        self.flip, self.crop_scale, self.seed = flip, tuple(crop_scale), seed
        self.variants = variants

    @property
    def cache_size(self) -> int:
        """Side at which decoded images are cached, so that no crop has to be enlarged later."""
        return int(np.ceil(self.image_processor.size / self.crop_scale[0] ** 0.5))

    def resized(self, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
        """The image without augmentation."""
        return self.image_processor.resize(image)

    def __call__(self, image: Image.Image, epoch: int, index: int) -> UInt8[Tensor, "3 size size"]:
        epoch = epoch % self.variants if self.variants else epoch
        mixed = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0]
        random = torch.rand(4, generator=torch.Generator().manual_seed(int(mixed))).tolist()
        smallest, largest = self.crop_scale
        side = (smallest + (largest - smallest) * random[0]) ** 0.5  # fraction of both sides
        if side < 1:
            processor = self.image_processor
            if processor.resize_mode == "pad":
                image = processor.pad(image)
            is_cropped = processor.resize_mode == "center_crop"
            width, height = (min(image.size),) * 2 if is_cropped else image.size
            left = (image.width - width) / 2 + random[1] * (1 - side) * width
            top = (image.height - height) / 2 + random[2] * (1 - side) * height
            box = (left, top, left + side * width, top + side * height)
            image = image.resize((processor.size,) * 2, Image.Resampling.BICUBIC, box=box)
        pixels = self.resized(image)
        return pixels.flip(2) if random[3] < self.flip else pixels


class SplitReader:
    """Reads the examples of one split: image, and caption if there is a caption column.

    Args:
        split: the split, its images undecoded.
        column: the image column.
        caption_column: the caption column, or None.
        augment: resizes, and augments when training.
        training: whether to augment.
    """

    def __init__(
        self,
        split: Any,
        column: str,
        caption_column: str | None,
        augment: Augmentation,
        training: bool,
    ):
        self.split, self.column, self.caption_column = split, column, caption_column
        self.augment, self.training = augment, training

    def open(
        self, example: dict[str, Any], index: int
    ) -> tuple[Image.Image | None, dict[str, str] | None]:
        """See `read_image`."""
        opener = self.augment.image_processor.open
        return read_image(example, self.column, f"example {index}", None, opener)

    def sample(
        self, image: Image.Image, epoch: int, index: int, example: dict[str, Any]
    ) -> dict[str, Any]:
        """What a batch is collated from."""
        augment = self.augment
        pixels = augment(image, epoch, index) if self.training else augment.resized(image)
        sample = {"images": pixels, "index": index}
        if self.caption_column:
            sample["captions"] = example[self.caption_column] or ""
        return sample


class MapImages(SplitReader, Dataset):
    """The images of a split by position; a key is an index or (epoch, index).

    With `cache`, every image is decoded once into uint8 [n 3 s s] in memory, and corrupt ones are
    left out. Without, a corrupt image is replaced, in training, by the next readable one (so that
    batches keep their size and a resumed run its order), and left out otherwise.
    """

    def __init__(self, *args: Any, cache: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rejects: list[dict[str, str]] = []
        self.index = torch.arange(len(self.split))
        self.pixels: Tensor | None = None
        self.captions: list[str] | None = None
        if cache:
            self._decode_all()

    def _decode_all(self) -> None:
        processor = self.augment.image_processor
        size = self.augment.cache_size if self.training else processor.size

        def decode(index: int) -> tuple[Tensor | None, Any]:
            image, reject = self.open(self.split[index], index)
            return (None, reject) if image is None else (processor.resize(image, size), None)

        # Threads suffice: Pillow releases the interpreter lock to decode and resize.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pixels = torch.empty(len(self.split), 3, size, size, dtype=torch.uint8)
            readable: list[int] = []
            for index, (square, reject) in enumerate(pool.map(decode, range(len(self.split)))):
                if square is None:
                    self.rejects.append(reject)
                else:
                    pixels[len(readable)] = square
                    readable.append(index)
        self.pixels = pixels[: len(readable)]
        self.index = torch.tensor(readable, dtype=torch.long)
        if self.caption_column:
            column = self.split[self.caption_column]
            self.captions = [column[index] or "" for index in readable]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, position = key if isinstance(key, tuple) else (0, key)
        if self.pixels is not None:
            return self._cached(epoch, position)
        rejects: list[dict[str, str]] = []
        for step in range(len(self) if self.training else 1):
            index = (position + step) % len(self)
            example = self.split[index]
            image, reject = self.open(example, index)
            if image is not None:
                return self.sample(image, epoch, index, example) | {"rejects": rejects}
            rejects.append(reject or {})
        return {"rejects": rejects}

    def _cached(self, epoch: int, position: int) -> dict[str, Any]:
        assert self.pixels is not None
        pixels, index = self.pixels[position], int(self.index[position])
        if self.training:
            image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            pixels = self.augment(image, epoch, index)
        captions = {"captions": self.captions[position]} if self.captions else {}
        return {"images": pixels, "index": index} | captions


class StreamImages(SplitReader, IterableDataset):
    """The images of a streamed split, of this rank's and this worker's shards.

    Not exactly resumable: a resumed run restarts the stream. `index` counts within this reader.
    """

    epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.split.set_epoch(self.epoch)
        # `datasets` gives each worker its shards; here the worker only makes indices distinct.
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        for count, example in enumerate(self.split):
            index = count * workers + number
            image, reject = self.open(example, index)
            if image is None:
                yield {"rejects": [reject]}
            else:
                yield self.sample(image, self.epoch, index, example)


def collate(samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Collate samples to {"images": uint8 [b 3 s s], "index": int64 [b], "captions", "rejects"}.

    Corrupt images are in "rejects" only; without any readable image there is no "images".
    """
    samples = list(samples)
    rejects = [reject for sample in samples for reject in sample.get("rejects", ())]
    readable = [sample for sample in samples if "images" in sample]
    batch: dict[str, Any] = {"rejects": rejects}
    if readable:
        batch["images"] = torch.stack([sample["images"] for sample in readable])
        batch["index"] = torch.tensor([sample["index"] for sample in readable], dtype=torch.long)
        if "captions" in readable[0]:
            batch["captions"] = [sample["captions"] for sample in readable]
    return batch

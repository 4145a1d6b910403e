"""Where pictures come from: any data set that `datasets` can open -> torch data sets of uint8 squares.

    folder | parquet | webdataset | arrow | Hub name  ->  {split: rows}  ->  {"images": uint8 [3 s s], "index": int}

Encoded bytes are fetched undecoded (`datasets.Image(decode=False)`) and opened by `lavit_tok.encode.image_processor`, so a corrupt
picture costs one row, which is reported as a reject, and not the batch or the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lavit_tok.encode.image_processor import ImageError, VisualImageProcessor, open_image

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
KEY_COLUMNS = ("key", "__key__", "id", "file_name")
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


def load_splits(data: str, streaming: bool = False) -> dict[str, Any]:
    """Open a data set: path of an image folder, parquet, webdataset tars or an arrow folder, or a Hub name.

    Returns: {split name: Dataset or IterableDataset}.

    Raises:
        ValueError: nothing readable is there; the message names the path or name and the reason.
    """
    path = Path(data)
    try:
        if path.is_dir() and (
            (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        ):
            found = datasets.load_from_disk(data)
            found = found if isinstance(found, dict) else {"train": found}
            return {
                name: rows.to_iterable_dataset() if streaming else rows
                for name, rows in found.items()
            }
        suffix = path.suffix if not path.is_dir() else ".tar" if any(path.glob("*.tar")) else ""
        if suffix in BUILDERS:
            files = str(path / "*.tar") if path.is_dir() else data
            return dict(
                datasets.load_dataset(BUILDERS[suffix], data_files=files, streaming=streaming)
            )
        return dict(datasets.load_dataset(data, streaming=streaming))
    except Exception as error:  # the builders raise many kinds; the reader needs one line
        raise ValueError(
            f"{data}: expected an image folder, parquet, webdataset tars, an arrow folder or a Hub name: {error}"
        ) from error


def undecoded(rows: Any, image_column: str) -> tuple[Any, str]:
    """Cast the image column to encoded bytes; if `image_column` is absent, take the one column that holds pictures."""
    if rows.features is None:
        rows = rows._resolve_features()
    names = list(rows.features)
    if image_column not in names:
        typed = [name for name in names if isinstance(rows.features[name], datasets.Image)]
        found = typed or [name for name in IMAGE_COLUMNS if name in names]
        if not found:
            raise ValueError(
                f"expected an image column {image_column!r}, got columns {', '.join(names)}"
            )
        image_column = found[0]
    return rows.cast_column(image_column, datasets.Image(decode=False)), image_column


def row_key(
    row: dict[str, Any], column: str, fallback: str, key_columns: Iterable[str] = KEY_COLUMNS
) -> str:
    """What to call a row: the first of the key columns that says something, or the picture's path, or the fallback."""
    path = (row[column] or {}).get("path")
    return next(
        (str(row[name]) for name in key_columns if row.get(name) is not None), path or fallback
    )


def read_row(
    row: dict[str, Any],
    column: str,
    fallback: str,
    key: str | None = None,
    opener: Callable[..., Image.Image] = open_image,
) -> tuple[Image.Image | None, dict[str, str] | None]:
    """Open one row's picture: (picture, None), or (None, reject) with the row's key and the reason."""
    value = row[column] or {}
    key = key or row_key(row, column, fallback)
    source = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    try:
        if source is None:
            raise ImageError(f"{key}: no picture in this row")
        return opener(source, name=key), None
    except ImageError as error:
        return None, {"key": key, "reason": str(error)}


class Augmentation:
    """Random flip and mild random resized crop; a pure function of (seed, epoch, index), never of global state.

    Args:
        image_processor: resizes to the square; its resize mode applies to crops too.
        flip: probability of a left-right flip.
        crop_scale: least and greatest share of the picture's area that a crop keeps; (1, 1) crops nothing.
        seed: first of the three numbers that seed each picture's generator.
    """

    def __init__(
        self,
        image_processor: VisualImageProcessor,
        flip: float = 0.0,
        crop_scale: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
    ):
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale: expected 0 < least <= greatest <= 1, got {tuple(crop_scale)}"
            )
        self.image_processor = image_processor
        self.flip, self.crop_scale, self.seed = flip, tuple(crop_scale), seed

    @property
    def cache_size(self) -> int:
        """Side at which to keep decoded pictures, so that no crop has to be enlarged afterwards."""
        return int(np.ceil(self.image_processor.size / self.crop_scale[0] ** 0.5))

    def resized(self, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
        """The picture without any draw."""
        return self.image_processor.resize(image)

    def __call__(self, image: Image.Image, epoch: int, index: int) -> UInt8[Tensor, "3 size size"]:
        word = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0]
        draw = torch.rand(4, generator=torch.Generator().manual_seed(int(word))).tolist()
        least, greatest = self.crop_scale
        side = (
            least + (greatest - least) * draw[0]
        ) ** 0.5  # aspect ratio is kept: the same share of both sides
        if side < 1:
            processor = self.image_processor
            if processor.resize_mode == "pad":
                image = processor.pad(image)
            is_cropped = processor.resize_mode == "center_crop"
            width, height = (min(image.size),) * 2 if is_cropped else image.size
            left = (image.width - width) / 2 + draw[1] * (1 - side) * width
            top = (image.height - height) / 2 + draw[2] * (1 - side) * height
            box = (left, top, left + side * width, top + side * height)
            image = image.resize((processor.size,) * 2, Image.Resampling.BICUBIC, box=box)
        pixels = self.resized(image)
        return pixels.flip(2) if draw[3] < self.flip else pixels


class MapImages(Dataset):
    """Rows of one split by position; a key is an index or (epoch, index).

    With `cache`, every picture is decoded once into uint8 [n 3 s s] held in memory and corrupt rows are left out.
    Without, a corrupt row is replaced, when training, by the next readable one (batches keep their size and a resumed
    run its order), and left out otherwise.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        caption_column: str | None,
        augment: Augmentation,
        training: bool,
        cache: bool,
    ):
        self.rows, self.column, self.caption_column = rows, column, caption_column
        self.augment, self.training = augment, training
        self.rejects: list[dict[str, str]] = []
        self.index = torch.arange(len(rows))
        self.pixels: Tensor | None = None
        self.captions: list[str] | None = None
        if cache:
            self._decode_all()

    def _decode_all(self) -> None:
        size = self.augment.cache_size if self.training else self.augment.image_processor.size

        def decode(index: int) -> tuple[Tensor | None, Any]:
            processor = self.augment.image_processor
            image, reject = read_row(
                self.rows[index], self.column, f"row {index}", None, processor.open
            )
            return (None, reject) if image is None else (processor.resize(image, size), None)

        with ThreadPoolExecutor(
            os.cpu_count()
        ) as pool:  # Pillow decodes and resizes outside the interpreter lock
            pixels = torch.empty(len(self.rows), 3, size, size, dtype=torch.uint8)
            kept: list[int] = []
            for index, (square, reject) in enumerate(pool.map(decode, range(len(self.rows)))):
                if square is None:
                    self.rejects.append(reject)
                else:
                    pixels[len(kept)] = square
                    kept.append(index)
        self.pixels, self.index = pixels[: len(kept)], torch.tensor(kept, dtype=torch.long)
        if self.caption_column:
            column = self.rows[self.caption_column]
            self.captions = [column[index] or "" for index in kept]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, position = key if isinstance(key, tuple) else (0, key)
        if self.pixels is not None:
            return self._cached(epoch, position)
        rejects: list[dict[str, str]] = []
        for step in range(len(self) if self.training else 1):
            index = (position + step) % len(self)
            row = self.rows[index]
            image, reject = read_row(
                row, self.column, f"row {index}", None, self.augment.image_processor.open
            )
            if image is not None:
                pixels = (
                    self.augment(image, epoch, index)
                    if self.training
                    else self.augment.resized(image)
                )
                sample = {"images": pixels, "index": index, "rejects": rejects}
                return sample | (
                    {"captions": row[self.caption_column] or ""} if self.caption_column else {}
                )
            rejects.append(reject or {})
        return {"rejects": rejects}

    def _cached(self, epoch: int, position: int) -> dict[str, Any]:
        assert self.pixels is not None
        pixels, index = self.pixels[position], int(self.index[position])
        if self.training:
            image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            pixels = self.augment(image, epoch, index)
        return {"images": pixels, "index": index} | (
            {"captions": self.captions[position]} if self.captions else {}
        )


class StreamImages(IterableDataset):
    """Rows of a streamed split, each rank and each worker its own shards. Not exactly resumable: a resumed run starts
    the stream again. `index` counts within this reader."""

    def __init__(
        self,
        rows: Any,
        column: str,
        caption_column: str | None,
        augment: Augmentation,
        training: bool,
    ):
        self.rows, self.column, self.caption_column = rows, column, caption_column
        self.augment, self.training, self.epoch = augment, training, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.rows.set_epoch(self.epoch)
        worker = (
            get_worker_info()
        )  # `datasets` gives each worker its shards; the number only keeps the indices apart
        for count, row in enumerate(self.rows):
            index = count * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
            image, reject = read_row(
                row, self.column, f"row {index}", None, self.augment.image_processor.open
            )
            if image is None:
                yield {"rejects": [reject]}
                continue
            pixels = (
                self.augment(image, self.epoch, index)
                if self.training
                else self.augment.resized(image)
            )
            yield {"images": pixels, "index": index} | (
                {"captions": row[self.caption_column] or ""} if self.caption_column else {}
            )


def collate(samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> {"images": uint8 [b 3 s s], "index": int64 [b], "captions": list, "rejects": list}, corrupt ones only
    among the rejects."""
    samples = list(samples)
    rejects = [reject for sample in samples for reject in sample.get("rejects", ())]
    good = [sample for sample in samples if "images" in sample]
    batch: dict[str, Any] = {"rejects": rejects}
    if good:
        batch["images"] = torch.stack([sample["images"] for sample in good])
        batch["index"] = torch.tensor([sample["index"] for sample in good], dtype=torch.long)
        if "captions" in good[0]:
            batch["captions"] = [sample["captions"] for sample in good]
    return batch

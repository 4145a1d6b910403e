"""Images of a data set under the protocol's crop.

    data set -> records, evenly spaced -> shorter side to S, bicubic, center crop -> uint8 [n 3 S S]

The reference of every measurement is these same crops, never the raw files: other crops are the
first reason why numbers for one model differ.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.cache import progress
from lavit_tok import VisualImageProcessor
from lavit_tok.data.splits import example_key, load_splits, read_image, undecoded


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, cropped to the protocol's square, with their columns."""

    pixels: Tensor
    """uint8 [n 3 S S]."""
    keys: list[str]
    """Name of each image, relative to the data set."""
    captions: list[str]
    """The `caption` column; empty strings where it has none."""
    sources: list[str] | None
    """The `source` column of a mixed set; None if the data set has none."""
    rejects: list[dict[str, str]]
    """Records without a usable image: key and reason."""
    split: str
    total: int
    """Records of the split, of which these were taken evenly spaced."""
    cropped: bool
    """Center crop; False: the whole image, resized to a square."""

    def __len__(self) -> int:
        return len(self.pixels)

    def describe(self) -> str:
        """One line for a report."""
        form = "center crop" if self.cropped else "resized to"
        text = f"{len(self)} images, evenly spaced over the {self.total} of split {self.split!r}, "
        text += f"{form} {self.pixels.shape[-1]}x{self.pixels.shape[-1]}"
        return text + (f"; {len(self.rejects)} bad records skipped" if self.rejects else "")

    def record(self) -> dict[str, Any]:
        """For a result file: which images, how many, and every unusable record by name."""
        counts = {"images": len(self), "bad_records": len(self.rejects)}
        return {"set": self.describe(), **counts, "rejects": self.rejects}

    def groups(self, indices: list[int]) -> dict[str, list[int]]:
        """Source -> positions in `indices` of its images, for a mixed set."""
        found: dict[str, list[int]] = {}
        for position, index in enumerate(indices if self.sources else ()):
            found.setdefault(self.sources[index], []).append(position)
        return found

    def with_caption(self) -> list[int]:
        """Indices of the images that have a caption."""
        return [i for i, caption in enumerate(self.captions) if caption.strip()]


def load_images(
    data: str, size: int, split: str | None = None, limit: int | None = None, crop: bool = True
) -> ImageSet:
    """Open a data set through `datasets` and crop its images.

    Args:
        data: image folder, parquet, webdataset or arrow path, or Hub name.
        size: S, the side of the crop in pixels.
        split: test, else validation, else the first by default.
        limit: at most this many records, evenly spaced over a set that may be sorted.
        crop: False resizes the whole image to a square, as published LaVIT does.

    Raises:
        ValueError: unreadable data, unknown split, or not one usable image.
    """
    splits = load_splits(data)
    name = split or next((s for s in ("test", "validation") if s in splits), next(iter(splits)))
    if name not in splits:
        raise ValueError(f"{data}: expected a split of {sorted(splits)}, got {name!r}")
    processor = VisualImageProcessor(size, "center_crop" if crop else "square")
    records, column = undecoded(splits[name], "image")

    def read(index: int) -> tuple[Tensor | None, dict[str, str], dict[str, Any]]:
        record = records[index]
        key = example_key(record, column, f"record {index}")
        image, reject = read_image(record, column, f"record {index}", key)
        if image is None:
            reason = (reject or {})["reason"].replace(key, _relative(key, data))
            return None, {"key": _relative(key, data), "reason": reason}, record
        return processor.resize(image), {"key": _relative(key, data)}, record

    indices = evenly_spaced(limit or len(records), len(records))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the interpreter lock
        results = list(progress(pool.map(read, indices), "images"))
    good = [(pixels, note["key"], record) for pixels, note, record in results if pixels is not None]
    rejects = [note for pixels, note, _ in results if pixels is None]
    if not good:
        raise ValueError(f"{data}: no usable image in split {name!r} ({len(rejects)} bad records)")
    sources = [record["source"] for _, _, record in good if record.get("source") is not None]
    return ImageSet(
        pixels=torch.stack([pixels for pixels, _, _ in good]),
        keys=[key for _, key, _ in good],
        captions=[record.get("caption") or "" for _, _, record in good],
        sources=list(map(str, sources)) if len(sources) == len(good) else None,
        rejects=rejects,
        split=name,
        total=len(records),
        cropped=crop,
    )


def training_captions(data: str) -> frozenset[str]:
    """All captions of the train split, normalized; none if there is no such split."""
    train = load_splits(data).get("train")
    if train is None or "caption" not in train.column_names:
        return frozenset()
    return frozenset(normalized(caption) for caption in train["caption"] if caption)


def first_line(text: str) -> str:
    """The first line of a generated text, in single spaces."""
    return " ".join(next(iter(text.strip().splitlines()), "").split())


def normalized(caption: str) -> str:
    """Lower case, single spaces."""
    return " ".join(caption.lower().split())


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of the indices 0..total-1, evenly spaced; all of them if there are no more."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _relative(key: str, data: str) -> str:
    """A key without this machine's folders."""
    path, folder = Path(key), Path(data).resolve()
    inside = path.is_relative_to(folder)
    return (
        path.relative_to(folder).as_posix() if inside else path.name if path.is_absolute() else key
    )

"""Pictures under the protocol's crop.

    data set -datasets-> rows, evenly spaced -> shorter side to S, bicubic, centre cut SxS, RGB -> uint8 [n 3 S S]

The reference of every measurement is these same crops, never the raw files: other crops are the first reason why two
people's numbers for one model differ.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from common import evenly, short
from parts import progress
from torch import Tensor

from lavit_tok.data.image_sources import load_splits, read_row, row_key, undecoded
from lavit_tok.encode.image_processor import VisualImageProcessor


@dataclass(frozen=True)
class Pictures:
    """Pictures of one split, cropped to the protocol's square."""

    pixels: Tensor
    """uint8 [n 3 S S]."""
    groups: list[str] | None
    """Each picture's `source` column; None if the data set has none."""
    rejects: list[dict[str, str]]
    """Rows without a usable picture: key and reason."""
    split: str
    total: int
    """Rows of the split, of which these were taken evenly spaced."""
    cropped: bool
    """Centre crop; False: the whole picture, resized to a square."""
    keys: list[str]
    """What each picture is called."""
    captions: list[str]
    """Each picture's `caption` column; empty where it has none."""

    def __len__(self) -> int:
        return len(self.pixels)

    def describe(self) -> str:
        size = self.pixels.shape[-1]
        form = "crop" if self.cropped else "resized to"
        text = f"{len(self)} pictures, evenly spaced over the {self.total} of split {self.split!r}, {form} {size}x{size}"
        return text + (f"; {len(self.rejects)} bad rows skipped" if self.rejects else "")

    def record(self) -> dict[str, Any]:
        """For a result file: which pictures, how many, and every row without a usable one, by name."""
        bad = {"bad_rows": len(self.rejects), "rejects": self.rejects}
        return {"set": self.describe(), "images": len(self), **bad}

    def batches(self, size: int) -> Iterator[Tensor]:
        return iter(self.pixels.split(size))


def load_pictures(
    data: str, size: int, split: str | None = None, limit: int | None = None, crop: bool = True
) -> Pictures:
    """Open a data set through `datasets` and crop its pictures.

    Args:
        data: image folder, parquet, webdataset or arrow path, or Hub name.
        size: S, the side of the crop in pixels.
        split: which split; by default test, else validation, else the first there is.
        limit: at most this many rows, evenly spaced over the split, so that no source of a sorted set is left out.
        crop: False resizes the whole picture to a square, as a tokenizer without `crop` in its config does.

    Raises:
        ValueError: unreadable data, unknown split, or not one usable picture.
    """
    splits = load_splits(data)
    name = split or next((s for s in ("test", "validation") if s in splits), next(iter(splits)))
    if name not in splits:
        raise ValueError(f"{data}: expected a split of {sorted(splits)}, got {name!r}")
    rows, column = undecoded(splits[name], "image")
    total = len(rows)
    count = total if limit is None else limit
    places = evenly(count, total)

    processor = VisualImageProcessor(size, "center_crop" if crop else "square")

    def read(place: int) -> tuple[Tensor | None, dict[str, str] | None, dict[str, Any]]:
        row = rows[place]
        key = row_key(row, column, f"row {place}")
        image, reject = read_row(row, column, f"row {place}", key, processor.open)
        texts = {"key": key, "source": row.get("source"), "caption": row.get("caption") or ""}
        return (None if image is None else processor.resize(image)), reject, texts

    with ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # Pillow decodes and resizes outside the interpreter lock
        found = list(progress(pool.map(read, places), "pictures", len(places)))
    pixels = [p for p, _, _ in found if p is not None]
    rejects = [_nameable(r) for _, r, _ in found if r is not None]
    if not pixels:
        raise ValueError(
            f"{data}: not one usable picture in split {name!r} ({len(rejects)} bad rows)"
        )
    texts = [t for p, _, t in found if p is not None]
    groups = [str(t["source"]) for t in texts if t["source"] is not None]
    return Pictures(
        pixels=torch.stack(pixels),
        groups=groups if len(groups) == len(pixels) else None,
        rejects=rejects,
        split=name,
        total=total,
        cropped=crop,
        keys=[t["key"] for t in texts],
        captions=[t["caption"] for t in texts],
    )


def _nameable(reject: dict[str, str]) -> dict[str, str]:
    """A reject for a result file: of an absolute path only the last part, as in the stamp."""
    key = reject["key"]
    return {"key": short(key), "reason": reject["reason"].replace(key, short(key))}


def reference_pictures(data: str, size: int, limit: int, fallback: Pictures) -> Pictures:
    """Pictures over which data-set means are taken: the train split if there is one, else the measured set itself."""
    return load_pictures(data, size, "train", limit) if "train" in load_splits(data) else fallback


def count_groups(groups: Sequence[str]) -> list[str]:
    """Names of the groups, the largest first."""
    return [name for name, _ in Counter(groups).most_common()]

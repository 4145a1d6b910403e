"""What `lavit-tok shards` reads: one split of a captioned data set, its pictures opened and resized in any process.

    row of the data set  ->  (row number, key, caption, uint8 [3 s s] or the reason why there is none)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lavit_tok.images import resize
from lavit_tok.training.sources import KEY_COLUMNS, read_row, row_key, undecoded

CAPTION_COLUMNS = ("caption", "text", "txt")


@dataclass(frozen=True)
class Picture:
    """One row of the data set. `reason` says why its picture cannot be read; None if it can."""

    row: int
    key: str
    caption: str
    pixels: Tensor | None
    """uint8 [3 s s]."""
    reason: str | None = None


class Pictures(Dataset):
    """The pictures of one split, by row number.

    Args:
        rows: the split, a map-style `datasets.Dataset`.
        data: where it is from; a file's key is its path relative to it.
        image_column, caption_column, key_column: see `lavit-tok shards --help`.
        size, crop: the tokenizer's.

    Raises:
        ValueError: naming a column that is not there, or that holds no text.
    """

    def __init__(
        self,
        rows: Any,
        data: str,
        image_column: str = "image",
        caption_column: str | None = None,
        key_column: str | None = None,
        size: int = 64,
        crop: bool = False,
    ) -> None:
        rows, self.image_column = undecoded(rows, image_column)
        self.caption_column = _caption_column(rows.features, caption_column, data)
        self.key_column = key_column
        if key_column is not None and not isinstance(rows.features.get(key_column), datasets.Value):
            raise ValueError(f"{data}: expected a key column {key_column!r}, got columns {', '.join(rows.features)}")
        self.key_columns = [name for name in KEY_COLUMNS if isinstance(rows.features.get(name), datasets.Value)]
        self.key_columns = self.key_columns if key_column is None else [key_column]
        used = [self.image_column, self.caption_column, *self.key_columns]
        self.rows = rows.select_columns(list(dict.fromkeys(name for name in used if name)))
        self.root, self.size, self.crop = f"{Path(data).absolute()}/", size, crop

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Picture:
        row = self.rows[number]
        key, caption = self._key(row, number), self._caption(row)
        image, reject = read_row(row, self.image_column, key, key)
        if image is None:
            assert reject is not None
            return Picture(number, key, caption, None, reject["reason"].removeprefix(f"{key}: "))
        return Picture(number, key, caption, resize(image, self.size, self.crop))

    def digest(self) -> str:
        """16 hexadecimal digits of every row's key, caption and encoded size: equal for the same data set elsewhere."""
        sha = hashlib.sha256()
        for number, row, size in self._rows_without_pictures():
            sha.update(json.dumps([self._key(row, number), self._caption(row), size]).encode())
        return sha.hexdigest()[:16]

    def _rows_without_pictures(self) -> Iterator[tuple[int, dict[str, Any], int | None]]:
        """(number, row, encoded size): the bytes of a picture stay where they are, on disk mapped to memory."""
        number = 0
        for table in self.rows.with_format("arrow").iter(1000):
            image = table[self.image_column]
            sizes = pc.binary_length(pc.struct_field(image, "bytes")).to_pylist()
            paths = pc.struct_field(image, "path").to_pylist()
            for row, path, size in zip(table.drop_columns([self.image_column]).to_pylist(), paths, sizes, strict=True):
                yield number, {**row, self.image_column: {"path": path}}, size
                number += 1

    def _key(self, row: dict[str, Any], number: int) -> str:
        return row_key(row, self.image_column, f"row {number}", self.key_columns).removeprefix(self.root)

    def _caption(self, row: dict[str, Any]) -> str:
        return row[self.caption_column] or "" if self.caption_column else ""


def collate(pictures: Sequence[Picture]) -> tuple[list[Picture], Tensor | None]:
    """(pictures without pixels, uint8 [m 3 s s] of those that can be read): one tensor to pass between processes."""
    pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
    bare = [Picture(p.row, p.key, p.caption, None, p.reason) for p in pictures]
    return bare, torch.stack(pixels) if pixels else None


def _caption_column(features: Any, name: str | None, data: str) -> str | None:
    """The column of captions; None if name is "". Raises ValueError."""
    if name == "":
        return None
    wanted = CAPTION_COLUMNS if name is None else (name,)
    found = next((column for column in wanted if column in features), None)
    if found is None or getattr(features[found], "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"{data}: expected a caption column {' or '.join(map(repr, wanted))} of text, got columns "
            f"{', '.join(features)}: name it by --caption-column; '' there means pictures without captions"
        )
    return found

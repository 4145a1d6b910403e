"""What shards are made from: pictures of a captioned data set, opened in any process, and their codes.

rows of the data set  -Pictures->  OpenedImages: keys, captions, uint8 [m 3 s s], reasons  -encode->  rows of a shard
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from lavit_tok.data.image_sources import KEY_COLUMNS, read_row, row_key, undecoded
from lavit_tok.data.shard_manifest import Settings, ShardRecord
from lavit_tok.encode.image_processor import VisualImageProcessor
from lavit_tok.tokenizer import VisualTokenizer

CAPTION_COLUMNS = ("caption", "text", "txt")


@dataclass(frozen=True)
class Entry:
    """What one row of the data set says besides its pixels."""

    row: int
    key: str
    caption: str
    reason: str | None
    """Why its picture cannot be read; None if it can."""


@dataclass(frozen=True)
class OpenedImages:
    """Consecutive rows of the data set."""

    entries: list[Entry]
    pixels: UInt8[Tensor, "m 3 size size"]
    """The m pictures that can be read. One tensor: each costs a file descriptor on its way between processes."""


class SplitImages(Dataset):
    """The pictures of one split: pictures[range(5, 8)] opens three of them.

    Args:
        rows: the split, a map-style `datasets.Dataset`.
        data: where it is from; a file's key is its path relative to it.
        image_processor: the tokenizer's.
        image_column, caption_column, key_column: see `lavit-tok shards --help`.

    Raises:
        ValueError: naming a column that is not there, or that holds no text.
    """

    def __init__(
        self,
        rows: Any,
        data: str,
        image_processor: VisualImageProcessor,
        image_column: str = "image",
        caption_column: str | None = None,
        key_column: str | None = None,
    ) -> None:
        rows, self.image_column = undecoded(rows, image_column)
        self.caption_column = _caption_column(rows.features, caption_column, data)
        self.key_column = key_column
        if key_column is not None and not isinstance(rows.features.get(key_column), datasets.Value):
            raise ValueError(
                f"{data}: expected a key column {key_column!r}, got columns {', '.join(rows.features)}"
            )
        self.key_columns = [
            name for name in KEY_COLUMNS if isinstance(rows.features.get(name), datasets.Value)
        ]
        self.key_columns = self.key_columns if key_column is None else [key_column]
        used = [self.image_column, self.caption_column, *self.key_columns]
        self.rows = rows.select_columns(list(dict.fromkeys(name for name in used if name)))
        self.root, self.image_processor = f"{Path(data).absolute()}/", image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: range) -> OpenedImages:
        size = self.image_processor.size
        entries, pixels = [], [torch.empty(0, 3, size, size, dtype=torch.uint8)]
        for number in numbers:
            row = self.rows[number]
            key = self._key(row, number)
            image, reject = read_row(row, self.image_column, key, key, self.image_processor.open)
            reason = reject["reason"].removeprefix(f"{key}: ") if reject else None
            entries.append(Entry(number, key, self._caption(row), reason))
            if image is not None:
                pixels.append(self.image_processor.resize(image)[None])
        return OpenedImages(entries, torch.cat(pixels))

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
            for row, path, size in zip(
                table.drop_columns([self.image_column]).to_pylist(), paths, sizes, strict=True
            ):
                size = (
                    os.path.getsize(path)
                    if size is None and path and os.path.isfile(path)
                    else size
                )
                yield number, {**row, self.image_column: {"path": path}}, size
                number += 1

    def _key(self, row: dict[str, Any], number: int) -> str:
        return row_key(row, self.image_column, f"row {number}", self.key_columns).removeprefix(
            self.root
        )

    def _caption(self, row: dict[str, Any]) -> str:
        return row[self.caption_column] or "" if self.caption_column else ""


def weights_digest(tokenizer: VisualTokenizer) -> str:
    """16 hexadecimal digits of the preprocessing, the config and the weights that codes follow from."""
    settings = [tokenizer.image_processor.to_dict(), tokenizer.config.to_dict()]
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for room in (tokenizer.encoder, tokenizer.selector, tokenizer.merger, tokenizer.quantizer):
        for name, tensor in room.state_dict().items():
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def encode(
    tokenizer: VisualTokenizer, opened: OpenedImages, settings: Settings
) -> list[ShardRecord]:
    """Rows of the pictures that can be read; with mirror, each is followed by its mirror image's."""
    good = [entry for entry in opened.entries if entry.reason is None]
    if not good:
        return []
    views = [opened.pixels, opened.pixels.flip(3)] if settings.flip else [opened.pixels]
    columns: list[list[ShardRecord]] = []
    for flipped, pixels in enumerate(views):
        codes = tokenizer.encode(pixels, settings.budget).to("cpu")
        assert codes.keep is not None  # codes of pictures always know their patches
        kept = [mask.nonzero().flatten().tolist() for mask in codes.keep]
        rows = zip(good, codes.to_list(), kept, strict=True)
        columns.append(
            [
                ShardRecord(e.key, e.caption, values, patches, bool(flipped))
                for e, values, patches in rows
            ]
        )
    return [row for pair in zip(*columns, strict=True) for row in pair]


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

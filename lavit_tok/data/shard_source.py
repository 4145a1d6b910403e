"""The images of a captioned data set, opened in any process, and their codes as shard records.

split -SplitImages-> OpenedImages: keys, captions, uint8 [m 3 s s], reasons -encode-> ShardRecords
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

from lavit_tok.data.image_sources import KEY_COLUMNS, example_key, read_image, undecoded
from lavit_tok.data.shard_manifest import ShardConfig, ShardRecord
from lavit_tok.encode.image_processor import VisualImageProcessor
from lavit_tok.tokenizer import VisualTokenizer

CAPTION_COLUMNS = ("caption", "text", "txt")


@dataclass(frozen=True)
class ExampleInfo:
    """An example of the data set without its pixels."""

    index: int
    key: str
    caption: str
    reason: str | None
    """Why its image cannot be read; None if it can."""


@dataclass(frozen=True)
class OpenedImages:
    """Consecutive examples of the data set."""

    examples: list[ExampleInfo]
    pixels: UInt8[Tensor, "m 3 size size"]
    """The m readable images. One tensor, since each needs a file descriptor between processes."""


class SplitImages(Dataset):
    """The images of one split: `images[range(5, 8)]` opens three of them.

    Args:
        split: a map-style `datasets.Dataset`.
        data: the path of the data set; keys that are file paths are relative to it.
        image_processor: the tokenizer's.
        image_column, caption_column, key_column: see `lavit-tok shards --help`.

    Raises:
        ValueError: naming a column that does not exist, or that is not text.
    """

    def __init__(
        self,
        split: Any,
        data: str,
        image_processor: VisualImageProcessor,
        image_column: str = "image",
        caption_column: str | None = None,
        key_column: str | None = None,
    ) -> None:
        split, self.image_column = undecoded(split, image_column)
        columns = split.features
        self.caption_column = _caption_column(columns, caption_column, data)
        self.key_column = key_column
        if key_column is not None and not isinstance(columns.get(key_column), datasets.Value):
            raise ValueError(
                f"{data}: expected a key column {key_column!r}, got columns {', '.join(columns)}"
            )
        default = [name for name in KEY_COLUMNS if isinstance(columns.get(name), datasets.Value)]
        self.key_columns = default if key_column is None else [key_column]
        used = [self.image_column, self.caption_column, *self.key_columns]
        self.split = split.select_columns(list(dict.fromkeys(name for name in used if name)))
        self.root, self.image_processor = f"{Path(data).absolute()}/", image_processor

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, indices: range) -> OpenedImages:
        processor = self.image_processor
        examples = []
        pixels = [torch.empty(0, 3, processor.size, processor.size, dtype=torch.uint8)]
        for index in indices:
            example = self.split[index]
            key = self._key(example, index)
            image, reject = read_image(example, self.image_column, key, key, processor.open)
            reason = reject["reason"].removeprefix(f"{key}: ") if reject else None
            examples.append(ExampleInfo(index, key, self._caption(example), reason))
            if image is not None:
                pixels.append(processor.resize(image)[None])
        return OpenedImages(examples, torch.cat(pixels))

    def digest(self) -> str:
        """16 hexadecimal digits of every key, caption and encoded size; independent of the path."""
        sha = hashlib.sha256()
        for index, example, size in self._without_images():
            content = [self._key(example, index), self._caption(example), size]
            sha.update(json.dumps(content).encode())
        return sha.hexdigest()[:16]

    def _without_images(self) -> Iterator[tuple[int, dict[str, Any], int | None]]:
        """(index, example, encoded size), without reading the bytes of the memory-mapped images."""
        index = 0
        for table in self.split.with_format("arrow").iter(1000):
            image = table[self.image_column]
            sizes = pc.binary_length(pc.struct_field(image, "bytes")).to_pylist()
            paths = pc.struct_field(image, "path").to_pylist()
            examples = table.drop_columns([self.image_column]).to_pylist()
            for example, path, size in zip(examples, paths, sizes, strict=True):
                if size is None and path and os.path.isfile(path):
                    size = os.path.getsize(path)
                yield index, {**example, self.image_column: {"path": path}}, size
                index += 1

    def _key(self, example: dict[str, Any], index: int) -> str:
        key = example_key(example, self.image_column, f"example {index}", self.key_columns)
        return key.removeprefix(self.root)

    def _caption(self, example: dict[str, Any]) -> str:
        return example[self.caption_column] or "" if self.caption_column else ""


def weights_digest(tokenizer: VisualTokenizer) -> str:
    """16 hexadecimal digits of the preprocessing, config and weights that codes depend on."""
    configs = [tokenizer.image_processor.to_dict(), tokenizer.config.to_dict()]
    sha = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
    for stage in ("encoder", "selector", "error_heads", "merger", "quantizer"):
        module = getattr(tokenizer, stage, None)  # nested codes have error heads, no selector
        for name, tensor in module.state_dict().items() if module is not None else ():
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def encode(
    tokenizer: VisualTokenizer, images: OpenedImages, config: ShardConfig
) -> list[ShardRecord]:
    """Records of the readable images; with flip, each is followed by that of its flip."""
    readable = [example for example in images.examples if example.reason is None]
    if not readable:
        return []
    views = [images.pixels, images.pixels.flip(3)] if config.flip else [images.pixels]
    columns: list[list[ShardRecord]] = []
    for flipped, pixels in enumerate(views):
        codes = tokenizer.encode(pixels, config.budget).to("cpu")
        assert codes.keep is not None  # codes of images always have a keep mask
        keep = [mask.nonzero().flatten().tolist() for mask in codes.keep]
        columns.append(
            [
                ShardRecord(example.key, example.caption, values, patches, bool(flipped))
                for example, values, patches in zip(readable, codes.to_list(), keep, strict=True)
            ]
        )
    return [record for pair in zip(*columns, strict=True) for record in pair]


def _caption_column(columns: Any, name: str | None, data: str) -> str | None:
    """The caption column; None if name is "", or there is none. Raises ValueError."""
    names = CAPTION_COLUMNS if name is None else (name,)
    column = next((n for n in names if n in columns), None)
    if name == "" or (name is None and column is None):
        return None
    if column is None or getattr(columns[column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"{data}: expected a caption column {' or '.join(map(repr, names))} of text, got "
            f"columns {', '.join(columns)}: name it with --caption-column; '' for images without "
            "captions"
        )
    return column

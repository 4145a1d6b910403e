"""The images of a captioned data set in blocks, read in any process: at random, or as streams.

    SplitImages       one part, whose blocks are ranges of examples
    StreamedImages    a part for each input file (tar, parquet), read from its start

    shard size 4      SplitImages, ten images     |0 1 2 3| |4 5 6 7| |8 9|
                      StreamedImages, two files   |0 1 2 3| |4|   |0 1 2|

A block becomes one shard. Its name is a function of part and number, and its digest of its
examples, so that neither depends on who reads it, or when.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from lavit_tok.data.open_batch import open_batch
from lavit_tok.data.ray_engine import Work
from lavit_tok.data.remote_files import fetch, is_url, root_folder, set_readers, sizes
from lavit_tok.data.shard_manifest import ShardError, SplitColumns, shard_name
from lavit_tok.data.splits import KEY_COLUMNS, example_key, undecoded
from lavit_tok.encode.image_files import ImageReader

CAPTION_COLUMNS = ("caption", "text", "txt")
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
EXAMPLES = pa.schema(
    {
        "file": pa.string(),  # of the shard
        "index": pa.int64(),  # in the part; -1 in the only record of a part without examples
        "end": pa.int8(),  # BLOCK_END or PART_END for the last example of a block
        "size": pa.int64(),  # of the encoded image, in bytes
        "key": pa.string(),
        "caption": pa.string(),
        "image": IMAGE,
    }
)
BLOCK_END, PART_END = 1, 2
Example = dict[str, Any]


class ImageSource:
    """What both kinds of sources share.

    Args:
        split: a `datasets.Dataset` or `datasets.IterableDataset`.
        data: the path of the data set; keys that are file paths are relative to it.
        reader: that of the tokenizer's image processor.
        image_column, caption_column, key_column: see `lavit-tok shards --help`.

    Raises:
        ValueError: naming a column that does not exist, or that is not text.
    """

    parts: int | None = None

    def __init__(
        self,
        split: Any,
        data: str,
        reader: ImageReader,
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
        self.root, self.reader = root_folder(data), reader

    @property
    def columns(self) -> SplitColumns:
        """The arguments that must be the same when a job is resumed."""
        return SplitColumns(self.image_column, self.caption_column, self.key_column, self.parts)

    def _example(self, example: Example, number: int, size: int | None) -> Example:
        """A record without the columns about blocks."""
        key = example_key(example, self.image_column, f"example {number}", self.key_columns)
        caption = example[self.caption_column] or "" if self.caption_column else ""
        image = example[self.image_column] or {}
        path = image.get("path")
        if size is None and path and os.path.isfile(path):
            size = os.path.getsize(path)
        return {
            "key": key.removeprefix(self.root),
            "caption": caption,
            "size": size,
            "image": image,
        }


class SplitImages(ImageSource):
    """The images of a map-style split."""

    def __len__(self) -> int:
        return len(self.split)

    def work(self, name: str, size: int, step: int, done: dict[str, str]) -> list[Work]:
        """All blocks, in pieces of `step` examples except those that are done.

        Args:
            name: of the split.
            size: examples of a block.
            step: pieces begin at multiples of it, counted from the start of a block.
            done: shards that exist -> digests of their examples.
        """
        work = []
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            piece = size if shard_name(name, start // size) in done else step
            work += [Work(0, at, min(at + piece, stop)) for at in range(start, stop, piece)]
        return work

    def batches(
        self, work: Work, name: str, size: int, step: int, done: dict[str, str]
    ) -> Iterator[pa.Table]:
        """Decoded batches of at most `step` images, of blocks that are not done.

        Raises:
            ShardError: a block that is done was made from other examples.
        """
        assert work.stop is not None
        file = shard_name(name, work.start // size)
        if file in done:
            _require_digest(file, done[file], digest(self.examples(work.start, work.stop)))
            return
        block_end = min((work.start // size + 1) * size, len(self))
        for start in range(work.start, work.stop, step):
            columns = self.split[start : min(start + step, work.stop)]
            images = columns[self.image_column] = _with_bytes(columns[self.image_column])
            rows = []
            for i, image in enumerate(images):
                example = {column: columns[column][i] for column in columns}
                content = (image or {}).get("bytes")
                row = self._example(example, start + i, None if content is None else len(content))
                end = 0
                if start + i + 1 == block_end:
                    end = PART_END if block_end == len(self) else BLOCK_END
                rows.append({"file": file, "index": start + i, "end": end, **row})
            yield open_batch(pa.Table.from_pylist(rows, EXAMPLES), self.reader)

    def path(self, index: int) -> str | None:
        """That of the image of an example whose bytes are in a file of their own."""
        path: str | None = (self.split[index][self.image_column] or {}).get("path")
        return path

    def decoded(self, index: int) -> pa.Table:
        """One example; see `open_batch`."""
        (table,) = self.batches(Work(0, index, index + 1), "", len(self), 1, {})
        return table

    def examples(self, start: int, stop: int) -> Iterator[Example]:
        """Keys, captions and encoded sizes, without reading the bytes of memory-mapped images."""
        split = self.split.with_format("arrow")
        for first in range(start, stop, 1000):
            table = split[first : min(first + 1000, stop)]
            image = table[self.image_column]
            lengths = pc.binary_length(pc.struct_field(image, "bytes")).to_pylist()
            paths = pc.struct_field(image, "path").to_pylist()
            remote = {i: p for i, p in enumerate(paths) if lengths[i] is None and is_url(p)}
            for i, size in zip(remote, sizes([*remote.values()]), strict=True):
                lengths[i] = size
            others = table.drop_columns([self.image_column]).to_pylist()
            for i, (example, path, size) in enumerate(zip(others, paths, lengths, strict=True)):
                yield self._example({**example, self.image_column: {"path": path}}, first + i, size)


class StreamedImages(ImageSource):
    """The images of a streaming split, in as many parts as it has input files.

    A resumed job reads the files with missing blocks again, from their start; the images of blocks
    that are done are not decoded. Files all of whose blocks are done are not read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts: int = self.split.num_shards

    def work(self, name: str, size: int, step: int, done: dict[str, str]) -> list[Work]:
        """All parts; see `SplitImages.work`."""
        return [Work(part) for part in range(self.parts)]

    def batches(
        self, work: Work, name: str, size: int, step: int, done: dict[str, str]
    ) -> Iterator[pa.Table]:
        """See `SplitImages.batches`."""
        stream = self._stream(work.part)
        following = next(stream, None)
        if following is None:
            rows = [{"file": shard_name(name, 0, work.part), "index": -1, "end": PART_END}]
            yield open_batch(pa.Table.from_pylist(rows, EXAMPLES), self.reader)
        block = 0
        while following is not None:
            file = shard_name(name, block, work.part)
            examples = itertools.chain([following], itertools.islice(stream, size - 1))
            if file in done:
                _require_digest(file, done[file], digest(examples))
                following = next(stream, None)
            else:
                index = block * size
                rows = []
                following = next(examples, None)
                for example in itertools.chain(examples, [None]):
                    assert following is not None
                    ahead = example if example is not None else next(stream, None)
                    end = 0 if example is not None else BLOCK_END if ahead else PART_END
                    rows.append({"file": file, "index": index, "end": end, **following})
                    index, following = index + 1, ahead
                    if len(rows) == step or end:
                        table = pa.Table.from_pylist(rows, EXAMPLES)
                        yield open_batch(table, self.reader)
                        rows = []
            block += 1

    def _stream(self, part: int) -> Iterator[Example]:
        set_readers()
        stream = iter(self.split.shard(self.parts, part))
        for number in itertools.count():
            try:
                example = next(stream, None)
            except Exception as error:  # the readers raise many kinds
                raise ShardError(
                    f"{self.root}: input file {part + 1} of {self.parts} cannot be read: {error}"
                ) from error
            if example is None:
                return
            (image,) = _with_bytes([example[self.image_column] or {}])
            content = image.get("bytes")
            size = None if content is None else len(content)
            example = {**example, self.image_column: image}
            yield self._example(example, number, size)


def digest(examples: Iterable[Example]) -> str:
    """16 hexadecimal digits of keys, captions and encoded sizes; independent of the path."""
    sha = hashlib.sha256()
    for example in examples:
        content = [example["key"], example["caption"], example["size"]]
        sha.update(json.dumps(content).encode())
    return sha.hexdigest()[:16]


def _with_bytes(images: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """The images with the bytes of those at URLs."""
    found = [dict(image or {}) for image in images]
    remote = [i for i in found if i.get("bytes") is None and is_url(i.get("path"))]
    for image, content in zip(remote, fetch([i["path"] for i in remote]), strict=True):
        image["bytes"] = content
    return found


def _require_digest(file: str, before: str, now: str) -> None:
    if before != now:
        raise ShardError(
            f"{file}: its images have other keys, captions or file sizes than when it was made "
            f"(digest {before!r}, now {now!r}): use the same data set, or another --out, as shards "
            "of both would be mixed"
        )


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

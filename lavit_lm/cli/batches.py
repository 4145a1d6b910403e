"""Batch jobs of `lavit-lm generate` and `caption`: items in blocks, resumed where they stopped.

    prompts.jsonl  -read_items->  items  -in blocks of 256->  DIR/000000.jsonl, 000001.jsonl, ...

The file of a block appears when all its results are there. Its first line has the options, a digest
of the block's items and the items that were skipped; the others a result each. The same command
makes the blocks that are missing; other options or items are refused. The random numbers of an item
depend on the seed and its key only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavit_tok.checkpoints.files import atomic, exclusive_folder, json_line
from lavit_tok.cli.items import REJECTS, chunks, progress
from lavit_tok.data.rejects import Rejects

Result = dict[str, Any]
LOCK = ".lock"
"""What exclusive_folder leaves in the folder of a job."""


@dataclass(frozen=True)
class Item:
    """One input of a batch job."""

    number: int
    """Counted from 0, skipped ones included."""
    key: str
    content: Any
    """A prompt, the path of an image, or its codes; a ValueError if the item cannot be used."""


@dataclass(frozen=True)
class Computed:
    """What an engine makes of an item."""

    number: int
    """Of the item."""
    results: tuple[Result, ...] = ()
    images: tuple[tuple[str, bytes], ...] = ()
    """Files beside the results: path in the folder of the job, and content."""
    reason: str | None = None
    """Why the item is skipped."""


Compute = Callable[[Sequence[Item]], list[Computed]]
Engine = Callable[[Iterator[list[Item]]], Iterator[Computed]]
"""Computes the items of blocks, in any order."""


def compute_here(compute: Compute, batch_size: int) -> Engine:
    """The engine that computes in this process."""

    def engine(blocks: Iterator[list[Item]]) -> Iterator[Computed]:
        for block in blocks:
            for batch in chunks(block, batch_size):
                yield from compute_items(compute, batch)

    return engine


def compute_items(compute: Compute, items: Sequence[Item]) -> Iterator[Computed]:
    """A batch; after a ValueError each item by itself, and those that raise it are skipped."""
    try:
        done = compute(items)
    except ValueError as failed:
        if len(items) == 1:
            done = [Computed(items[0].number, reason=str(failed))]
        else:
            done = [one for item in items for one in compute_items(compute, [item])]
    yield from done


@dataclass
class _Block:
    """A file in the making."""

    path: Path
    header: dict[str, Any]
    keys: dict[int, str]
    """Of the items by number."""
    done: list[Computed]


@dataclass(frozen=True)
class BatchJob:
    """A job over any number of items.

    Args:
        out: folder of the results.
        header: what the first line of each file states, and must be equal to resume.
        engine: computes the items.
        block_size: items of a file.
        overwrite: make files again that exist.
    """

    out: Path
    header: dict[str, Any]
    engine: Engine
    block_size: int
    overwrite: bool = False

    def run(self, items: Iterable[Item], title: str) -> tuple[int, Rejects]:
        """(results of all files, skipped items), with a progress bar of this title.

        Raises:
            ValueError: a file of other options or items, or another process in this folder.
            AllSkippedError: no item could be used.
        """
        count = 0
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / LOCK).exists():
            raise ValueError(f"{self.out}: expected a new or empty folder, or one of this command")
        blocks: dict[int, _Block] = {}
        with exclusive_folder(self.out), Rejects(self.out / REJECTS) as rejects:

            def missing() -> Iterator[list[Item]]:
                nonlocal count
                for number, items_of_block in enumerate(chunks(iter(items), self.block_size)):
                    block, usable = self._begin(number, items_of_block)
                    if block.path.exists() and not self.overwrite:
                        results, skipped = self._existing(block.path, block.header)
                        rejects.items += skipped
                        count += results
                    elif not usable:
                        self._write(block, rejects)
                    else:
                        blocks[number] = block
                        yield usable

            for one in progress(self.engine(missing()), title):
                number = one.number // self.block_size
                block = blocks[number]
                block.done.append(one)
                if len(block.done) == len(block.keys):
                    count += self._write(blocks.pop(number), rejects)
            assert not blocks, f"blocks that are not complete: {[*blocks]}"
            rejects.require(count)
        return count, rejects

    def _begin(self, number: int, items: list[Item]) -> tuple[_Block, list[Item]]:
        """(a block, the items to compute); the others have their reasons already."""
        contents = json.dumps([[item.key, _digestible(item.content)] for item in items])
        digest = hashlib.sha256(contents.encode()).hexdigest()[:16]
        invalid = [item for item in items if isinstance(item.content, ValueError)]
        block = _Block(
            self.out / f"{number:06d}.jsonl",
            {**self.header, "items": digest},
            {item.number: item.key for item in items},
            [Computed(item.number, reason=str(item.content)) for item in invalid],
        )
        return block, [item for item in items if not isinstance(item.content, ValueError)]

    def _write(self, block: _Block, rejects: Rejects) -> int:
        """Write the files of a block, its results last; returns their number."""
        done = sorted(block.done, key=lambda one: one.number)
        before = len(rejects.items)
        for one in done:
            if one.reason is not None:
                rejects.add(block.keys[one.number], ValueError(one.reason))
            for name, content in one.images:
                with atomic(self.out / name) as partial:
                    partial.write_bytes(content)
        listed = [{"key": key, "reason": reason} for key, reason in rejects.items[before:]]
        lines = [result for one in done for result in one.results]
        with atomic(block.path) as partial:
            text = "".join(map(json_line, [{**block.header, "rejects": listed}, *lines]))
            partial.write_text(text, encoding="utf-8")
        return len(lines)

    def _existing(self, path: Path, expected: dict[str, Any]) -> tuple[int, list[tuple[str, str]]]:
        """(number of results, skipped items) of a file that is not made again."""
        try:
            with open(path, encoding="utf-8") as file:
                found = json.loads(next(file))
                results = sum(1 for _ in file)
            changed = [name for name in expected if found[name] != expected[name]]
            skipped = [(reject["key"], reject["reason"]) for reject in found["rejects"]]
        except (ValueError, KeyError, TypeError, StopIteration):
            raise ValueError(
                f"{path}: not written by this command: use another --out, or --overwrite"
            ) from None
        if changed:
            listed = ", ".join(
                f"{name} {found[name]!r}, now {expected[name]!r}" for name in changed
            )
            raise ValueError(
                f"{path}: was made with other values of {listed}: use the same ones, another "
                "--out, or --overwrite"
            )
        return results, skipped


def item_generator(seed: int, key: str, image: int = 0) -> torch.Generator:
    """The random numbers of one image of an item, whatever is computed beside it."""
    digest = hashlib.sha256(f"{seed} {image} {key}".encode(errors="surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def read_prompts(path: Path, split: str = "train") -> Iterator[Item]:
    """The prompts of a file, or the captions of a folder of shards.

    Args:
        path: .jsonl with lines {"prompt": text, "key": text}, .parquet with these columns, or what
            `lavit-tok shards` wrote. Without a key, it is the number of the line.
        split: of shards.

    Raises:
        ValueError: another file. ShardError.
        OSError: a file that cannot be read.
    """
    if path.is_dir():
        records: Iterable[Any] = _shard_records(path, split, ["key", "caption"])
        records = ({"key": record["key"], "prompt": record["caption"]} for record in records)
    elif path.suffix == ".jsonl":
        records = _json_lines(path)
    elif path.suffix == ".parquet":
        records = _parquet_records([path], None)
    else:
        raise ValueError(f"{path}: expected a .jsonl or .parquet file, or a folder of shards")
    for number, record in enumerate(records):
        values = record if isinstance(record, dict) else {}
        key, prompt = str(values.get("key", number)), values.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            content: Any = ValueError(f"expected a prompt that is a text, got {prompt!r:.60}")
            yield Item(number, key, content)
        else:
            yield Item(number, key, prompt)


def read_shards(path: Path, split: str, fingerprint: str) -> Iterator[Item]:
    """The codes of a folder of shards, as lists. Raises ShardError."""
    for number, record in enumerate(_shard_records(path, split, ["key", "codes"], fingerprint)):
        yield Item(number, record["key"], record["codes"])


def _shard_records(
    path: Path, split: str, columns: list[str], fingerprint: str | None = None
) -> Iterator[dict[str, Any]]:
    from lavit_tok import Shards

    shards = Shards.open(path, split)
    shards.require(fingerprint=fingerprint)
    return _parquet_records(shards.files, columns)


def _parquet_records(paths: Sequence[Path], columns: list[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        try:
            with open(path, "rb") as opened, pq.ParquetFile(opened) as file:
                names = columns or [n for n in ("key", "prompt") if n in file.schema_arrow.names]
                if "prompt" not in names and columns is None:
                    got = ", ".join(file.schema_arrow.names)
                    raise ValueError(f"{path}: expected a column 'prompt', got {got}")
                for batch in file.iter_batches(1024, columns=names):
                    yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"{path}: not a complete parquet file: {error}") from None


def _json_lines(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None


def _digestible(content: Any) -> Any:
    """The part of an item that a resumed job compares; of an image the size of its file."""
    if isinstance(content, Path):
        return content.stat().st_size if content.exists() else None
    return str(content) if isinstance(content, ValueError) else content

"""Writing shards: tokenize a captioned data set once, in a job that can be stopped and resumed.

    source -engine: decode, encode-> tables of codes, in any order -ShardJob-> a file for each block

An engine is only a way to map batches; one process writes. A shard depends only on its own images
and the config, and appears as a whole, so a killed job is resumed by any engine.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import worker
from tqdm import tqdm

from lavit_tok.checkpoints.files import AnyPath, atomic, exclusive_folder, is_remote, put
from lavit_tok.data.ray_engine import RayOptions, Work, encode_on_ray, ray_cluster
from lavit_tok.data.rejects import AllSkippedError
from lavit_tok.data.shard_footers import (
    complete_parts,
    existing_shards,
    require_same,
    write_manifest,
)
from lavit_tok.data.shard_manifest import (
    MANIFEST,
    Manifest,
    ShardConfig,
    ShardError,
    read_footer,
    shard_bytes,
    shard_position,
)
from lavit_tok.data.shard_source import (
    PART_END,
    SplitImages,
    StreamedImages,
    digest,
)
from lavit_tok.data.splits import hold_out, load_splits
from lavit_tok.data.tokenize_batch import tokenize_batch, weights_digest
from lavit_tok.tokenizer import VisualTokenizer

AT_ONCE = 4  # batches that are encoded at a time on CPUs


def write_shards(
    data: str,
    out: AnyPath,
    tokenizer_name: str,
    tokenizer: VisualTokenizer,
    split: str | None = None,
    columns: Sequence[str | None] = ("image", None, None),
    budget: int | float | None = None,
    flip: bool = False,
    shard_size: int = 4096,
    batch_size: int = 32,
    num_workers: int = 0,
    streaming: bool = False,
    ray: RayOptions | None = None,
) -> list[str]:
    """Tokenize splits of a data set; see `lavit-tok shards --help`.

    Args:
        data: directory, file, URL or Hub id of the data set.
        out: directory or URL of the shards; a run that was stopped is resumed.
        tokenizer_name: "default", directory or Hub id of the tokenizer, for the manifest.
        tokenizer: encodes the images.
        split: the only split to tokenize; None for all, and for a validation split of held-out
            training images if there is none.
        columns: of images, captions and keys.
        budget: codes per image, or their ratio of the patches; None leaves it to the selector.
        flip: add the horizontal flip of each image.
        shard_size: images per shard.
        batch_size: images per batch.
        num_workers: processes that read images; 0 for none.
        streaming: read the input files in order, without a copy of the data set on this machine.
        ray: run on Ray; None runs in this process.

    Returns:
        A summary of each split.

    Raises:
        ShardError: the folder has shards of another config or data set.
        ValueError: a data set, split or column that cannot be read.
        OSError: a file that cannot be written.
    """
    config = ShardConfig(
        tokenizer=tokenizer_name,
        fingerprint=tokenizer.fingerprint(),
        weights=weights_digest(tokenizer),
        codebook_size=tokenizer.config.codebook_size,
        patches=tokenizer.config.num_patches,
        budget=budget,
        batch_size=batch_size if isinstance(budget, float) else None,
        flip=flip,
        shard_size=shard_size,
    )
    engine: Any = partial(encode_here, tokenizer=tokenizer, num_workers=num_workers)
    if ray is not None:
        engine = partial(encode_on_ray, tokenizer=tokenizer_name, options=ray)
    kind: Any = StreamedImages if streaming else SplitImages
    summaries = []
    with exclusive_folder(out), nullcontext() if ray is None else ray_cluster(ray) as started:
        given = load_splits(data, streaming)
        splits = given
        if split is None and not streaming:
            splits = hold_out(given, columns[0] or "image")
        names = list(splits) if split is None else [split]
        if missing := set(names) - set(splits):
            raise ValueError(f"{data}: expected a split {missing.pop()!r}, got {', '.join(splits)}")
        if invalid := [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]:
            raise ValueError(f"{data}: split {invalid[0]!r} cannot be part of a file name")
        if started is not None:
            started()
        for name in names:
            source = kind(splits[name], data, tokenizer.image_processor.reader, *columns)
            job = ShardJob(out, name, source, config, data)
            job.run(engine, batch_size, shard_size if ray else batch_size)
            held_out = ", held out of train by content" if name not in given else ""
            summaries.append(job.summary() + held_out)
    return summaries


class ShardJob:
    """The shards of one split.

    Raises:
        ShardError: the folder has shards of another config or data set.
    """

    def __init__(
        self, out: AnyPath, name: str, source: Any, config: ShardConfig, data: str
    ) -> None:
        if isinstance(source, SplitImages) and not len(source):
            raise ValueError(f"{data}: split {name!r} is empty")
        self.out, self.name, self.source, self.config, self.data = out, name, source, config, data
        self.size = config.shard_size
        self.shards = existing_shards(out, name)
        self.resumed = len(self.shards)
        before: list[dict[str, Any]] = []
        # Config and name of the data set are kept as first given.
        if (out / MANIFEST).exists():
            manifest = Manifest.read(out)
            self.config = manifest.config
            before.append(asdict(manifest.config))
            if name in manifest.splits:
                listed = manifest.splits[name].source
                self.data = listed.data or data
                before.append({field: getattr(listed, field) for field in asdict(source.columns)})
        for shard in self.shards.values():
            self.config = shard.footer.config
            before.append(asdict(shard.footer.config) | asdict(shard.footer.columns))
        for values in before:
            require_same(out, values, asdict(config) | asdict(source.columns))
        for file, shard in self.shards.items() if isinstance(source, SplitImages) else ():
            start = self._first(file)
            if start >= len(source) or shard.footer.last != (start + self.size >= len(source)):
                raise ShardError(
                    f"{out / file}: made from a data set of another number of images than the "
                    f"{len(source)} of {data}: use the same data set, or another --out"
                )

    def run(self, engine: Any, batch_size: int, step: int) -> None:
        """Make the missing shards, then the manifest.

        Args:
            engine: maps (work, read, config) to tables of codes of the batches of `read(item)` for
                each item of work, in any order.
            batch_size: images of a batch.
            step: images of an item of work, if the source can be read at random.

        Raises:
            OSError: a file cannot be written.
            ShardError: the data set has changed since the other shards were made.
            ValueError: no image can be read.
        """
        done = {file: shard.footer.digest for file, shard in self.shards.items()}
        size, source = self.size, self.source
        work = source.work(self.name, size, step, done)
        total = None
        if source.parts is None:
            total = len(source)
        else:
            complete = complete_parts(self.name, self.shards)
            work = [item for item in work if item.part not in complete]
        read = partial(source.batches, name=self.name, size=size, step=batch_size, done=done)
        blocks: dict[str, list[pa.Table]] = {}
        before = sum(shard.footer.images for shard in self.shards.values())
        images = codes = rejects = 0
        description = f"shards {self.name}"
        with tqdm(
            None, description, total, unit=" images", file=sys.stderr, disable=None, initial=before
        ) as progress:
            for table in engine(work, read, self.config):
                files = pc.unique(table["file"]).to_pylist()
                for file in files:
                    one = len(files) == 1
                    rows = table if one else table.filter(pc.equal(table["file"], file))
                    blocks.setdefault(file, []).append(rows)
                    if whole := self._whole(file, blocks[file]):
                        self._save(file, *whole)
                        del blocks[file]
                count = len(pc.unique(table["index"])) if self.config.flip else len(table)
                progress.update(count)
                images += count
                codes += pc.sum(table["length"]).as_py() or 0
                rejects += len(table) - table["reason"].null_count
                mean = codes / max(1, images)
                progress.set_postfix_str(f"{mean:.1f} codes/image, {rejects} skipped", False)
        assert not blocks, f"blocks without an end: {[*blocks]}"
        write_manifest(self.out, self.name, self.shards, self.data)
        bad = [reject for shard in self.shards.values() for reject in shard.footer.rejects]
        if not sum(shard.footer.images for shard in self.shards.values()):
            raise ValueError(f"{self.data}: split {self.name!r} is empty")
        if not sum(shard.footer.records for shard in self.shards.values()):
            raise AllSkippedError(
                f"none of {len(bad)} images of split {self.name!r} could be used; the first is "
                f"{bad[0]['key']}: {bad[0]['reason']}"
            )

    def summary(self) -> str:
        """One line."""
        footers = [shard.footer for shard in self.shards.values()]
        records, codes = sum(f.records for f in footers), sum(f.codes for f in footers)
        text = (
            f"{self.name}: {records} records of {sum(f.images for f in footers)} images, "
            f"{codes / records:.1f} codes per image ({self.config.patches} patches), "
            f"{len(footers)} shards"
        )
        text += f", {self.resumed} of them from earlier runs" if self.resumed else ""
        text += "" if self.source.caption_column else ", without captions"
        if rejects := sum(len(footer.rejects) for footer in footers):
            text += f"; {rejects} skipped, listed in {self.out / self.name}.rejects.jsonl"
        return text

    def _first(self, file: str) -> int:
        """Index in the part of the first example of a shard."""
        position = shard_position(self.name, file)
        assert position is not None
        return position[1] * self.size

    def _whole(self, file: str, tables: list[pa.Table]) -> tuple[pa.Table, bool] | None:
        """(all examples of a shard in order, whether it is the last of its part), if complete."""
        if not any(table["end"][-1].as_py() for table in tables):
            return None
        table = pa.concat_tables(sorted(tables, key=lambda table: table["index"][0].as_py()))
        index, end = table["index"][-1].as_py(), table["end"][-1].as_py()
        if index < 0:  # a part without examples
            return table.slice(1), True
        if not end or index - self._first(file) + 1 != len(_images(table)):
            return None
        return table, end == PART_END

    def _save(self, file: str, table: pa.Table, last: bool) -> None:
        corrupt = table["reason"].is_valid()
        images, first = _images(table), self._first(file)
        rejects = table.filter(corrupt).select(["key", "reason", "index"]).to_pylist()
        self._require_unseen(table.filter(pc.and_(corrupt, table["size"].is_null()))["index"])
        footer = {
            "split": self.name,
            "columns": self.source.columns,
            "last": last,
            "images": len(images),
            "digest": digest(images.select(["key", "caption", "size"]).to_pylist()),
            "rejects": [{**reject, "index": reject["index"] - first} for reject in rejects],
        }
        content, shard = shard_bytes(table.filter(pc.invert(corrupt)), footer, self.config)
        try:
            self._write(file, content)
        except OSError as error:
            raise OSError(
                f"{self.out / file} cannot be written: {error.strerror or error}. "
                f"{len(self.shards)} shards are complete; the same command resumes after them"
            ) from error
        self.shards[file] = shard

    def _require_unseen(self, missing: pa.ChunkedArray) -> None:
        """Raise ShardError if an image whose file was not found is on this machine."""
        for index in missing.to_pylist() if isinstance(self.source, SplitImages) else ():
            path = self.source.path(index)
            if path and os.path.isfile(path):
                raise ShardError(
                    f"{path}: not found by the process that was to open it, but it is here: the "
                    "paths of the images must be the same on all machines. "
                    f"{len(self.shards)} shards are complete; the same command resumes after them"
                )

    def _write(self, file: str, content: bytes) -> None:
        """Raises ShardError if another job has written another shard to an object store."""
        path = self.out / file
        if not is_remote(path):
            with atomic(path) as partial_file:
                partial_file.write_bytes(content)
            return
        try:
            put(path, content, once=True)
        except FileExistsError:
            try:
                other = read_footer(path)
            except ShardError:  # damaged
                put(path, content)
                return
            if other.sha256 != hashlib.sha256(content).hexdigest():
                raise ShardError(
                    f"{path}: another job has written it meanwhile, from another data set or with "
                    "other options: wait until it ends, or choose another --out"
                ) from None


class _Batches(IterableDataset):
    """The batches of all work, of which each loading process reads a part."""

    def __init__(self, work: list[Work], read: Any) -> None:
        self.work, self.read = work, read

    def __iter__(self) -> Iterator[pa.Table]:
        info = get_worker_info()
        # Streams of `datasets` would divide each input file's examples among the processes again.
        worker._worker_info = None
        for item in self.work[info.id :: info.num_workers] if info else self.work:
            yield from self.read(item)


def encode_here(
    work: list[Work],
    read: Any,
    config: ShardConfig,
    tokenizer: VisualTokenizer,
    num_workers: int,
) -> Iterator[pa.Table]:
    """The engine that `write_shards` uses: images are read in `num_workers` processes.

    On CPUs up to AT_ONCE batches are encoded at a time, among which torch's threads are divided:
    they wait neither for reading and writing, nor for each other after every operation.
    """
    batches = _read(DataLoader(_Batches(work, read), batch_size=None, num_workers=num_workers))
    threads = torch.get_num_threads()
    encoders = min(threads, AT_ONCE) if tokenizer.device.type == "cpu" else 1
    share = (threads // encoders,)
    waiting: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(encoders, "encode", torch.set_num_threads, share) as pool:
        try:
            for batch in batches:
                waiting.append(
                    pool.submit(tokenize_batch, batch, tokenizer, config.budget, config.flip)
                )
                if len(waiting) > 2 * encoders:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # that of new threads too


def _read(loader: Any) -> Iterator[pa.Table]:
    batches = iter(loader)
    while True:
        try:
            batch = next(batches, None)
        except ShardError as error:  # of a process: with its traceback as text
            raise ShardError(str(error).strip().rpartition("ShardError: ")[2]) from error
        if batch is None:
            return
        yield batch


def _images(table: pa.Table) -> pa.Table:
    """The examples, without flips."""
    flips = "flipped" in table.column_names
    images = table.filter(pc.invert(table["flipped"])) if flips else table
    return images.filter(pc.greater_equal(images["index"], 0))

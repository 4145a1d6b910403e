"""Writing shards: tokenize a captioned data set once, in a job that can be stopped and resumed.

A shard depends only on its own images and the config, and each file is written as a whole: the
parquet file, the rejects, then the manifest. Shards that the manifest does not list are made again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from lavit_tok.data.files import atomic, exclusive_folder
from lavit_tok.data.image_sources import hold_out, load_splits
from lavit_tok.data.rejects import AllSkippedError, write_rejects
from lavit_tok.data.shard_manifest import (
    MANIFEST,
    Manifest,
    Shard,
    ShardConfig,
    ShardedSplit,
    ShardError,
    ShardRecord,
    SplitSource,
    sha256,
    shard_names,
    write_shard,
)
from lavit_tok.data.shard_source import SplitImages, encode, weights_digest
from lavit_tok.tokenizer import VisualTokenizer

RejectsByIndex = dict[int, dict[str, Any]]
"""Index in the data set -> {"key", "reason", "index"}."""


def write_shards(
    data: str,
    out: Path,
    tokenizer_name: str,
    tokenizer: VisualTokenizer,
    split: str | None = None,
    columns: Sequence[str | None] = ("image", None, None),
    budget: int | float | None = None,
    flip: bool = False,
    shard_size: int = 4096,
    batch_size: int = 32,
    num_workers: int = 0,
) -> list[str]:
    """Tokenize splits of a data set; see `lavit-tok shards --help`.

    Args:
        data: directory, file or Hub id of the data set.
        out: directory of the shards; a run that was stopped is resumed.
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

    Returns:
        A summary of each split.

    Raises:
        ShardError: the folder has shards of another config or data set.
        ValueError: a data set, split or column that cannot be read.
        OSError: a file that cannot be written.
    """
    given = load_splits(data)
    splits = hold_out(given, columns[0] or "image") if split is None else given
    names = list(splits) if split is None else [split]
    if missing := set(names) - set(splits):
        raise ValueError(f"{data}: expected a split {missing.pop()!r}, got {', '.join(splits)}")
    if invalid := [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise ValueError(f"{data}: split {invalid[0]!r} cannot be part of a file name")
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
    summaries = []
    with exclusive_folder(out):
        for name in names:
            images = SplitImages(splits[name], data, tokenizer.image_processor, *columns)  # type: ignore[arg-type]
            job = ShardJob(out, name, images, config, data)
            job.run(tokenizer, batch_size, num_workers)
            held_out = ", held out of train by content" if name not in given else ""
            summaries.append(job.summary() + held_out)
    return summaries


class ShardJob:
    """The shards of one split.

    Raises:
        ShardError: the folder has shards of another config or data set.
    """

    def __init__(
        self, out: Path, name: str, images: SplitImages, config: ShardConfig, data: str
    ) -> None:
        if not len(images):
            raise ValueError(f"{data}: split {name!r} is empty")
        self.out, self.name, self.images, self.size = out, name, images, config.shard_size
        columns = (images.image_column, images.caption_column, images.key_column)
        source = SplitSource(data, len(images), images.digest(), *columns)
        self.manifest = Manifest(config, {})
        if (out / MANIFEST).exists():
            self.manifest = Manifest.read(out)
        previous = self.manifest.splits.get(name, ShardedSplit(source, ()))
        _require_same(
            out,
            asdict(self.manifest.config) | asdict(previous.source),
            asdict(config) | asdict(source),
        )
        # From the manifest: it keeps the names of tokenizer and data set as first given.
        self.source, self.config = previous.source, self.manifest.config
        self.names = shard_names(name, len(images), self.size)
        self.rejects = self._read_rejects()
        self.done = {shard.file: shard for shard in previous.shards if self._is_complete(shard)}
        self.resumed = len(self.done)
        known = {i: r for i, r in self.rejects.items() if self._name(i) in self.done}
        # Rejects of incomplete shards are found again; the file is rewritten without them.
        self.stale, self.rejects = known != self.rejects, known

    def run(self, tokenizer: VisualTokenizer, batch_size: int, num_workers: int) -> None:
        """Make the missing shards.

        Raises:
            OSError: a file cannot be written.
            ValueError: no image can be read.
        """
        batches: list[Any] = []  # of indices; no batch spans two shards
        for number, name in enumerate(self.names):
            end = min((number + 1) * self.size, len(self.images))
            starts = range(number * self.size, end, batch_size) if name not in self.done else ()
            batches += [range(start, min(start + batch_size, end)) for start in starts]
        loader: Any = DataLoader(
            self.images, batch_size=None, sampler=batches, num_workers=num_workers
        )
        records: list[ShardRecord] = []
        rejects: RejectsByIndex = {}
        for opened in tqdm(loader, f"shards {self.name}", file=sys.stderr, disable=None):
            records += encode(tokenizer, opened, self.config)
            for e in opened.examples:
                if e.reason is not None:
                    rejects[e.index] = {"key": e.key, "reason": e.reason, "index": e.index}
            last = opened.examples[-1].index
            if (last + 1) % self.size == 0 or last + 1 == len(self.images):
                self._save(self._name(last), records, rejects)
                records, rejects = [], {}
        if not sum(shard.records for shard in self.done.values()):
            first = next(iter(self.rejects.values()))
            raise AllSkippedError(
                f"none of {len(self.rejects)} images of split {self.name!r} could be used; the "
                f"first is {first['key']}: {first['reason']}"
            )

    def summary(self) -> str:
        """One line."""
        shards = self.done.values()
        records, codes = sum(s.records for s in shards), sum(s.codes for s in shards)
        text = (
            f"{self.name}: {records} records of {len(self.images)} images, {codes / records:.1f} "
            f"codes per image ({self.config.patches} patches), {len(shards)} shards"
        )
        text += f", {self.resumed} of them from earlier runs" if self.resumed else ""
        text += "" if self.source.caption_column else ", without captions"
        if self.rejects:
            text += f"; {len(self.rejects)} skipped, listed in {self._rejects_file}"
        return text

    def _save(self, file: str, records: list[ShardRecord], rejects: RejectsByIndex) -> None:
        rejects = self.rejects | rejects
        try:
            with atomic(self.out / file) as partial:
                write_shard(partial, records, self.config)
                codes = sum(len(record.codes) for record in records)
                count = len(rejects) - len(self.rejects)
                shard = Shard(file, len(records), codes, count, sha256(partial))
            if count or self.stale:
                write_rejects(self._rejects_file, [rejects[index] for index in sorted(rejects)])
            done = self.done | {file: shard}
            shards = tuple(done[name] for name in self.names if name in done)
            splits = self.manifest.splits | {self.name: ShardedSplit(self.source, shards)}
            replace(self.manifest, splits=splits).write(self.out)
        except OSError as error:
            raise OSError(
                f"{self.out / file} cannot be written: {error.strerror or error}. {len(self.done)} "
                f"of {len(self.names)} shards are complete; the same command resumes after them"
            ) from error
        self.done, self.rejects, self.stale = done, rejects, False

    def _name(self, index: int) -> str:
        return self.names[index // self.size]

    @property
    def _rejects_file(self) -> Path:
        return self.out / f"{self.name}.rejects.jsonl"

    def _read_rejects(self) -> RejectsByIndex:
        """Those of an earlier run; a line that cannot be read makes its shard incomplete."""
        rejects: RejectsByIndex = {}
        text = self._rejects_file.read_text(encoding="utf-8") if self._rejects_file.exists() else ""
        for line in text.split("\n"):
            try:
                values = json.loads(line)
                reject = {name: values[name] for name in ("key", "reason", "index")}
                if reject["index"] in range(len(self.images)):
                    rejects[reject["index"]] = reject
            except (ValueError, KeyError, TypeError):
                continue
        return rejects

    def _is_complete(self, shard: Shard) -> bool:
        path = self.out / shard.file
        if shard.file not in self.names or not path.is_file() or sha256(path) != shard.sha256:
            return False
        return shard.rejects == sum(self._name(index) == shard.file for index in self.rejects)


def _require_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ShardError naming every value that differs.

    Values are compared as JSON: a budget of 1 code is not one of 1.0, all patches. Of tokenizer and
    data set the content is compared, not the name.
    """
    changed = [
        name
        for name in before
        if name not in ("tokenizer", "data") and json.dumps(before[name]) != json.dumps(now[name])
    ]
    if not changed:
        return
    if {"fingerprint", "weights"} & {*changed}:
        changed.insert(0, "tokenizer")
    if {"images", "digest"} & {*changed}:
        changed.insert(0, "data")
    listed = ", ".join(f"{name} {before[name]!r}, now {now[name]!r}" for name in changed)
    raise ShardError(
        f"{out}: has shards with other values of {listed}: use the same values, or another --out, "
        "as shards of both would be mixed"
    )

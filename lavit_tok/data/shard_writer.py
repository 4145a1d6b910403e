"""`lavit-tok shards`: tokenize a captioned data set once. It can be stopped at any moment, and goes on from there.

A shard depends on its own pictures and the settings alone, and is written whole: first the parquet file, then the list
of rejects, then the manifest, each beside its place and moved there. What the manifest does not list is done again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lavit_tok.data.image_sources import load_splits
from lavit_tok.data.jobs import alone, atomic, device, progress
from lavit_tok.data.shard_manifest import (
    MANIFEST,
    Manifest,
    Settings,
    Shard,
    ShardError,
    ShardRecord,
    Source,
    Split,
    sha256,
    shard_names,
    write_shard,
)
from lavit_tok.data.shard_source import SplitImages, encode, weights_digest
from lavit_tok.tokenizer import VisualTokenizer

Skipped = dict[int, dict[str, Any]]
"""Row of the data set -> {"key", "reason", "row"}."""


def run(arguments: argparse.Namespace) -> int:
    """The command; see cli.py for its arguments."""
    target = device(arguments.device)
    found = load_splits(arguments.data)
    names = list(found) if arguments.split is None else [arguments.split]
    if missing := set(names) - set(found):
        raise ValueError(
            f"{arguments.data}: expected a split {missing.pop()!r}, got {', '.join(found)}"
        )
    if bad := [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise ValueError(f"{arguments.data}: split {bad[0]!r} cannot be part of a file's name")
    tokenizer = VisualTokenizer.from_pretrained(arguments.tokenizer, device=target)
    config = tokenizer.config
    settings = Settings(
        tokenizer=str(arguments.tokenizer),
        fingerprint=tokenizer.fingerprint(),
        weights=weights_digest(tokenizer),
        codebook_size=config.codebook_size,
        patches=config.num_patches,
        budget=arguments.budget,
        batch_size=arguments.batch_size if isinstance(arguments.budget, float) else None,
        flip=arguments.flip,
        shard_size=arguments.shard_size,
    )
    columns = (arguments.image_column, arguments.caption_column, arguments.key_column)
    with alone(arguments.out):
        for name in names:
            images = SplitImages(found[name], arguments.data, tokenizer.image_processor, *columns)
            job = ShardJob(arguments.out, name, images, settings, arguments.data)
            job.run(tokenizer, arguments.batch_size, arguments.num_workers)
            print(job.summary(), file=sys.stderr)
    return 0


class ShardJob:
    """One split.

    Raises:
        ShardError: the folder holds shards of other settings, or of another data set.
    """

    def __init__(
        self, out: Path, name: str, images: SplitImages, settings: Settings, data: str
    ) -> None:
        if not len(images):
            raise ValueError(f"{data}: split {name!r} has no rows")
        self.out, self.name, self.images, self.size = out, name, images, settings.shard_size
        columns = (images.image_column, images.caption_column, images.key_column)
        source = Source(data, len(images), images.digest(), *columns)
        self.manifest = Manifest(settings, {})
        if (out / MANIFEST).exists():
            self.manifest = Manifest.read(out)
        begun = self.manifest.splits.get(name, Split(source, ()))
        _require_same(
            out,
            asdict(self.manifest.settings) | asdict(begun.source),
            asdict(settings) | asdict(source),
        )
        self.source, self.settings = (
            begun.source,
            self.manifest.settings,
        )  # names as they were first given
        self.names = shard_names(name, len(images), self.size)
        self.rejects = self._known_rejects()
        self.done = {shard.file: shard for shard in begun.shards if self._is_complete(shard)}
        self.found = len(self.done)
        kept = {
            row: self.rejects[row]
            for row in self.rejects
            if self.names[row // self.size] in self.done
        }
        self.stale, self.rejects = kept != self.rejects, kept

    def run(self, tokenizer: VisualTokenizer, batch_size: int, num_workers: int) -> None:
        """Raises OSError where a file cannot be written, ValueError if no picture at all can be read."""
        batches: list[Any] = []  # of row numbers, none of them across two shards
        for number, name in enumerate(self.names):
            end = min((number + 1) * self.size, len(self.images))
            starts = range(number * self.size, end, batch_size) if name not in self.done else ()
            batches += [range(start, min(start + batch_size, end)) for start in starts]
        loader: Any = DataLoader(
            self.images, batch_size=None, sampler=batches, num_workers=num_workers
        )
        rows: list[ShardRecord] = []
        rejects: Skipped = {}
        for opened in progress(loader, f"shards {self.name}"):
            rows += encode(tokenizer, opened, self.settings)
            bad = (entry for entry in opened.entries if entry.reason is not None)
            rejects |= {e.row: {"key": e.key, "reason": e.reason, "row": e.row} for e in bad}
            last = opened.entries[-1].row
            if (last + 1) % self.size == 0 or last + 1 == len(self.images):
                self._save(self.names[last // self.size], rows, rejects)
                rows, rejects = [], {}
        if not sum(shard.rows for shard in self.done.values()):
            first = next(iter(self.rejects.values()))
            raise ValueError(
                f"none of {len(self.rejects)} pictures of split {self.name!r} could be used; the first is "
                f"{first['key']}: {first['reason']}"
            )

    def summary(self) -> str:
        shards = self.done.values()
        rows, codes = sum(shard.rows for shard in shards), sum(shard.codes for shard in shards)
        mean = f"{codes / rows:.1f} codes each ({self.settings.patches} patches)"
        text = (
            f"{self.name}: {rows} rows of {len(self.images)} pictures, {mean}, {len(shards)} shards"
        )
        text += f", {self.found} of them there before" if self.found else ""
        return text + (
            f"; {len(self.rejects)} skipped, listed in {self._rejects_file}" if self.rejects else ""
        )

    def _save(self, file: str, rows: list[ShardRecord], rejects: Skipped) -> None:
        try:
            with atomic(self.out / file) as part:
                write_shard(part, rows, self.settings)
                codes = sum(len(row.codes) for row in rows)
                shard = Shard(file, len(rows), codes, len(rejects), sha256(part))
            if rejects or self.stale:
                self._write_rejects(self.rejects | rejects)
            done = self.done | {file: shard}
            split = Split(self.source, tuple(done[name] for name in self.names if name in done))
            replace(self.manifest, splits=self.manifest.splits | {self.name: split}).write(self.out)
        except OSError as error:
            raise OSError(
                f"{self.out / file} cannot be written: {error.strerror or error}. {len(self.done)} of "
                f"{len(self.names)} shards are complete and kept; the same command goes on from there"
            ) from error
        self.done, self.rejects, self.stale = done, self.rejects | rejects, False

    @property
    def _rejects_file(self) -> Path:
        return self.out / f"{self.name}.rejects.jsonl"

    def _write_rejects(self, rejects: Skipped) -> None:
        if not rejects:
            self._rejects_file.unlink(missing_ok=True)
            return
        with atomic(self._rejects_file) as part:
            lines = [json.dumps(rejects[row], ensure_ascii=False) + "\n" for row in sorted(rejects)]
            part.write_text("".join(lines), encoding="utf-8")

    def _known_rejects(self) -> Skipped:
        """Those of an earlier run. A line that cannot be read is missed when its shard's are counted."""
        known: Skipped = {}
        text = self._rejects_file.read_text(encoding="utf-8") if self._rejects_file.exists() else ""
        for line in text.split("\n"):
            try:
                values = json.loads(line)
                known |= {values["row"]: {name: values[name] for name in ("key", "reason", "row")}}
            except (ValueError, KeyError, TypeError):
                continue
        return {row: values for row, values in known.items() if row in range(len(self.images))}

    def _is_complete(self, shard: Shard) -> bool:
        path = self.out / shard.file
        if shard.file not in self.names or not path.is_file() or sha256(path) != shard.sha256:
            return False
        return shard.rejects == sum(
            self.names[row // self.size] == shard.file for row in self.rejects
        )


def _require_same(out: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ShardError that names every setting that differs. As JSON: a budget of 1 is not one of 1.0."""
    names = [
        name for name in was if name not in ("tokenizer", "data")
    ]  # their content is compared, not their name
    changed = [name for name in names if json.dumps(was[name]) != json.dumps(now[name])]
    if changed:
        if {"fingerprint", "weights"} & {*changed}:
            changed.insert(0, "tokenizer")
        if {"images", "digest"} & {*changed}:
            changed.insert(0, "data")
        listed = ", ".join(f"{name} {was[name]!r} then, {now[name]!r} now" for name in changed)
        raise ShardError(
            f"{out}: begun with other settings: {listed}. Rows of both would lie side by side unnoticed: give the same "
            "settings, or another --out"
        )

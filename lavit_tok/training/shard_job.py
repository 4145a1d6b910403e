"""`lavit-tok shards`: tokenise a captioned data set once. It can be stopped at any moment, and goes on from there.

A shard depends on its own pictures and the settings alone, and is written whole: first the parquet file, then the list
of rejects, then the manifest, each beside its place and moved there. What the manifest does not list is done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lavit_tok.batch_jobs import atomic, device, progress
from lavit_tok.shard_files import (
    MANIFEST,
    Manifest,
    Settings,
    Shard,
    ShardError,
    ShardRow,
    Source,
    Split,
    sha256,
    shard_names,
    write_shard,
)
from lavit_tok.tokenizer import VisualTokenizer
from lavit_tok.training.shard_source import Picture, Pictures, collate
from lavit_tok.training.sources import load_splits

Rejects = dict[int, dict[str, Any]]
"""Row of the data set -> {"key", "reason", "row"}."""


def run(arguments: argparse.Namespace) -> int:
    """The command; see cli.py for its arguments."""
    target = device(arguments.device)
    found = load_splits(arguments.data)
    names = list(found) if arguments.split is None else [arguments.split]
    if missing := set(names) - set(found):
        raise ValueError(f"{arguments.data}: expected a split {missing.pop()!r}, got {', '.join(found)}")
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
        mirror=arguments.mirror,
        shard_size=arguments.shard_size,
    )
    columns = (arguments.image_column, arguments.caption_column, arguments.key_column)
    with _alone(arguments.out):
        for name in names:
            pictures = Pictures(found[name], arguments.data, *columns, config.image_size, config.crop)
            job = ShardJob(arguments.out, name, pictures, settings, arguments.data)
            job.run(tokenizer, arguments.batch_size, arguments.num_workers)
            print(job.summary(), file=sys.stderr)
    return 0


def weights_digest(tokenizer: VisualTokenizer) -> str:
    """16 hexadecimal digits of the config and of the weights that codes follow from."""
    sha = hashlib.sha256(json.dumps(tokenizer.config.to_dict(), sort_keys=True).encode())
    for room in (tokenizer.encoder, tokenizer.selector, tokenizer.merger, tokenizer.quantizer):
        for name, tensor in room.state_dict().items():
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def encode(
    tokenizer: VisualTokenizer, pictures: list[Picture], pixels: Tensor | None, settings: Settings
) -> list[ShardRow]:
    """Rows of the pictures that can be read; with mirror, each followed by its mirror image's."""
    good = [picture for picture in pictures if picture.reason is None]
    if pixels is None:
        return []
    views = [pixels, pixels.flip(3)] if settings.mirror else [pixels]
    columns = []
    for mirrored, view in enumerate(views):
        codes = tokenizer.encode(view, settings.budget).to("cpu")
        assert codes.keep is not None
        columns.append(
            [
                ShardRow(picture.key, picture.caption, values, mask.nonzero().flatten().tolist(), bool(mirrored))
                for picture, values, mask in zip(good, codes.to_list(), codes.keep, strict=True)
            ]
        )
    return [row for rows in zip(*columns, strict=True) for row in rows]


class ShardJob:
    """One split.

    Raises:
        ShardError: the folder holds shards of other settings, or of another data set.
    """

    def __init__(self, out: Path, name: str, pictures: Pictures, settings: Settings, data: str) -> None:
        if not len(pictures):
            raise ValueError(f"{data}: split {name!r} has no rows")
        self.out, self.name, self.pictures, self.size = out, name, pictures, settings.shard_size
        columns = (pictures.image_column, pictures.caption_column, pictures.key_column)
        source = Source(data, len(pictures), pictures.digest(), *columns)
        self.manifest = Manifest(settings, {})
        if (out / MANIFEST).exists():
            self.manifest = Manifest.read(out)
        begun = self.manifest.splits.get(name, Split(source, ()))
        _require_same(out, asdict(self.manifest.settings) | asdict(begun.source), asdict(settings) | asdict(source))
        self.source, self.settings = begun.source, self.manifest.settings  # names as they were first given
        self.names = shard_names(name, len(pictures), self.size)
        self.rejects = self._known_rejects()
        self.done = {shard.file: shard for shard in begun.shards if self._is_complete(shard)}
        self.found = len(self.done)
        kept = {row: self.rejects[row] for row in self.rejects if self.names[row // self.size] in self.done}
        self.stale, self.rejects = kept != self.rejects, kept

    def run(self, tokenizer: VisualTokenizer, batch_size: int, num_workers: int) -> None:
        """Raises OSError where a file cannot be written, ValueError if no picture at all can be read."""
        batches = []
        for number, name in enumerate(self.names):
            end = min((number + 1) * self.size, len(self.pictures))
            starts = range(number * self.size, end, batch_size) if name not in self.done else ()
            batches += [range(start, min(start + batch_size, end)) for start in starts]
        loader: Any = DataLoader(self.pictures, batch_sampler=batches, num_workers=num_workers, collate_fn=collate)
        rows: list[ShardRow] = []
        rejects: Rejects = {}
        for pictures, pixels in progress(loader, f"shards {self.name}"):
            rows += encode(tokenizer, pictures, pixels, self.settings)
            bad = (picture for picture in pictures if picture.reason is not None)
            rejects |= {p.row: {"key": p.key, "reason": p.reason, "row": p.row} for p in bad}
            last = pictures[-1].row
            if (last + 1) % self.size == 0 or last + 1 == len(self.pictures):
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
        text = f"{self.name}: {rows} rows of {len(self.pictures)} pictures, {mean}, {len(shards)} shards"
        text += f", {self.found} of them there before" if self.found else ""
        return text + (f"; {len(self.rejects)} skipped, listed in {self._rejects_file}" if self.rejects else "")

    def _save(self, file: str, rows: list[ShardRow], rejects: Rejects) -> None:
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

    def _write_rejects(self, rejects: Rejects) -> None:
        if not rejects:
            return self._rejects_file.unlink(missing_ok=True)
        with atomic(self._rejects_file) as part:
            lines = [json.dumps(rejects[row], ensure_ascii=False) + "\n" for row in sorted(rejects)]
            part.write_text("".join(lines), encoding="utf-8")

    def _known_rejects(self) -> Rejects:
        """Those of an earlier run. A line that cannot be read is missed when its shard's are counted."""
        known: Rejects = {}
        text = self._rejects_file.read_text(encoding="utf-8") if self._rejects_file.exists() else ""
        for line in text.splitlines():
            try:
                values = json.loads(line)
                known |= {values["row"]: {name: values[name] for name in ("key", "reason", "row")}}
            except (ValueError, KeyError, TypeError):
                continue
        return {row: values for row, values in known.items() if row in range(len(self.pictures))}

    def _is_complete(self, shard: Shard) -> bool:
        path = self.out / shard.file
        if shard.file not in self.names or not path.is_file() or sha256(path) != shard.sha256:
            return False
        return shard.rejects == sum(self.names[row // self.size] == shard.file for row in self.rejects)


def _require_same(out: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ShardError that names every setting that differs. As JSON: a budget of 1 is not one of 1.0."""
    names = [name for name in was if name not in ("tokenizer", "data")]  # their content is compared, not their name
    changed = [name for name in names if json.dumps(was[name]) != json.dumps(now[name])]
    if changed:
        if {"fingerprint", "weights"} & {*changed}:
            changed.insert(0, "tokenizer")
        if {"pictures", "digest"} & {*changed}:
            changed.insert(0, "data")
        listed = ", ".join(f"{name} {was[name]!r} then, {now[name]!r} now" for name in changed)
        raise ShardError(f"{out}: begun with other settings: {listed}. One folder holds one kind of shards: choose "
                         "the same settings, or another --out")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """This process alone writes into the folder, which the system gives free whenever, and however, it ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            import fcntl

            # A record lock belongs to the process: loading processes do not inherit it, and cannot outlive it with it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: two jobs in one folder are not noticed
            pass
        except OSError:
            raise ShardError(f"{out}: another `lavit-tok shards` is writing here: let it end, or give another --out") from None
        for left in out.glob(".*.part"):  # of a run that was killed
            left.unlink()
        yield

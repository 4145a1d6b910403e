"""Which shards of a folder exist, from their footers, and the manifest that is made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from lavit_tok.checkpoints.files import AnyPath, exclusive_folder
from lavit_tok.checkpoints.weights import shipped_with
from lavit_tok.data.rejects import write_rejects
from lavit_tok.data.shard_manifest import (
    MANIFEST,
    Manifest,
    ShardedSplit,
    ShardError,
    ShardFile,
    SplitSource,
    joined_digest,
    read_footer,
    shard_position,
)
from lavit_tok.data.shard_reader import check_shard


def existing_shards(folder: AnyPath, split: str) -> dict[str, ShardFile]:
    """The undamaged shards of a split by file name."""
    shards = {}
    for path in folder.glob("*.parquet"):
        if shard_position(split, path.name):
            try:
                shards[path.name] = read_footer(path)
            except ShardError:
                continue
    return shards


def complete_parts(split: str, shards: dict[str, ShardFile]) -> set[int]:
    """The input files all of whose shards exist."""
    parts: dict[int, dict[int, bool]] = {}
    for file, shard in shards.items():
        part, number = _position(split, file)
        parts.setdefault(part, {})[number] = shard.footer.last
    return {
        part
        for part, last in parts.items()
        if [last.get(number) for number in range(len(last))] == [False] * (len(last) - 1) + [True]
    }


def write_manifest(folder: AnyPath, split: str, shards: dict[str, ShardFile], data: str) -> bool:
    """Write the manifest and list of rejects of a complete split; returns whether either changed.

    Raises:
        ShardError: a shard is missing, or they are of different configs.
    """
    ordered = sorted(shards, key=lambda file: _position(split, file))
    first = shards[ordered[0]].footer
    parts = first.columns.parts or 1
    if missing := {*range(parts)} - (complete := complete_parts(split, shards)):
        where = f": of input files {sorted(missing)[:5]}" if parts > 1 else ""
        raise ShardError(
            f"{folder}: shards of split {split!r} are missing or damaged{where}; the same "
            "`lavit-tok shards` command adds them"
        )
    listed, rejects, start = [], [], 0
    for file in ordered:
        footer = shards[file].footer
        require_same(folder, *(asdict(f.config) | asdict(f.columns) for f in (first, footer)))
        listed.append(shards[file].listed(file))
        rejects += [{**reject, "index": reject["index"] + start} for reject in footer.rejects]
        start += footer.images
    if {_position(split, file)[0] for file in ordered} != complete:
        raise ShardError(f"{folder}: split {split!r} has shards of more than {parts} input files")
    digest = joined_digest([shards[file].footer.digest for file in ordered])
    source = SplitSource(**asdict(first.columns), data=data, images=start, digest=digest)
    manifest = Manifest(first.config, {})
    before = None
    if (folder / MANIFEST).exists():
        before = Manifest.read(folder)
        require_same(folder, asdict(before.config), asdict(first.config))
        manifest = before
    splits = manifest.splits | {split: ShardedSplit(source, tuple(listed))}
    manifest = replace(manifest, splits=splits)
    changed = write_rejects(folder / f"{split}.rejects.jsonl", rejects)
    if manifest != before:
        manifest.write(folder)
    return changed or manifest != before


def verify(folder: AnyPath) -> Iterator[str]:
    """Check every shard of a folder, and make its manifest again if it is missing or wrong.

    Yields:
        A line for each split.

    Raises:
        ShardError: naming the shards that are damaged or missing, or have codes out of range.
        ValueError: another process writes to the folder.
    """
    import pyarrow.parquet as pq

    if not folder.is_dir():
        raise ShardError(f"{folder}: not a folder of shards")
    with exclusive_folder(folder):
        names = sorted(path.name for path in folder.glob("*.parquet"))
        # A name can be one of a stream's file or of another split: its footer records which.
        found = {name: read_footer(folder / name) for name in names}
        if not found:
            raise ShardError(f"{folder}: not a folder of shards: it has no parquet files")
        for split in sorted({shard.footer.split for shard in found.values()}):
            shards = {name: s for name, s in found.items() if s.footer.split == split}
            data = ""
            keys: set[str] = set()
            try:
                listed = Manifest.read(folder).splits
                data = listed[split].source.data if split in listed else ""
            except ShardError:
                (folder / MANIFEST).unlink(missing_ok=True)
            count = repeated = 0
            for name, shard in shards.items():
                footer = shard.footer
                check_shard(folder / name, shard.listed(name), footer.config)
                with (folder / name).open("rb") as file:  # pyarrow's paths are UTF-8
                    listed_keys = pq.read_table(file, columns=["key"])["key"].to_pylist()
                repeated += len(listed_keys) // (1 + footer.config.flip) - len(
                    {*listed_keys} - keys
                )
                keys.update(listed_keys)
                count += footer.records
            changed = write_manifest(folder, split, shards, data)
            state = f"{MANIFEST} and rejects " + ("made again" if changed else "agree")
            text = f"{split}: {len(shards)} shards, {count} records; {state}"
            yield text + (f"; {repeated} images have the key of another one" if repeated else "")


def require_same(out: AnyPath, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ShardError naming every value that differs.

    Values are compared as JSON: a budget of 1 code is not one of 1.0, all patches. Of the tokenizer
    the content is compared, not the name.
    """
    changed = [
        name
        for name in before
        if name != "tokenizer" and json.dumps(before[name]) != json.dumps(now[name])
    ]
    if not changed:
        return
    if {"fingerprint", "weights"} & {*changed}:
        changed.insert(0, "tokenizer")
    shipped = shipped_with(before.get("fingerprint")) if "fingerprint" in changed else None
    remedy = f"--tokenizer {shipped}, of which they are" if shipped else "the same values"
    listed = ", ".join(f"{name} {before[name]!r}, now {now[name]!r}" for name in changed)
    raise ShardError(
        f"{out}: has shards with other values of {listed}: use {remedy}, or another --out, as "
        "shards of both would be mixed"
    )


def _position(split: str, file: str) -> tuple[int, int]:
    position = shard_position(split, file)
    assert position is not None
    return position

"""Shards to train from: one split of what `lavit-tok shards` wrote, checked before the first row is used.

shards = Shards.open("DIR", "train")
shards.require(fingerprint=tokenizer.fingerprint())
rows = shards.dataset()         # datasets.Dataset: key, caption, codes, length, keep[, mirrored]
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavit_tok.data.shard_manifest import (
    MANIFEST,
    Manifest,
    Settings,
    Shard,
    ShardError,
    schema,
    sha256,
    shard_names,
)


@dataclass(frozen=True)
class Shards:
    """One split of a folder of shards. Codes lie in 0..codebook_size-1, kept patches in 0..patches-1."""

    directory: Path
    split: str
    tokenizer: str
    """Directory or Hub id of the tokenizer, or "default", as it was given."""
    fingerprint: str
    """`VisualTokenizer.fingerprint()`: which codebook the codes index."""
    codebook_size: int
    patches: int
    budget: int | float | None
    flip: bool
    """Each picture is followed by its mirror image."""
    data: str
    """The data set, as it was given."""
    rows: int
    codes: int
    """Of all rows together."""
    rejects: int
    """Pictures that could not be read."""
    files: tuple[Path, ...]
    """Those that hold rows: a shard whose pictures are all corrupt is empty."""

    @classmethod
    def open(cls, directory: str | Path, split: str = "train", verify: bool = True) -> Shards:
        """One split, if all of its shards are there.

        Args:
            directory: what `lavit-tok shards --out` wrote.
            split: its name.
            verify: compare every file with its sha256 and its codes with the codebook's size; without, only whether
                the files are there and how many rows they have (for the other processes of a run, or huge data).

        Raises:
            ShardError: no such split, an unfinished one, or a file that is missing, truncated or altered.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory)
        if split not in manifest.splits:
            raise ShardError(
                f"{directory}: expected a split {split!r}, got {', '.join(manifest.splits) or 'none'}"
            )
        settings, source, shards = (
            manifest.settings,
            manifest.splits[split].source,
            manifest.splits[split].shards,
        )
        expected = shard_names(split, source.images, settings.shard_size)
        if [shard.file for shard in shards] != expected:
            raise ShardError(
                f"{directory}: {len(shards)} of {len(expected)} shards of split {split!r} are done: training would see "
                "a part of the data only. The same `lavit-tok shards` command goes on where it was stopped"
            )
        for shard in shards:
            check_shard(directory / shard.file, shard, settings, verify)
        opened = cls(
            directory=directory,
            split=split,
            tokenizer=settings.tokenizer,
            fingerprint=settings.fingerprint,
            codebook_size=settings.codebook_size,
            patches=settings.patches,
            budget=settings.budget,
            flip=settings.flip,
            data=source.data,
            rows=sum(shard.rows for shard in shards),
            codes=sum(shard.codes for shard in shards),
            rejects=sum(shard.rejects for shard in shards),
            files=tuple(directory / shard.file for shard in shards if shard.rows),
        )
        if not opened.rows:
            raise ShardError(
                f"{directory}: split {split!r} has no rows: none of its pictures could be read"
            )
        return opened

    def require(self, *, fingerprint: str | None = None, codebook_size: int | None = None) -> None:
        """Raise ShardError unless the codes index the codebook of this fingerprint, which has this many rows."""
        wanted = {"codebook fingerprint": fingerprint, "codebook size": codebook_size}
        found = {"codebook fingerprint": self.fingerprint, "codebook size": self.codebook_size}
        for name, value in wanted.items():
            if value is not None and value != found[name]:
                raise ShardError(
                    f"{self.directory}: expected {name} {value}, got {found[name]} of tokenizer {self.tokenizer!r}: "
                    "these codes index another codebook: the language model would learn unrelated pictures"
                )

    def dataset(self, cache_dir: str | Path | None = None) -> Any:
        """All rows, in order, as a map-style `datasets.Dataset`: an Arrow copy in the cache folder, mapped to memory.

        Columns: key, caption str; codes, keep lists of int32; length int32; mirrored bool, if mirror.
        """
        import datasets

        paths = [
            glob.escape(str(path.absolute())) for path in self.files
        ]  # `datasets` takes paths for patterns
        return datasets.Dataset.from_parquet(paths, cache_dir=cache_dir and str(cache_dir))


def check_shard(path: Path, shard: Shard, settings: Settings, verify: bool = True) -> None:
    """Raise ShardError unless the file is the one that the manifest lists; verify=False reads its footer alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ShardError(f"{path}: missing, though {MANIFEST} lists it")
    if verify and (found := sha256(path)) != shard.sha256:
        raise ShardError(
            f"{path}: truncated or altered: its sha256 is {found}, {MANIFEST} says {shard.sha256}"
        )
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(schema(settings.flip)):
                raise ShardError(
                    f"{path}: expected columns {schema(settings.flip).names} of codes with captions"
                )
            if file.metadata.num_rows != shard.rows:
                raise ShardError(
                    f"{path}: has {file.metadata.num_rows} rows, {MANIFEST} says {shard.rows}"
                )
            reason = _misfit(file.read(["codes", "length", "keep"]), settings) if verify else ""
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: truncated or altered: {error}") from None
    if reason:
        raise ShardError(f"{path}: {reason}")


def _misfit(table: Any, settings: Settings) -> str:
    """What is wrong with these rows, or nothing."""
    import pyarrow.compute as pc

    lengths = table["length"].combine_chunks()
    if not pc.all(pc.greater(pc.fill_null(lengths, 0), 0), min_count=0).as_py():
        return "holds a row without codes, but every picture has at least one"
    for name, size in (("codes", settings.codebook_size), ("keep", settings.patches)):
        lists = table[name].combine_chunks()
        if not pc.list_value_length(lists).equals(lengths):
            return f"{name}: their number is not the row's length"
        values = pc.fill_null(pc.list_flatten(lists), -1)
        low, high = pc.min_max(values).as_py().values()
        if len(values) and not 0 <= low <= high < size:
            return f"{name}: expected 0..{size - 1}, got {low}..{high}"
    return ""

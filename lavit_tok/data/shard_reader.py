"""Shards for training: one split of what `lavit-tok shards` wrote, checked before it is used.

shards = Shards.open("DIR", "train")
shards.require(fingerprint=tokenizer.fingerprint())
records = shards.dataset()      # datasets.Dataset: key, caption, codes, length, keep[, flipped]
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavit_tok.checkpoints.files import AnyPath
from lavit_tok.checkpoints.weights import shipped_with
from lavit_tok.data.shard_manifest import (
    MANIFEST,
    Manifest,
    Shard,
    ShardConfig,
    ShardError,
    schema,
    sha256,
    shard_position,
)


@dataclass(frozen=True)
class Shards:
    """One split of a folder of shards; codes are in 0..codebook_size-1, patches in 0..patches-1."""

    directory: Path
    split: str
    tokenizer: str
    """"default", directory or Hub id of the tokenizer, as given."""
    fingerprint: str
    """`VisualTokenizer.fingerprint()`, of the codebook that the codes index."""
    codebook_size: int
    patches: int
    budget: int | float | None
    flip: bool
    """Whether each image is followed by its horizontal flip."""
    data: str
    """The data set, as given."""
    records: int
    codes: int
    """Codes of all records."""
    rejects: int
    """Images that could not be read."""
    files: tuple[Path, ...]
    """The files, without those of shards whose images are all corrupt."""

    @classmethod
    def open(
        cls, directory: str | Path, split: str = "train", verify: bool | None = True
    ) -> Shards:
        """Open one split whose shards are all complete.

        Args:
            directory: what `lavit-tok shards --out` wrote.
            split: its name.
            verify: compare every file with its sha256, and its codes with the codebook size; False
                checks only that the files exist and their numbers of records (for the other
                processes of a run); None opens no file (for very large data, of which
                `ShardRecords(shards, verify=True)` checks each file when it is first read).

        Raises:
            ShardError: a split that does not exist or is incomplete, or a file that is missing,
                truncated or altered.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory)
        if split not in manifest.splits:
            raise ShardError(
                f"{directory}: expected a split {split!r}, got "
                f"{', '.join(manifest.splits) or 'none'}"
            )
        config, source = manifest.config, manifest.splits[split].source
        shards = manifest.splits[split].shards
        positions = [shard_position(split, shard.file) for shard in shards]
        images = sum(shard.images for shard in shards)
        if None in positions or len({*positions}) < len(shards) or images != source.images:
            raise ShardError(
                f"{directory}: split {split!r} has shards of {images} of {source.images} images in "
                f"{MANIFEST}; `lavit-tok shards verify {directory}` makes it again"
            )
        if verify is not None:
            for shard in shards:
                check_shard(directory / shard.file, shard, config, verify)
        opened = cls(
            directory=directory,
            split=split,
            tokenizer=config.tokenizer,
            fingerprint=config.fingerprint,
            codebook_size=config.codebook_size,
            patches=config.patches,
            budget=config.budget,
            flip=config.flip,
            data=source.data,
            records=sum(shard.records for shard in shards),
            codes=sum(shard.codes for shard in shards),
            rejects=sum(shard.rejects for shard in shards),
            files=tuple(directory / shard.file for shard in shards if shard.records),
        )
        if not opened.records:
            raise ShardError(
                f"{directory}: split {split!r} is empty: none of its images could be read"
            )
        return opened

    def require(self, *, fingerprint: str | None = None, codebook_size: int | None = None) -> None:
        """Raise ShardError if the codes index another codebook."""
        expected = {"codebook fingerprint": fingerprint, "codebook size": codebook_size}
        actual = {"codebook fingerprint": self.fingerprint, "codebook size": self.codebook_size}
        for name, value in expected.items():
            if value is not None and value != actual[name]:
                shipped = shipped_with(self.fingerprint)
                remedy = f"; visual_tokenizer: {shipped} has their codebook" if shipped else ""
                raise ShardError(
                    f"{self.directory}: expected {name} {value}, got {actual[name]} of tokenizer "
                    f"{shipped or self.tokenizer!r}: the codes index another codebook, so the "
                    f"language model would learn unrelated images{remedy}"
                )

    def dataset(self, cache_dir: str | Path | None = None) -> Any:
        """All records in order, as a memory-mapped `datasets.Dataset`.

        Columns: key, caption (str); codes, keep (lists of int32); length (int32); flipped (bool),
        if `flip`.
        """
        import datasets

        # escape: `datasets` reads paths as glob patterns
        paths = [glob.escape(str(path.absolute())) for path in self.files]
        return datasets.Dataset.from_parquet(paths, cache_dir=cache_dir and str(cache_dir))


def check_shard(path: AnyPath, shard: Shard, config: ShardConfig, verify: bool = True) -> None:
    """Raise ShardError if the file is not the listed one; verify=False reads its footer only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ShardError(f"{path}: missing, though {MANIFEST} lists it")
    if verify and (digest := sha256(path)) != shard.sha256:
        raise ShardError(
            f"{path}: truncated or altered: its sha256 is {digest}, in {MANIFEST} {shard.sha256}"
        )
    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:  # paths need not be UTF-8
            columns = schema(config.flip)
            if not file.schema_arrow.equals(columns):
                raise ShardError(f"{path}: expected columns {columns.names} of codes with captions")
            count = file.metadata.num_rows
            if count != shard.records:
                raise ShardError(
                    f"{path}: has {count} records, {shard.records} are listed in {MANIFEST}"
                )
            reason = _invalid(file.read(["codes", "length", "keep"]), config) if verify else ""
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: truncated or altered: {error}") from None
    if reason:
        raise ShardError(f"{path}: {reason}")


def _invalid(table: Any, config: ShardConfig) -> str:
    """Why these records are invalid, or an empty string."""
    import pyarrow.compute as pc

    lengths = table["length"].combine_chunks()
    if not pc.all(pc.greater(pc.fill_null(lengths, 0), 0), min_count=0).as_py():
        return "has a record without codes, but every image has at least one"
    for name, size in (("codes", config.codebook_size), ("keep", config.patches)):
        lists = table[name].combine_chunks()
        if not pc.list_value_length(lists).equals(lengths):
            return f"{name}: their number differs from the record's length"
        values = pc.fill_null(pc.list_flatten(lists), -1)
        low, high = pc.min_max(values).as_py().values()
        if len(values) and not 0 <= low <= high < size:
            return f"{name}: expected 0..{size - 1}, got {low}..{high}"
    return ""

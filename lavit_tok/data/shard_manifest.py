"""The files of a folder of shards: a manifest, and parquet files of codes with captions. shards.py reads them to train.

    DIR/manifest.json         whose codes these are, what they were made from, and which files there must be
    DIR/train-00000.parquet   columns key, caption, codes, length, keep
    DIR/train.rejects.jsonl   pictures that could not be read: key, reason, row of the data set; absent without any

Shard i of a split stands for its pictures i*S .. (i+1)*S-1 (S = shard_size) in the data set's order, corrupt ones left
out. With mirror, each picture is followed by its mirror image, and a column `mirrored` tells them apart:

    S = 4, ten pictures, number 2 corrupt     00000 |0 1 3|             00001 |4 5 6 7|          00002 |8 9|
    and with mirror                           00000 |0 0' 1 1' 3 3'|    00001 |4 4' ... 7'|      00002 |8 8' 9 9'|

Every shard is a file of codes as well (code_files.py): `lavit-tok decode` draws it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lavit_tok.data.code_files import FORMAT as CODES
from lavit_tok.data.code_files import Header
from lavit_tok.data.jobs import atomic

FORMAT, VERSION, MANIFEST = "lavit_tok.shards", 1, "manifest.json"
Record = TypeVar("Record")


class ShardError(ValueError):
    """Shards that cannot be used: another tokenizer's, unfinished, missing, altered. The message names the file."""


@dataclass(frozen=True)
class Settings:
    """What all shards of a folder share."""

    tokenizer: str
    """Directory or Hub id of the tokenizer, or "default", as it was given."""
    fingerprint: str
    """`VisualTokenizer.fingerprint()`: which codebook the codes index."""
    weights: str
    """16 hexadecimal digits of all that codes follow from: tokenizers of one codebook may still choose other rows."""
    codebook_size: int
    patches: int
    budget: int | float | None
    batch_size: int | None
    """Of a fractional budget, which is spent across a batch; else None, since codes do not depend on it."""
    flip: bool
    shard_size: int


@dataclass(frozen=True)
class Source:
    """What the shards of one split are made from."""

    data: str
    """The data set, as it was given."""
    images: int
    digest: str
    """16 hexadecimal digits of every picture's key, caption and encoded size, in order."""
    image_column: str
    caption_column: str | None
    key_column: str | None


@dataclass(frozen=True)
class Shard:
    """One file."""

    file: str
    rows: int
    codes: int
    rejects: int
    """Pictures that could not be read."""
    sha256: str


@dataclass(frozen=True)
class Split:
    source: Source
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    settings: Settings
    splits: dict[str, Split]

    def write(self, directory: Path) -> None:
        values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self.settings),
            "splits": {},
        }
        for name, split in self.splits.items():
            values["splits"][name] = {
                **asdict(split.source),
                "shards": [asdict(shard) for shard in split.shards],
            }
        with atomic(directory / MANIFEST) as part:
            part.write_text(
                json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises ShardError: not there, or no manifest."""
        path = directory / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ShardError(f"it is {values['format']} version {values['version']}")
            splits = {
                name: Split(
                    _record(Source, split),
                    tuple(_record(Shard, shard) for shard in split["shards"]),
                )
                for name, split in values["splits"].items()
            }
            settings = _record(Settings, values)
            if settings.shard_size < 1:
                raise ShardError(f"shard_size should be at least 1, got {settings.shard_size}")
            return cls(settings, splits)
        except OSError as error:
            raise ShardError(f"{path}: no folder of shards: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"
            raise ShardError(
                f"{path}: expected a manifest, {FORMAT} version {VERSION}: {reason}"
            ) from None


@dataclass(frozen=True)
class ShardRecord:
    key: str
    caption: str
    codes: list[int]
    keep: list[int]
    """Patches behind the codes, raster order."""
    flipped: bool = False


def shard_names(split: str, images: int, size: int) -> list[str]:
    """("train", 10, 4) -> train-00000.parquet, train-00001.parquet, train-00002.parquet."""
    return [f"{split}-{number:05d}.parquet" for number in range(-(-images // size))]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path, rows: Sequence[ShardRecord], settings: Settings) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    header = Header(settings.tokenizer, settings.codebook_size, settings.patches)
    columns = schema(settings.flip).with_metadata({CODES: header.to_json()})
    values = [{**asdict(row), "length": len(row.codes)} for row in rows]
    pq.write_table(pa.Table.from_pylist(values, schema=columns), path, compression="zstd")


def schema(flip: bool) -> Any:
    """Of a shard's columns."""
    import pyarrow as pa

    numbers, length = pa.list_(pa.int32()), pa.int32()
    fields = {
        "key": pa.string(),
        "caption": pa.string(),
        "codes": numbers,
        "length": length,
        "keep": numbers,
    }
    return pa.schema(list((fields | ({"flipped": pa.bool_()} if flip else {})).items()))


def _record(kind: type[Record], values: Any) -> Record:
    """A record from JSON. Raises ShardError for a field that is missing or of another type."""
    found = {}
    for field in fields(kind):  # type: ignore[arg-type]  # TypeVar cannot say: a dataclass
        value = found[field.name] = values.get(field.name)
        if type(value).__name__ not in str(field.type).replace("None", "NoneType").split(" | "):
            raise ShardError(f"{field.name} should be {field.type}, got {value!r}")
    return kind(**found)

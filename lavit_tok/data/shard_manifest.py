"""The files of a folder of shards: a manifest, and parquet files of codes with captions.

    DIR/manifest.json         the tokenizer, the data set, and the files that must exist
    DIR/train-00000.parquet   columns key, caption, codes, length, keep
    DIR/train.rejects.jsonl   images that could not be read: key, reason, index in the data set;
                              absent if there are none

Shard i of a split holds its images i*S .. (i+1)*S-1 (S = shard_size) in the order of the data set,
without corrupt ones. With flip, each image is followed by its horizontal flip, and a column
`flipped` distinguishes them:

    S = 4, ten images, number 2 corrupt
              00000 |0 1 3|            00001 |4 5 6 7|        00002 |8 9|
    flip      00000 |0 0' 1 1' 3 3'|   00001 |4 4' ... 7'|    00002 |8 8' 9 9'|

Every shard is a code file as well (code_files.py), so `lavit-tok decode` reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lavit_tok.data.code_files import FORMAT as CODES
from lavit_tok.data.code_files import CodeFileHeader
from lavit_tok.data.files import atomic

FORMAT, VERSION, MANIFEST = "lavit_tok.shards", 2, "manifest.json"
Record = TypeVar("Record")


class ShardError(ValueError):
    """Shards that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class ShardConfig:
    """What all shards of a folder have in common."""

    tokenizer: str
    """"default", directory or Hub id of the tokenizer, as given."""
    fingerprint: str
    """`VisualTokenizer.fingerprint()`, of the codebook that the codes index."""
    weights: str
    """Digest of all that codes depend on; tokenizers of one codebook may choose other codes."""
    codebook_size: int
    patches: int
    budget: int | float | None
    batch_size: int | None
    """That of a fractional budget, which is spent across a batch; None otherwise, as codes do not
    depend on it."""
    flip: bool
    shard_size: int


@dataclass(frozen=True)
class SplitSource:
    """The split of a data set that shards are made from."""

    data: str
    """The data set, as given."""
    images: int
    digest: str
    """Digest of every image's key, caption and encoded size, in order."""
    image_column: str
    caption_column: str | None
    key_column: str | None


@dataclass(frozen=True)
class Shard:
    """One file."""

    file: str
    records: int
    codes: int
    rejects: int
    """Images that could not be read."""
    sha256: str


@dataclass(frozen=True)
class ShardedSplit:
    """A split and its shards so far."""

    source: SplitSource
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    config: ShardConfig
    splits: dict[str, ShardedSplit]

    def write(self, directory: Path) -> None:
        """Replace the manifest of a folder."""
        splits = {
            name: {**asdict(split.source), "shards": [asdict(shard) for shard in split.shards]}
            for name, split in self.splits.items()
        }
        values = {"format": FORMAT, "version": VERSION, **asdict(self.config), "splits": splits}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        with atomic(directory / MANIFEST) as partial:
            partial.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a folder. Raises ShardError if it is missing or invalid."""
        path = directory / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ShardError(
                    f"it is {values['format']} version {values['version']}; make the shards again "
                    "with `lavit-tok shards`, in another directory"
                )
            splits = {
                name: ShardedSplit(
                    _record(SplitSource, split),
                    tuple(_record(Shard, shard) for shard in split["shards"]),
                )
                for name, split in values["splits"].items()
            }
            config = _record(ShardConfig, values)
            if config.shard_size < 1:
                raise ShardError(f"shard_size should be at least 1, got {config.shard_size}")
            return cls(config, splits)
        except OSError as error:
            raise ShardError(f"{path}: not a folder of shards: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"
            raise ShardError(
                f"{path}: expected a manifest, {FORMAT} version {VERSION}: {reason}"
            ) from None


@dataclass(frozen=True)
class ShardRecord:
    """The codes of one image, with its caption."""

    key: str
    caption: str
    codes: list[int]
    keep: list[int]
    """Patches of the codes, in raster order."""
    flipped: bool = False


def shard_names(split: str, images: int, size: int) -> list[str]:
    """("train", 10, 4) -> train-00000.parquet, train-00001.parquet, train-00002.parquet."""
    return [f"{split}-{number:05d}.parquet" for number in range(-(-images // size))]


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path, records: Sequence[ShardRecord], config: ShardConfig) -> None:
    """Write the parquet file of a shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    header = CodeFileHeader(config.tokenizer, config.codebook_size, config.patches)
    columns = schema(config.flip).with_metadata({CODES: header.to_json()})
    values = [{**asdict(record), "length": len(record.codes)} for record in records]
    pq.write_table(pa.Table.from_pylist(values, schema=columns), path, compression="zstd")


def schema(flip: bool) -> Any:
    """The pyarrow schema of a shard."""
    import pyarrow as pa

    numbers = pa.list_(pa.int32())
    columns = {
        "key": pa.string(),
        "caption": pa.string(),
        "codes": numbers,
        "length": pa.int32(),
        "keep": numbers,
        **({"flipped": pa.bool_()} if flip else {}),
    }
    return pa.schema(list(columns.items()))


def _record(kind: type[Record], values: Any) -> Record:
    """A record from JSON. Raises ShardError for a field that is missing or of another type."""
    arguments = {}
    for field in fields(kind):  # type: ignore[arg-type]  # TypeVar cannot say: a dataclass
        value = arguments[field.name] = values.get(field.name)
        if type(value).__name__ not in str(field.type).replace("None", "NoneType").split(" | "):
            raise ShardError(f"{field.name} should be {field.type}, got {value!r}")
    return kind(**arguments)

"""The files of a folder of shards: a manifest, and parquet files of codes with captions.

    DIR/manifest.json         the tokenizer, the data set, and the files that must exist
    DIR/train-00000.parquet   columns key, caption, codes, length, keep; footer
    DIR/train.rejects.jsonl   images that could not be read: key, reason, index in the data set;
                              absent if there are none

Shard i of a split holds its images i*S .. (i+1)*S-1 (S = shard_size) in the order of the data set,
without corrupt ones. With flip, each image is followed by its horizontal flip, and a column
`flipped` distinguishes them:

    S = 4, ten images, number 2 corrupt
              00000 |0 1 3|            00001 |4 5 6 7|        00002 |8 9|
    flip      00000 |0 0' 1 1' 3 3'|   00001 |4 4' ... 7'|    00002 |8 8' 9 9'|

The shards of a stream are named after its input file as well: train-00012-00000.parquet is the
first of file 12. Every shard has a footer with its config, counts, digests and rejects. The
manifest and the list of rejects are made from the footers when a split is complete, so that the
cost of a shard does not depend on how many there are.

Every shard is a code file as well (code_files.py), so `lavit-tok decode` reads it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from lavit_tok.checkpoints.files import AnyPath, atomic
from lavit_tok.data.code_files import FORMAT as CODES
from lavit_tok.data.code_files import ROW_GROUP, CodeFileHeader

FORMAT, VERSION, MANIFEST = "lavit_tok.shards", 3, "manifest.json"
FOOTER = "lavit_tok.shard"
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
    """Digest of all that codes depend on; two tokenizers with one codebook may give other codes."""
    codebook_size: int
    patches: int
    budget: int | float | None
    batch_size: int | None
    """That of a fractional budget, which is spent across a batch; None otherwise, as codes do not
    depend on it."""
    flip: bool
    shard_size: int


@dataclass(frozen=True)
class SplitColumns:
    """How the split of a data set is read."""

    image_column: str
    caption_column: str | None
    key_column: str | None
    parts: int | None
    """Input files of a stream; None for a data set that is read at random."""


@dataclass(frozen=True, kw_only=True)
class SplitSource(SplitColumns):
    """The split of a data set that shards are made from."""

    data: str
    """The data set, as given; empty if the manifest was rebuilt without it."""
    images: int
    digest: str
    """Digest of every image's key, caption and encoded size, in order."""


@dataclass(frozen=True)
class Shard:
    """One file."""

    file: str
    records: int
    codes: int
    rejects: int
    """Images that could not be read."""
    sha256: str
    images: int
    """Images of the data set: those with records, and rejects."""


@dataclass(frozen=True)
class Footer:
    """What a shard records of itself, as metadata of the parquet file."""

    config: ShardConfig
    split: str
    columns: SplitColumns
    last: bool
    """Whether it is the last shard of the split, or of its input file."""
    images: int
    records: int
    codes: int
    digest: str
    """Digest of the keys, captions and encoded sizes of its images."""
    sha256: str
    """Digest of all bytes of the file before the footer."""
    rejects: list[dict[str, Any]]
    """{"key", "reason", "index" in the shard} of each image that could not be read."""


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

    def write(self, directory: AnyPath) -> None:
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
    def read(cls, directory: AnyPath) -> Manifest:
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
            if any(directory.glob("*.parquet")):
                raise ShardError(
                    f"{directory}: its shards are not complete; the same `lavit-tok shards` "
                    "command adds the others"
                ) from None
            raise ShardError(f"{path}: not a folder of shards: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = error if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"
            raise ShardError(
                f"{path}: expected a manifest, {FORMAT} version {VERSION}: {reason}"
            ) from None


@dataclass(frozen=True)
class ShardFile:
    """A shard that is complete."""

    footer: Footer
    sha256: str
    """Of the whole file."""

    def listed(self, file: str) -> Shard:
        """Its entry in the manifest."""
        f = self.footer
        return Shard(file, f.records, f.codes, len(f.rejects), self.sha256, f.images)


def joined_digest(digests: Sequence[str]) -> str:
    """The digest of a split from those of its shards."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def shard_name(split: str, number: int, part: int | None = None) -> str:
    """("train", 1) -> train-00001.parquet; ("train", 1, 12) -> train-00012-00001.parquet."""
    return f"{split}-{'' if part is None else f'{part:05d}-'}{number:05d}.parquet"


def shard_position(split: str, file: str) -> tuple[int, int] | None:
    """(part, number) of the name of a shard; None for any other name."""
    match = re.fullmatch(rf"{re.escape(split)}-(?:(\d{{5,}})-)?(\d{{5,}})\.parquet", file)
    return match and (int(match[1] or 0), int(match[2]))


def sha256(path: AnyPath) -> str:
    """The hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_bytes(table: Any, footer: dict[str, Any], config: ShardConfig) -> tuple[bytes, ShardFile]:
    """The content of a shard's file.

    Args:
        table: the records, with the columns of `schema`.
        footer: the fields of `Footer` that do not follow from the other arguments.
        config: what all shards have in common.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    sizes = config.codebook_size, config.patches
    header = CodeFileHeader(config.tokenizer, *sizes, config.fingerprint)
    columns = schema(config.flip)
    table = table.select(columns.names).cast(columns).combine_chunks()
    sink = io.BytesIO()
    metadata = {CODES: header.to_json()}
    with pq.ParquetWriter(sink, columns.with_metadata(metadata), compression="zstd") as writer:
        writer.write_table(table, row_group_size=ROW_GROUP)
        codes = pc.sum(table["length"]).as_py() or 0
        digest = hashlib.sha256(sink.getvalue()).hexdigest()
        made = Footer(config, records=len(table), codes=codes, sha256=digest, **footer)
        writer.add_key_value_metadata({FOOTER: json.dumps(asdict(made))})
    content = sink.getvalue()
    return content, ShardFile(made, hashlib.sha256(content).hexdigest())


def read_footer(path: AnyPath) -> ShardFile:
    """The footer of a shard. Raises ShardError for a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    damaged = (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    try:
        content = path.read_bytes()
        metadata = pq.read_metadata(io.BytesIO(content)).metadata or {}
        values = json.loads(metadata[FOOTER.encode()])
        start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        config, columns = (
            _record(kind, values[name])
            for name, kind in (("config", ShardConfig), ("columns", SplitColumns))
        )
        footer = Footer(**{**values, "config": config, "columns": columns})
    except damaged as error:
        raise ShardError(
            f"{path}: truncated, or not a shard of version {VERSION}: {type(error).__name__}: "
            f"{error}"
        ) from None
    if hashlib.sha256(content[:start]).hexdigest() != footer.sha256:
        raise ShardError(f"{path}: altered: its sha256 is not the one in its footer")
    return ShardFile(footer, hashlib.sha256(content).hexdigest())


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

"""Files of codes: one picture a row, as parquet or JSON lines, with a header that says which codebook they index.

    header     {"format": "lavit_tok.codes", "version": 1, "tokenizer": "default", "codebook_size": 2048, "patches": 64}
    row        {"key": "cat.png", "codes": [17, 803, 4], "length": 3, "keep": [0, 9, 33]}

`keep` lists the patches behind the codes (raster order), or is null. In JSON lines the header is the first line; in
parquet it is the schema's metadata under "lavit_tok.codes", and the rows' columns are string, list<int32>, int32,
list<int32>. A file is written beside its place and moved there when it is complete.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from lavit_tok.data.jobs import atomic

FORMAT, VERSION = "lavit_tok.codes", 1
SUFFIXES = (".parquet", ".jsonl")
ROW_GROUP = 8192


class CodeFileError(ValueError):
    """A file that does not hold codes; the message names the file and the reason."""


@dataclass(frozen=True)
class Header:
    """What all rows of a file share."""

    tokenizer: str
    """Directory or Hub id of the tokenizer, or "default", as it was given."""
    codebook_size: int
    """K: codes lie in 0..K-1."""
    patches: int
    """n: kept patches lie in 0..n-1."""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes, source: Path) -> Header:
        try:
            values = json.loads(text)
            kind, version = values.pop("format"), values.pop("version")
            if (kind, version) == (FORMAT, VERSION):
                return cls(
                    str(values["tokenizer"]), int(values["codebook_size"]), int(values["patches"])
                )
        except (ValueError, KeyError, TypeError, AttributeError):
            kind, version = "no such header", ""
        raise CodeFileError(
            f"{source}: expected a file of codes ({FORMAT} version {VERSION}), got {kind} {version}".strip()
        )


@dataclass(frozen=True)
class CodeRecord:
    """One picture's codes."""

    key: str
    codes: list[int]
    keep: list[int] | None = None


@dataclass(frozen=True)
class BadRecord:
    """A row that cannot be read."""

    key: str
    reason: str


class Writer(Protocol):
    def add(self, rows: Sequence[CodeRecord]) -> None: ...


@contextmanager
def code_writer(path: Path | None, header: Header) -> Iterator[Writer]:
    """A writer of rows to .parquet or .jsonl, or as JSON lines to stdout. Raises CodeFileError for other suffixes."""
    if path is None:
        yield _JsonWriter(sys.stdout, header)
        return
    require_suffix(path)
    with atomic(path) as part:
        if path.suffix == ".jsonl":
            with open(part, "w", encoding="utf-8") as file:
                yield _JsonWriter(file, header)
        else:
            with _ParquetWriter(part, header) as writer:
                yield writer


def require_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise CodeFileError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def read_codes(path: Path) -> tuple[Header, Iterator[CodeRecord | BadRecord]]:
    """Header and rows; a row that is no list of whole numbers comes as BadRecord. Raises CodeFileError, OSError."""
    require_suffix(path)
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8", errors="replace") as file:
            header = Header.from_json(file.readline(), path)
        return header, _json_rows(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(path, "rb"):  # a missing file is an OSError here, whatever pyarrow makes of it
        pass
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise CodeFileError(f"{path}: not a whole parquet file: {error}") from None
    metadata = file.schema_arrow.metadata or {}
    return Header.from_json(metadata.get(FORMAT.encode(), b""), path), _parquet_rows(file)


def _json_rows(path: Path) -> Iterator[CodeRecord | BadRecord]:
    with open(path, encoding="utf-8", errors="replace") as file:
        next(file)
        for number, line in enumerate(file, start=2):
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            yield _row(values, f"line {number}")


def _parquet_rows(file: Any) -> Iterator[CodeRecord | BadRecord]:
    number = 0
    for batch in file.iter_batches(batch_size=ROW_GROUP):
        for values in batch.to_pylist():
            yield _row(values, f"row {number}")
            number += 1


def _row(values: Any, place: str) -> CodeRecord | BadRecord:
    if not isinstance(values, dict):
        return BadRecord(place, "not a JSON object")
    key, codes, keep = str(values.get("key", place)), values.get("codes"), values.get("keep")
    if not _whole_numbers(codes):
        return BadRecord(key, "codes: expected a list of whole numbers")
    if keep is not None and not _whole_numbers(keep):
        return BadRecord(key, "keep: expected a list of patches or nothing")
    if values.get("length", len(codes)) != len(codes):
        return BadRecord(key, f"length says {values['length']}, but there are {len(codes)} codes")
    return CodeRecord(key, codes, keep)


def _whole_numbers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(v) is int and -(2**31) <= v < 2**31 for v in values
    )


class _JsonWriter:
    def __init__(self, file: Any, header: Header) -> None:
        self.file = file
        self.header: Header | None = header

    def add(self, rows: Sequence[CodeRecord]) -> None:
        if (
            self.header is not None
        ):  # not before there is a row, so that a job that fails prints nothing
            print(self.header.to_json(), file=self.file)
            self.header = None
        for row in rows:
            print(json.dumps(_values(row), ensure_ascii=False), file=self.file)


def _values(row: CodeRecord) -> dict[str, Any]:
    return {"key": row.key, "codes": row.codes, "length": len(row.codes), "keep": row.keep}


class _ParquetWriter:
    def __init__(self, path: Path, header: Header) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        numbers = pa.list_(pa.int32())
        fields = {"key": pa.string(), "codes": numbers, "length": pa.int32(), "keep": numbers}
        self.schema: Any = pa.schema(list(fields.items()), metadata={FORMAT: header.to_json()})
        self.table: Any = pa.Table
        self.file: Any = pq.ParquetWriter(path, self.schema, compression="zstd")
        self.waiting: list[CodeRecord] = []

    def add(self, rows: Sequence[CodeRecord]) -> None:
        self.waiting += rows
        if len(self.waiting) >= ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.file.write_table(
                self.table.from_pylist(list(map(_values, self.waiting)), schema=self.schema)
            )
        self.waiting = []

    def __enter__(self) -> _ParquetWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self.flush()
        finally:
            self.file.close()

r"""Code files: the codes of images as parquet or JSON lines, with a header that names the codebook.

    header     {"format": "lavit_tok.codes", "version": 1, "tokenizer": "default",
                "codebook_size": 2048, "patches": 64, "fingerprint": "91fa3ade00efa85e"}
    record     {"key": "cat.png", "codes": [17, 803, 4], "length": 3, "keep": [0, 9, 33]}

`keep` lists the patches of the codes (raster order), or is null. In JSON lines the header is the
first line; in parquet it is metadata of the schema under "lavit_tok.codes", and the columns are
string, list<int32>, int32, list<int32>.

Keys that are names of files need not be UTF-8 (Python holds such bytes as surrogates): JSON escapes
them as \udcff, and so does the column of parquet. The parquet footer has the SHA-256 of all
records, which is compared before any is used: a damaged file is refused, never read with other
codes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeGuard

from lavit_tok.checkpoints.files import atomic, escape, json_line, unescape

FORMAT, VERSION = "lavit_tok.codes", 1
SUFFIXES = (".parquet", ".jsonl")
ROW_GROUP = 8192
COLUMNS = ["key", "codes", "length", "keep"]
CHECKSUM = f"{FORMAT}.sha256"
MAX_LINE = 16 << 20
"""Bytes of a line; only so much of a longer one, as of a sparse file, is in memory at a time."""


class CodeFileError(ValueError):
    """A file that does not hold codes; the message names the file and the reason."""


@dataclass(frozen=True)
class CodeFileHeader:
    """What all records of a file have in common."""

    tokenizer: str
    """"default", directory or Hub id of the tokenizer, as given."""
    codebook_size: int
    """K; codes are in 0..K-1."""
    patches: int
    """n; kept patches are in 0..n-1."""
    fingerprint: str | None = None
    """`VisualTokenizer.fingerprint()`, of the codebook; None in files of older versions."""

    def to_json(self) -> str:
        """JSON with format and version."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps({"format": FORMAT, "version": VERSION, **known})

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> CodeFileHeader:
        """Parse the header of a file. Raises CodeFileError."""
        try:
            values = json.loads(text)
            kind, version = values.pop("format"), values.pop("version")
            if (kind, version) == (FORMAT, VERSION):
                sizes = values["codebook_size"], values["patches"]
                if all(type(size) is int and 0 < size < 2**31 for size in sizes):
                    fingerprint = values.get("fingerprint")
                    known = None if fingerprint is None else str(fingerprint)[:64]
                    return cls(str(values["tokenizer"]), *sizes, known)
                kind, version = "codebook_size and patches", f"{sizes[0]!r} and {sizes[1]!r}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            kind, version = "no such header", ""
        expected = f"a code file ({FORMAT} version {VERSION})"
        got = f"{kind} {version}".strip()[:200]
        raise CodeFileError(f"{path}: expected {expected}, got {got}")


@dataclass(frozen=True)
class CodeRecord:
    """The codes of one image."""

    key: str
    codes: list[int]
    keep: list[int] | None = None


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be read."""

    key: str
    reason: str


class CodeWriter(Protocol):
    """Writes records to a file."""

    def add(self, records: Sequence[CodeRecord]) -> None:
        """Append records."""


@contextmanager
def code_writer(path: Path | None, header: CodeFileHeader) -> Iterator[CodeWriter]:
    """Open a writer to .parquet or .jsonl, or, without a path, of JSON lines to stdout.

    Raises:
        CodeFileError: another suffix.
    """
    if path is None:
        yield _JsonWriter(sys.stdout, header)
        return
    require_suffix(path)
    with atomic(path) as partial:
        if path.suffix == ".jsonl":
            with open(partial, "w", encoding="utf-8") as file:
                yield _JsonWriter(file, header)
        else:
            with _ParquetWriter(partial, header) as writer:
                yield writer


def require_suffix(path: Path) -> None:
    """Raise CodeFileError for a name that does not end in .parquet or .jsonl."""
    if path.suffix not in SUFFIXES:
        raise CodeFileError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def read_codes(path: Path) -> tuple[CodeFileHeader, Iterator[CodeRecord | BadRecord]]:
    """Header and records; a record that is not a list of integers comes as BadRecord.

    Raises:
        CodeFileError: not a code file, or a damaged parquet file.
        OSError: the file cannot be opened.
    """
    require_suffix(path)
    if not path.is_dir() and not path.is_file() and path.exists():
        raise CodeFileError(f"{path}: expected a regular file, to be read more than once")
    if path.suffix == ".jsonl":
        with open(path, "rb", buffering=1 << 20) as file:
            header = CodeFileHeader.from_json(file.readline(MAX_LINE), path)
        return header, _json_records(path)
    import pyarrow.parquet as pq

    file = open(path, "rb")  # noqa: SIM115 (until the records are read); pyarrow's paths are UTF-8
    # Damaged files raise many kinds of exceptions, UnicodeDecodeError and MemoryError among them.
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        metadata = {**(parquet.schema_arrow.metadata or {}), **(parquet.metadata.metadata or {})}
        names = parquet.schema_arrow.names
    except Exception as error:
        raise CodeFileError(f"{path}: not a complete parquet file: {_one_line(error)}") from None
    text = metadata.get(FORMAT.encode(), b"")
    header = CodeFileHeader.from_json(text, path)
    # The header states it too: damage to either name must not end the comparison.
    if not json.loads(text).get("checksum") and CHECKSUM.encode() not in metadata:  # a shard
        return header, _parquet_records(path, parquet)
    try:
        sha = _Checksum(header)
        for batch in parquet.iter_batches(ROW_GROUP):
            sha.update(batch.to_pylist())
    except Exception as error:
        raise CodeFileError(f"{path}: damaged: {_one_line(error)}") from None
    if names != COLUMNS or sha.digest() != metadata.get(CHECKSUM.encode(), b"").decode(
        "ascii", "replace"
    ):
        raise CodeFileError(
            f"{path}: damaged: expected the records whose SHA-256 is in the footer, got "
            "others: some would decode to unrelated images; make the file again"
        )
    return header, _parquet_records(path, parquet, unescape)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


class _Checksum:
    """SHA-256 of a header and of all records, as they are in the columns."""

    def __init__(self, header: CodeFileHeader) -> None:
        self._sha = hashlib.sha256(header.to_json().encode())

    def update(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            self._sha.update(json.dumps([record.get(name) for name in COLUMNS]).encode())

    def digest(self) -> str:
        return self._sha.hexdigest()


def _json_records(path: Path) -> Iterator[CodeRecord | BadRecord]:
    with open(path, "rb", buffering=1 << 20) as file:
        file.readline(MAX_LINE)  # the header
        for number, line in enumerate(_lines(file), start=2):
            location = f"line {number}"
            if len(line) > MAX_LINE:
                yield BadRecord(location, f"longer than {MAX_LINE} bytes")
                continue
            try:
                yield _record(json.loads(line.decode()), location)
            except UnicodeDecodeError as error:
                reason = f"not UTF-8: {error.reason} at byte {error.start}"
                yield BadRecord(location, reason)
            except RecursionError:
                yield BadRecord(location, "nested too deeply")
            except ValueError:
                yield BadRecord(location, "not a JSON object")


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than MAX_LINE only the beginning."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


def _parquet_records(
    path: Path, file: Any, read_key: Callable[[str], str] = str
) -> Iterator[CodeRecord | BadRecord]:
    number = 0
    try:
        for batch in file.iter_batches(batch_size=ROW_GROUP):
            for values in batch.to_pylist():
                if isinstance(values.get("key"), str):
                    values["key"] = read_key(values["key"])
                yield _record(values, f"record {number}")
                number += 1
    except Exception as error:
        raise CodeFileError(f"{path}: damaged after {number} records: {_one_line(error)}") from None


def _record(values: Any, location: str) -> CodeRecord | BadRecord:
    if not isinstance(values, dict):
        return BadRecord(location, "not a JSON object")
    key, codes, keep = (
        str(values.get("key", location)),
        values.get("codes"),
        values.get("keep"),
    )
    if not _integers(codes):
        return BadRecord(key, "codes: expected a list of integers")
    if keep is not None and not _integers(keep):
        return BadRecord(key, "keep: expected a list of patches or null")
    if values.get("length", len(codes)) != len(codes):
        length = str(values["length"])[:50]
        return BadRecord(key, f"length is {length}, but there are {len(codes)} codes")
    return CodeRecord(key, codes, keep)


def _integers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(v) is int and -(2**31) <= v < 2**31 for v in values
    )


def _values(record: CodeRecord) -> dict[str, Any]:
    codes = record.codes
    return {"key": record.key, "codes": codes, "length": len(codes), "keep": record.keep}


class _JsonWriter:
    def __init__(self, file: Any, header: CodeFileHeader) -> None:
        self.file, self.header = file, header.to_json() + "\n"

    def add(self, records: Sequence[CodeRecord]) -> None:
        # The header comes with the first records, so that a job that fails prints nothing.
        lines = [json_line(_values(record)) for record in records]
        self.file.write(self.header + "".join(lines))
        self.header = ""


class _ParquetWriter:
    def __init__(self, path: Path, header: CodeFileHeader) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.checksum = _Checksum(header)
        numbers = pa.list_(pa.int32())
        fields = {"key": pa.string(), "codes": numbers, "length": pa.int32(), "keep": numbers}
        text = json.dumps({**json.loads(header.to_json()), "checksum": "sha256"})
        self.schema: Any = pa.schema(list(fields.items()), metadata={FORMAT: text})
        self.table: Any = pa.Table
        self.sink = open(path, "wb")  # noqa: SIM115 (until __exit__); pyarrow's paths are UTF-8
        self.file: Any = pq.ParquetWriter(
            self.sink, self.schema, compression="zstd", write_page_checksum=True
        )
        self.waiting: list[CodeRecord] = []

    def add(self, records: Sequence[CodeRecord]) -> None:
        self.waiting += records
        if len(self.waiting) >= ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            values = [{**_values(r), "key": escape(r.key)} for r in self.waiting]
            self.checksum.update(values)
            self.file.write_table(self.table.from_pylist(values, schema=self.schema))
        self.waiting = []

    def __enter__(self) -> _ParquetWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self.flush()
                self.file.add_key_value_metadata({CHECKSUM: self.checksum.digest()})
        finally:
            with self.sink:
                self.file.close()

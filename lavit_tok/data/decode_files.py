"""Decoding code files, in a job that can be stopped and resumed.

    code files -engine: read, decode-> tables of images, in any order -decode_files-> PNG or parquet

A PNG file, or a parquet file of `size` records, stores a digest of its records and of everything
else that its images depend on. A file that already has the expected digest is not written again.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lavit_tok.checkpoints.files import atomic, escape, unescape
from lavit_tok.data.code_files import (
    SUFFIXES,
    BadRecord,
    CodeFileError,
    CodeFileHeader,
    CodeRecord,
    read_codes,
)
from lavit_tok.data.decode_batch import PROGRAM, require_codes
from lavit_tok.data.ray_engine import Work
from lavit_tok.data.rejects import Rejects

FOOTER = "lavit_tok.images"
NAMES = {"png": r"(\d{5}-)?\d{6}-.*\.png|sheet\.png", "parquet": r"\d{5}-\d{5}\.parquet"}
RECORDS = pa.schema(
    {
        "file": pa.string(),
        "count": pa.int64(),  # records of the file
        "digest": pa.string(),
        "index": pa.int64(),  # code file << 32 | number of the record
        "key": pa.string(),
        "codes": pa.list_(pa.int32()),  # null for bad records, and those of files that exist
        "reason": pa.string(),
    }
)
IMAGES = pa.schema(
    {"key": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
)


@dataclass(frozen=True)
class CodeSource:
    """Code files, read in batches by any process."""

    paths: Sequence[Path]
    step: int
    """Records of a batch."""
    size: int | None
    """Records of a parquet file; None for a PNG file of each record."""
    digest: str
    """Of the decoder and its options."""
    codebook_size: int
    patches: int
    """Most codes of an image."""
    done: dict[str, str] = field(default_factory=dict)
    """Files that exist -> digests."""

    def work(self) -> list[Work]:
        """An item for each code file."""
        return [Work(part) for part in range(len(self.paths))]

    def batches(self, work: Work) -> Iterator[pa.Table]:
        """Tables of RECORDS."""
        _, records = read_codes(self.paths[work.part])
        numbered = enumerate(records)
        pending: list[dict[str, Any]] = []
        for block in count():
            found = [self._record(work.part, *item) for item in islice(numbered, self.size or 1)]
            if not found:
                break
            name = f"{work.part:05d}-{block:05d}.parquet"
            if self.size is None:
                prefix = f"{work.part:05d}-" if len(self.paths) > 1 else ""
                name = prefix + png_name(block, unescape(found[0]["key"]))
            sha = hashlib.sha256(json.dumps([self.digest, found]).encode()).hexdigest()[:16]
            common: dict[str, Any] = {"file": name, "count": len(found), "digest": sha}
            if self.done.get(name) == sha:
                common["codes"] = None
            pending += [record | common for record in found]
            while len(pending) >= self.step:
                yield pa.Table.from_pylist(pending[: self.step], RECORDS)
                pending = pending[self.step :]
        if pending:
            yield pa.Table.from_pylist(pending, RECORDS)

    def _record(self, part: int, number: int, record: CodeRecord | BadRecord) -> dict[str, Any]:
        values = {"index": part << 32 | number, "key": escape(record.key)}
        try:
            if isinstance(record, BadRecord):
                raise CodeFileError(record.reason)
            require_codes(record.codes, self.codebook_size, self.patches)
        except ValueError as error:
            return values | {"codes": None, "reason": str(error)}
        return values | {"codes": record.codes, "reason": None}


def code_files(path: Path) -> tuple[list[Path], CodeFileHeader]:
    """A code file, or those of a folder in the order of their names; and what they have in common.

    Raises:
        CodeFileError: none, or files of different codebooks.
    """
    paths = [path]
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        paths = [file for file in paths if not file.name.endswith(".rejects.jsonl")]
        if not paths:
            raise CodeFileError(f"{path}: expected code files ({', '.join(SUFFIXES)}), got none")
    headers = [read_codes(file)[0] for file in paths]
    for file, header in zip(paths, headers, strict=True):
        for name in ("codebook_size", "fingerprint", "patches"):
            first, other = getattr(headers[0], name), getattr(header, name)
            if first != other:
                raise CodeFileError(
                    f"{file}: expected the {name} {first} of {paths[0].name}, got {other}: codes "
                    "of different tokenizers need different decoders"
                )
    return paths, headers[0]


def existing(out: Path, suffix: str, overwrite: bool) -> dict[str, str]:
    """Files of earlier jobs -> their digests, "" for a file without one.

    Raises:
        ValueError: a result would replace a file of another program, without `overwrite`.
    """
    found = {}
    for path in out.iterdir() if out.is_dir() else ():
        if not re.fullmatch(NAMES[suffix], path.name):
            continue
        if suffix == "png":
            with open(path, "rb") as file:  # its text chunks are before the pixels
                head = file.read(256)
            is_own = b"tEXtSoftware\0" + PROGRAM.encode() in head
            digest = re.search(rb"tEXtDigest\0([0-9a-f]{16})", head)
            found[path.name] = digest[1].decode() if digest else ""
        else:
            try:
                metadata = pq.read_metadata(path).metadata or {}
            except (pa.ArrowException, OSError):
                metadata = {}
            is_own = FOOTER.encode() in metadata
            found[path.name] = metadata.get(FOOTER.encode(), b"").decode()
        if not (is_own or overwrite):
            raise ValueError(
                f"{path}: not written by {PROGRAM}, and results could replace it: use another "
                "--out, or --overwrite"
            )
    return found


def decode_files(tables: Iterator[pa.Table], out: Path, rejects: Rejects) -> tuple[int, int]:
    """Write the images of an engine; returns the numbers of images, and of those from earlier jobs.

    Args:
        tables: batches of `CodeSource` after `decode_batch`, in any order.
        out: folder of the files.
        rejects: gets the records that cannot be decoded, in order.

    Raises:
        OSError: a file cannot be written.
        AllSkippedError: no record can be decoded.
    """
    waiting: dict[str, list[dict[str, Any]]] = {}
    bad: list[tuple[int, str, str]] = []
    images = earlier = 0
    with tqdm(None, "decode", unit=" images", file=sys.stderr, disable=None) as progress:
        for table in tables:
            for record in table.to_pylist():
                file = record["file"]
                records = waiting.setdefault(file, [])
                records.append(record)
                if len(records) == record["count"]:
                    _save(out / file, sorted(waiting.pop(file), key=lambda one: one["index"]))
                if record["reason"] is not None:
                    bad.append((record["index"], unescape(record["key"]), record["reason"]))
                elif record["image"] is None:
                    earlier += 1
                images += record["reason"] is None
            progress.update(len(table))
            progress.set_postfix_str(f"{len(bad)} skipped", False)
    assert not waiting, f"files without all records: {[*waiting]}"
    for _, key, reason in sorted(bad):
        rejects.add(key, ValueError(reason))
    rejects.require(images)
    return images, earlier


def png_name(number: int, key: str) -> str:
    """Item 7 with key "a/cat 1.jpg" -> "000007-cat_1.png"."""
    return f"{number:06d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(key).stem)[:80]}.png"


def _save(path: Path, records: list[dict[str, Any]]) -> None:
    decoded = [record for record in records if record["image"] is not None]
    if not decoded:  # bad, or of an earlier job
        return
    with atomic(path) as partial:
        if path.suffix == ".png":
            partial.write_bytes(decoded[0]["image"])
            return
        columns = [
            {"key": record["key"], "image": {"bytes": record["image"]}} for record in decoded
        ]
        schema = IMAGES.with_metadata({FOOTER: decoded[0]["digest"]})
        with open(partial, "wb") as file:  # pyarrow's paths are UTF-8
            pq.write_table(pa.Table.from_pylist(columns, schema), file, compression="none")

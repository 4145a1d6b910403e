"""Records are read where they are, and equal those of `Shards.dataset()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lavit_tok import ShardError, Shards
from lavit_tok.cli import main
from lavit_tok.data.code_files import ROW_GROUP
from lavit_tok.data.shard_manifest import Manifest, shard_bytes
from lavit_tok.data.shard_records import ShardRecords


def as_lists(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in record.items()}


def test_records_by_number(folder: Path, tmp_path: Path):
    """Over several files, in any order, with few chunks in memory; each chunk read once."""
    arguments = [str(folder / "pictures"), "--tokenizer", str(folder / "visual"), "--flip"]
    out = tmp_path / "sharded"
    assert main(["shards", *arguments, "--out", str(out), "--shard-size", "5"]) == 0
    shards = Shards.open(out, "train", verify=None)
    expected = [*shards.dataset()]
    records = ShardRecords(shards, verify=True, chunk=7, kept=2)
    read: list[int] = []
    reads = records._read
    records._read = lambda chunk: read.append(chunk) or reads(chunk)  # type: ignore
    assert [as_lists(record) for record in records] == expected and len(records) == 48
    assert read == [*range(7)]
    assert as_lists(records[3]) == expected[3] and as_lists(records[47]) == expected[47]
    assert read[7:] == [0], "the last two chunks were kept"
    lengths = records.select_columns(["key", "length"])
    assert lengths[20] == {name: expected[20][name] for name in ("key", "length")}
    with pytest.raises(IndexError, match="record 48 of 48"):
        records[48]
    damaged = shards.files[3]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = ShardRecords(shards, verify=True, chunk=7)
    assert as_lists(again[0]) == expected[0]
    with pytest.raises(ShardError, match=r"train-00003\.parquet: truncated or altered"):
        again[31]


def test_a_chunk_reads_its_row_groups_only(folder: Path, tmp_path: Path):
    """Of a shard larger than a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = Manifest.read(folder / "shards")
    split, count = manifest.splits["train"], 2 * ROW_GROUP + 5
    table: Any = pa.table(
        {
            "key": [str(i) for i in range(count)],
            "caption": [""] * count,
            "codes": [[i % 16] for i in range(count)],
            "length": [1] * count,
            "keep": [[0]] * count,
        }
    )
    footer = {"split": "train", "columns": split.source, "last": True, "images": count}
    content, _ = shard_bytes(table, {**footer, "digest": "", "rejects": []}, manifest.config)
    path = tmp_path / "large.parquet"
    path.write_bytes(content)
    assert pq.read_metadata(path).num_row_groups == 3
    shards = Shards.open(folder / "shards", "train")
    records = ShardRecords(shards, chunk=4096)
    shard = type(split.shards[0])("../large.parquet", count, count, 0, "", count)
    records._files, records._ends[0] = [shard], count
    (folder / "large.parquet").write_bytes(content)
    object.__setattr__(shards, "records", count)
    for number in (0, 4095, 4096, ROW_GROUP, 2 * ROW_GROUP + 4):
        assert records[number]["key"] == str(number)
        assert records[number]["codes"].tolist() == [number % 16]

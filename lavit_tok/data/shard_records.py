"""Records of shards by number, read from the parquet files themselves as they are needed.

record i  ->  chunk i // 4096, in one or more files  -kept in memory->  key, caption, codes, ...
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavit_tok.data.shard_manifest import Manifest
from lavit_tok.data.shard_reader import Shards, check_shard

CHUNK, KEPT = 4096, 128
"""Consecutive records that are read together, and how many such chunks stay in memory."""


class ShardRecords:
    """`records[i]` is record i of a split, as `Shards.dataset()[i]`, without a copy on disk.

        three files of 3 records, chunks of 4   files   |0 1 2|3 4 5|6 7 8|
                                                chunks  |0 1 2 3|4 5 6 7|8|

    A chunk is read when one of its records is needed, and the most recently used ones are kept:
    about 0.9 MB each for 21 codes a record. An order that stays within few chunks at a time, such
    as lavit_lm's LocalPermutation, reads each file about once an epoch.

    Args:
        shards: one split.
        columns: which are read; by default all.
        verify: compare each file with its digest when it is first read, for shards that were opened
            without.
        chunk: consecutive records of a chunk.
        kept: chunks that stay in memory.

    Raises:
        ShardError: a file that is missing, truncated or altered, when it is read.
    """

    def __init__(
        self,
        shards: Shards,
        columns: Sequence[str] | None = None,
        verify: bool = False,
        chunk: int = CHUNK,
        kept: int = KEPT,
    ) -> None:
        self.shards, self.columns, self.verify = shards, columns, verify
        self.chunk, self.kept = chunk, kept
        manifest = Manifest.read(shards.directory)
        self._config, listed = manifest.config, manifest.splits[shards.split].shards
        self._files = [shard for shard in listed if shard.records]
        self._ends = np.cumsum([shard.records for shard in self._files])
        self._checked: set[int] = set()
        self._chunks: OrderedDict[int, dict[str, Any]] = OrderedDict()

    def __len__(self) -> int:
        return self.shards.records

    def select_columns(self, columns: Sequence[str]) -> ShardRecords:
        """The same records with these columns only."""
        return ShardRecords(self.shards, columns, self.verify, self.chunk, self.kept)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A dict of str, int and bool, and int32 arrays [length] for lists. Raises IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        at, i = divmod(number, self.chunk)
        chunk = self._chunks.get(at)
        if chunk is None:
            chunk = self._chunks[at] = self._read(at)
            if len(self._chunks) > self.kept:
                self._chunks.popitem(last=False)
        else:
            self._chunks.move_to_end(at)
        return {
            name: values[0][values[1][i] : values[1][i + 1]]
            if isinstance(values, tuple)
            else values[i].as_py()
            for name, values in chunk.items()
        }

    def _read(self, chunk: int) -> dict[str, Any]:
        """Each column of a chunk: an Arrow array, or (values, offsets) of lists."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        start, stop = chunk * self.chunk, min((chunk + 1) * self.chunk, len(self))
        parts = []
        for file in range(
            int(np.searchsorted(self._ends, start, side="right")),
            int(np.searchsorted(self._ends, stop - 1, side="right")) + 1,
        ):
            shard = self._files[file]
            path, first = self.shards.directory / shard.file, int(self._ends[file]) - shard.records
            if self.verify and file not in self._checked:
                check_shard(path, shard, self._config)
                self._checked.add(file)
            with open(path, "rb") as opened, pq.ParquetFile(opened) as parquet:
                for group in range(parquet.num_row_groups):
                    size = parquet.metadata.row_group(group).num_rows
                    if first < stop and first + size > start:
                        table = parquet.read_row_group(group, self.columns, use_threads=False)
                        begin = max(start - first, 0)
                        parts.append(table.slice(begin, stop - first - begin))
                    first += size
        table = pa.concat_tables(parts).combine_chunks()
        columns: dict[str, Any] = {}
        for name in table.column_names:
            values = pa.concat_arrays(table[name].chunks)
            columns[name] = values
            if pa.types.is_list(values.type):
                lengths = values.value_lengths().to_numpy(zero_copy_only=False)
                numbers = np.array(values.flatten().to_numpy(zero_copy_only=False))
                columns[name] = numbers, np.concatenate([[0], np.cumsum(lengths)])
        return columns

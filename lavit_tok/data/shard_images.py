"""The pictures behind shards: for whoever reads codes from shards, and pixels from where the codes were made.

shards, and the data set they were made from  -ShardImages->  uint8 [3 s s] of any row
"""

from __future__ import annotations

import json

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from lavit_tok.data.image_sources import load_splits
from lavit_tok.data.shard_manifest import Manifest, ShardError
from lavit_tok.data.shard_reader import Shards
from lavit_tok.data.shard_source import SplitImages
from lavit_tok.encode.image_processor import ImageError, VisualImageProcessor


class ShardImages:
    """Map-style: pictures[i] is what the codes of row i were made from, opened when asked for.

        three pictures, number 1 corrupt, with mirror      row of the shards   0    1    2    3
                                                           picture             0    0'   2    2'     ' mirrored

    The whole data set is compared with what the shards' manifest says of it, once: every key, caption and encoded
    size, but no pixel.

    Args:
        shards: one split.
        data: the data set that `lavit-tok shards` read, here or elsewhere: image folder, parquet, webdataset tars,
            arrow folder or Hub name.
        image_processor: the tokenizer's.

    Raises:
        ValueError: nothing readable is there.
        ShardError: another data set, or one that was changed since: vectors of other pictures would stand for codes.
    """

    def __init__(self, shards: Shards, data: str, image_processor: VisualImageProcessor) -> None:
        source = Manifest.read(shards.directory).splits[shards.split].source
        found = load_splits(data)
        if shards.split not in found:
            raise ShardError(
                f"{data}: expected a split {shards.split!r} as in the shards, got {', '.join(found)}"
            )
        columns = (source.image_column, source.caption_column or "", source.key_column)
        self.images = SplitImages(found[shards.split], data, image_processor, *columns)
        self.data, self.flip = data, shards.flip
        if (len(self.images), self.images.digest()) != (source.images, source.digest):
            raise ShardError(
                f"{data}: expected the {source.images} pictures of split {shards.split!r} that {shards.directory} "
                f"was made from, got {len(self.images)}, of which a key, a caption or a file size is another: "
                "vectors of other pictures would stand for these codes"
            )
        rejects = shards.directory / f"{shards.split}.rejects.jsonl"
        lines = rejects.read_text(encoding="utf-8").split("\n") if rejects.exists() else []
        corrupt = [json.loads(line)["row"] for line in lines if line]
        self.rows = np.setdiff1d(np.arange(source.images), corrupt)
        if len(self) != shards.rows:
            raise ShardError(
                f"{rejects}: expected {shards.rejects} pictures that could not be read, got {len(corrupt)}"
            )

    def __len__(self) -> int:
        return len(self.rows) * (1 + self.flip)

    def __getitem__(self, row: int) -> UInt8[Tensor, "3 size size"]:
        """uint8 [3 s s]. Raises ImageError for a picture that can no longer be read, IndexError beyond the rows."""
        number, flipped = divmod(row, 1 + self.flip)
        at = int(self.rows[number])
        opened = self.images[range(at, at + 1)]
        (entry,) = opened.entries
        if entry.reason is not None:
            raise ImageError(
                f"{self.data}: {entry.key}: {entry.reason}; it could be read when the shards were made"
            )
        return opened.pixels[0].flip(2) if flipped else opened.pixels[0]

"""The images of shards, for code that reads codes from shards and pixels from the data set.

shards, and the data set they were made from  -ShardImages->  uint8 [3 s s] of any record
"""

from __future__ import annotations

import json

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from lavit_tok.data.shard_manifest import Manifest, ShardError, joined_digest
from lavit_tok.data.shard_reader import Shards
from lavit_tok.data.shard_source import SplitImages, digest
from lavit_tok.data.splits import hold_out, load_splits
from lavit_tok.encode.image_files import ImageError
from lavit_tok.encode.image_processor import VisualImageProcessor


class ShardImages:
    """Map-style: `images[i]` is the image of record i, opened when it is accessed.

        three images, number 1 corrupt, with flip   record of the shards   0    1    2    3
                                                    image                  0    0'   2    2'
                                                                           (' flipped)

    The data set is compared with the manifest once: all keys, captions and encoded sizes, but no
    pixels.

    Args:
        shards: one split.
        data: the data set that `lavit-tok shards` read, at this or another path.
        image_processor: the tokenizer's.

    Raises:
        ValueError: the data set cannot be read.
        ShardError: another data set, or one that has changed: images and codes would not match.
    """

    def __init__(self, shards: Shards, data: str, image_processor: VisualImageProcessor) -> None:
        splits = load_splits(data)
        manifest = Manifest.read(shards.directory)
        listed = manifest.splits[shards.split]
        source = listed.source
        if "validation" in manifest.splits:  # perhaps held out of the training split
            splits = hold_out(splits, source.image_column)
        if shards.split not in splits:
            raise ShardError(
                f"{data}: expected a split {shards.split!r} as in the shards, got "
                f"{', '.join(splits)}"
            )
        columns = (source.image_column, source.caption_column or "", source.key_column)
        self.images = SplitImages(splits[shards.split], data, image_processor.reader, *columns)
        self.data, self.flip = data, shards.flip
        digests, start = [], 0
        for shard in listed.shards:
            stop = min(start + shard.images, len(self.images))
            digests.append(digest(self.images.examples(start, stop)))
            start = stop
        if (len(self.images), joined_digest(digests)) != (source.images, source.digest):
            raise ShardError(
                f"{data}: expected the {source.images} images of split {shards.split!r} that "
                f"{shards.directory} was made from, got {len(self.images)}, with another key, "
                "caption or file size: images and codes would not match"
            )
        rejects = shards.directory / f"{shards.split}.rejects.jsonl"
        lines = rejects.read_text(encoding="utf-8").split("\n") if rejects.exists() else []
        corrupt = [json.loads(line)["index"] for line in lines if line]
        self.readable = np.setdiff1d(np.arange(source.images), corrupt)
        if len(self) != shards.records:
            raise ShardError(
                f"{rejects}: expected {shards.rejects} images that could not be read, got "
                f"{len(corrupt)}"
            )

    def __len__(self) -> int:
        return len(self.readable) * (1 + self.flip)

    def __getitem__(self, record: int) -> UInt8[Tensor, "3 size size"]:
        """Raises ImageError for an image that can no longer be read, and IndexError."""
        number, flipped = divmod(record, 1 + self.flip)
        index = int(self.readable[number])
        (opened,) = self.images.decoded(index).to_pylist()
        if opened["reason"] is not None:
            raise ImageError(
                f"{self.data}: {opened['key']}: {opened['reason']}; it could be read when the "
                "shards were made"
            )
        size = self.images.reader.size
        pixels = torch.frombuffer(bytearray(opened["pixels"]), dtype=torch.uint8)
        pixels = pixels.reshape(3, size, size)
        return pixels.flip(2) if flipped else pixels

"""Random crops of every training image, with the same caption, added to the data set.

    python recipes/data/views.py --data OUT --out VIEWS [--views 2]

A language model trains on each image many times, and memorizes its codes; a crop moves every patch,
so its codes differ. Validation and test images are not changed. The crop depends only on the key.

    one image, two views      key      image
                              k        the original
                              k@1      a crop of the same aspect ratio, MIN_AREA to 1 of the area
                              k@2      another one
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from build import SHARD_SIZE, SPLITS
from datasets import Dataset, load_dataset
from PIL import Image

MIN_AREA = 0.6
"""Smallest ratio of a crop's area to the image's."""


def crop(image: Image.Image, seed: str) -> Image.Image:
    """A crop of the image's aspect ratio, its position and size drawn from `seed`."""
    draw = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big"))
    side = draw.uniform(MIN_AREA, 1.0) ** 0.5
    width, height = (max(1, round(side * length)) for length in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def encoded(image: Image.Image, like: str) -> bytes:
    """The image in the file format `like`."""
    buffer = io.BytesIO()
    image.save(buffer, like, **({"quality": 92} if like == "JPEG" else {}))
    return buffer.getvalue()


def views(examples: Any, count: int) -> Iterator[dict[str, Any]]:
    """Every example, followed by its crops."""
    for example in examples:
        yield example
        with Image.open(io.BytesIO(example["image"]["bytes"])) as image:
            for number in range(1, count + 1):
                key = f"{example['key']}@{number}"
                view = {"bytes": encoded(crop(image, key), image.format or "PNG"), "path": None}
                yield {**example, "image": view, "key": key}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that build.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the larger data set")
    parser.add_argument("--views", type=int, default=2, help="crops of each training image")
    arguments = parser.parse_args()
    files = {split: str(arguments.data / "data" / f"{split}-*.parquet") for split in SPLITS}
    splits = load_dataset("parquet", data_files=files)
    (arguments.out / "data").mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        raw = examples.cast_column("image", datasets.Image(decode=False))
        made = Dataset.from_list(
            list(views(raw, arguments.views if split == "train" else 0)), features=examples.features
        )
        shards = -(-len(made) // SHARD_SIZE)
        for index in range(shards):
            name = f"{split}-{index:05d}-of-{shards:05d}.parquet"
            made.shard(shards, index, contiguous=True).to_parquet(
                str(arguments.out / "data" / name)
            )
        print(f"{split}: {len(examples)} images, {len(made)} views")


if __name__ == "__main__":
    main()

"""More views of every training picture: cuts of it, with the same caption, beside it.

    python recipes/data/views.py --data OUT --out VIEWS [--views 2]

A language model sees each picture many times over, and learns its codes by heart; a cut moves every patch, so that its
codes are others. Validation and test pictures stay as they are. Which cut is taken depends on the picture's key alone.

    one picture, two views      key       picture
                                k         whole
                                k@1       a part of its own proportions, KEPT_LEAST to all of its area, anywhere in it
                                k@2       another
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
from build import ROWS_PER_SHARD
from datasets import Dataset, load_dataset
from PIL import Image

KEPT_LEAST = 0.6
"""Share of the area that a cut keeps at least."""


def cut(image: Image.Image, seed: str) -> Image.Image:
    """A part with the picture's own proportions, its place and size drawn from `seed`."""
    draw = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big"))
    side = draw.uniform(KEPT_LEAST, 1.0) ** 0.5
    width, height = (max(1, round(side * length)) for length in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def encoded(image: Image.Image, like: str) -> bytes:
    """In the file format of the picture it was cut from."""
    buffer = io.BytesIO()
    image.save(buffer, like, **({"quality": 92} if like == "JPEG" else {}))
    return buffer.getvalue()


def views(rows: Any, count: int) -> Iterator[dict[str, Any]]:
    """Every row, followed by its cuts."""
    for row in rows:
        yield row
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            for number in range(1, count + 1):
                key = f"{row['key']}@{number}"
                opened = {"bytes": encoded(cut(image, key), image.format or "PNG"), "path": None}
                yield {**row, "image": opened, "key": key}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that build.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the larger data set")
    parser.add_argument("--views", type=int, default=2, help="cuts of each training picture")
    arguments = parser.parse_args()
    splits = load_dataset("parquet", data_files={
        split: str(arguments.data / "data" / f"{split}-*.parquet") for split in ("train", "validation", "test")
    })  # fmt: skip
    (arguments.out / "data").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        raw = rows.cast_column("image", datasets.Image(decode=False))
        made = Dataset.from_list(
            list(views(raw, arguments.views if split == "train" else 0)), features=rows.features
        )
        shards = -(-len(made) // ROWS_PER_SHARD)
        for index in range(shards):
            name = f"{split}-{index:05d}-of-{shards:05d}.parquet"
            made.shard(shards, index, contiguous=True).to_parquet(
                str(arguments.out / "data" / name)
            )
        print(f"{split}: {len(rows)} pictures, {len(made)} views")


if __name__ == "__main__":
    main()

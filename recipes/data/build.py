"""Build the data set of captioned images from the packages that ``fetch.py`` unpacked.

    python recipes/data/build.py --raw RAW --out OUT

OUT then holds parquet files for ``datasets.load_dataset(OUT)``, ``manifest.json`` and
``rejects.jsonl``.  The split of an image depends only on the bytes of its source file, and all
random numbers are seeded by those bytes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import random
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from sources import Task, fashion_images, file_tasks

Image.MAX_IMAGE_PIXELS = None  # the wallpapers are large, and their source is trusted
SIDE = 160  # the longer side is at most this
FLAT = {"crop": 6.0, "file": 1.0}  # an image of smaller standard deviation is dropped
SHARD_SIZE = 5000
SPLITS = ("train", "validation", "test")
Record = dict[str, Any]


def split_of(source_hash: bytes) -> str:
    """The split of all images from a source file with this sha256 digest."""
    bucket = int.from_bytes(source_hash[:8], "big") % 100
    return "test" if bucket < 10 else "validation" if bucket < 15 else "train"


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn upright, put transparency on white, and convert to RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per pixel
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def shrink(image: Image.Image, box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """Crop to `box` (default: everything) and scale down to a longer side of at most SIDE."""
    left, top, right, bottom = box or (0, 0, *image.size)
    scale = min(1.0, SIDE / max(right - left, bottom - top))
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, (left, top, right, bottom), 3.0)


def crop_boxes(size: tuple[int, int], count: int, seed: bytes) -> list[tuple[int, int, int, int]]:
    """Nearly square boxes, of 1/3 to 1 of the shorter side, drawn from `seed`."""
    draw = random.Random(int.from_bytes(seed, "big"))
    shorter, boxes = min(size), []
    for _ in range(count):
        side, ratio = draw.uniform(1 / 3, 1.0) * shorter, draw.uniform(0.8, 1.0)
        width, height = (side, side * ratio) if draw.random() < 0.5 else (side * ratio, side)
        left, top = draw.uniform(0, size[0] - width), draw.uniform(0, size[1] - height)
        boxes.append((int(left), int(top), int(left + width), int(top + height)))
    return boxes


def flatness(image: Image.Image) -> float:
    """The standard deviation of the pixels, averaged over channels."""
    return float(np.asarray(image, dtype=np.float32).std(axis=(0, 1)).mean())


def make_record(image: Image.Image, task: Task, key: str, digest: bytes, lossy: bool) -> Record:
    """The record of one image; `content` identifies its pixels."""
    buffer = io.BytesIO()
    if lossy:
        image.save(buffer, "JPEG", quality=92)
    else:
        image.save(buffer, "PNG")
    content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    encoded = {"bytes": buffer.getvalue(), "path": None}
    split_digest = hashlib.sha256(task.group.encode()).digest() if task.group else digest
    return {
        "image": encoded,
        "caption": task.caption,
        "source": task.source,
        "key": key,
        "license": task.license,
        "split": split_of(split_digest),
        "content": content,
    }


def process(task: Task) -> tuple[list[Record], list[dict[str, str]]]:
    """Read one file; return its records, and its rejects with their reasons."""
    records: list[Record] = []
    rejects: list[dict[str, str]] = []
    try:
        data = task.path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            image = to_rgb(opened)
    except Exception as error:
        return [], [{"key": task.key, "reason": f"unreadable: {type(error).__name__}: {error}"}]
    digest = hashlib.sha256(data).digest()
    boxes: list[Any] = crop_boxes(image.size, task.crops, digest) if task.crops else [None]
    for box in boxes:
        key = task.key if box is None else f"{task.key}#{','.join(map(str, box))}"
        small = shrink(image, box)
        if min(small.size) < 12:
            rejects.append({"key": key, "reason": "too thin"})
        elif flatness(small) < FLAT["crop" if task.crops else "file"]:
            rejects.append({"key": key, "reason": "nearly flat"})
        else:
            records.append(make_record(small, task, key, digest, lossy=bool(task.crops)))
    return records, rejects


def write_split(records: list[Record], split: str, out: Path) -> None:
    """Write one split as parquet shards whose schema has the image column."""
    from datasets import Dataset, Features, Value, disable_progress_bars
    from datasets import Image as ImageFeature

    disable_progress_bars()
    columns = ("caption", "source", "key", "license")
    features = Features({"image": ImageFeature(), **{c: Value("string") for c in columns}})
    shards = -(-len(records) // SHARD_SIZE)
    for index in range(shards):
        shard = records[index::shards]
        table = {name: [record[name] for record in shard] for name in features}
        name = f"{split}-{index:05d}-of-{shards:05d}.parquet"
        Dataset.from_dict(table, features=features).to_parquet(str(out / "data" / name))


def build(raw: Path, out: Path, workers: int = 2) -> dict[str, Any]:
    """Build the data set from the packages in `raw`; return the manifest."""
    rejects: list[dict[str, str]] = []
    found: list[Record] = []
    for task, digest, pixels in fashion_images(raw):
        image = Image.fromarray(pixels).convert("RGB")
        found.append(make_record(image, task, task.key, digest, lossy=False))
    tasks = file_tasks(raw)
    with ProcessPoolExecutor(workers) if workers else contextlib.nullcontext() as pool:
        results = pool.map(process, tasks, chunksize=4) if pool else map(process, tasks)
        for records, refused in results:
            found += records
            rejects += refused
    kept: dict[str, Record] = {}
    for record in sorted(found, key=lambda record: record["key"]):
        first = kept.setdefault(record["content"], record)
        if first is not record:
            rejects.append({"key": record["key"], "reason": f"duplicate of {first['key']}"})
    for stale in (out / "data").glob("*.parquet"):
        stale.unlink()
    (out / "data").mkdir(parents=True, exist_ok=True)
    # Sorted by hash: a shuffled order that is always the same
    unique = [kept[content] for content in sorted(kept)]
    for split in SPLITS:
        write_split([record for record in unique if record["split"] == split], split, out)
    with open(out / "rejects.jsonl", "w", encoding="utf-8") as file:
        rejects.sort(key=lambda item: item["key"])
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in rejects)
    counts: dict[str, dict[str, int]] = {}
    for record in sorted(unique, key=lambda record: record["source"]):
        counts.setdefault(record["source"], dict.fromkeys(SPLITS, 0))[record["split"]] += 1
    lines = sorted(f"{record['key']}\t{record['content']}\n" for record in unique)
    reasons = collections.Counter(re.split(r" of |:", item["reason"])[0] for item in rejects)
    versions = raw / "versions.json"
    manifest = {
        "counts": counts,
        "total": {split: sum(part[split] for part in counts.values()) for split in SPLITS},
        "rejected": dict(sorted(reasons.items())),
        "packages": json.loads(versions.read_text()) if versions.is_file() else {},
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the data set of captioned images.")
    parser.add_argument("--raw", type=Path, required=True, help="folder that fetch.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data set")
    parser.add_argument("--workers", type=int, default=2, help="worker processes; 0 for none")
    args = parser.parse_args(argv)
    print(json.dumps(build(args.raw, args.out, args.workers), indent=2))


if __name__ == "__main__":
    main()

"""The images of each package: one task for every image file that is used."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from captions import (
    FASHION_LABELS,
    emoji_caption,
    file_caption,
    openclipart_caption,
    tuxpaint_caption,
)

CROPS = {"photograph": 100, "digital painting": 45}  # per wallpaper
FASHION_COUNT = 4000
STARS_PER_KEPT = 7  # one in 7 of the 1,378 nearly identical star polygons is kept
CLIPART = "openclipart-png/usr/share/openclipart/png"
STAMPS = "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
FASHION = "dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
EMOJI = "emoji-datasource-google/package"
FLUENT = "lobehub-fluent-emoji-3d/package/assets"
LANDSCAPES = "endless-sky-data/usr/share/games/endless-sky/images/land"
LANDSCAPE_CROPS = 12
PHOTOGRAPHERS = ("bwerner", "myrabella", "dmottl", "mfield")
"""Names of files that are their photographer's."""
SHARE_ALIKE = (*PHOTOGRAPHERS, "-sfiera", "-striker", "-harro", "-iridium", "-spfld", "lava5")
"""Parts of the file names of landscapes under a share-alike license; others are public domain."""
GCOMPRIS = "gcompris-qt-data/usr/share/gcompris-qt/rcc"
GCOMPRIS_CROPS = {
    "erase": 40,
    "explore_monuments": 20,
    "explore_world_animals": 20,
    "explore_farm_animals": 20,
    "explore_world_music": 20,
    "details": 10,
    "categorization": 5,
    "paintings": 3,
    "lang": 0,
    "clickgame": 0,
}
"""Activities of GCompris whose images are used: crops of each image (0: the whole image)."""


class Task(NamedTuple):
    """An image file to read: that many crops of it, or the whole image if `crops` is 0."""

    path: Path
    key: str
    source: str
    caption: str
    license: str
    crops: int = 0
    group: str = ""
    """Files of one group fall into one split: pieces of one painting."""


def clipart_tasks(raw: Path) -> Iterator[Task]:
    """Clip arts; the links between folders are not followed."""
    for path in sorted((raw / CLIPART).rglob("*.png")):
        inner = path.relative_to(raw / CLIPART)
        if path.is_symlink() or not path.is_file():
            continue
        name_hash = hashlib.sha256(inner.as_posix().encode()).digest()
        if inner.parts[:2] == ("shapes", "stars") and name_hash[0] % STARS_PER_KEPT:
            continue
        key = path.relative_to(raw).as_posix()
        yield Task(path, key, "openclipart", openclipart_caption(inner.as_posix()), "public-domain")


def stamp_tasks(raw: Path) -> Iterator[Task]:
    """Stamps that have a caption file."""
    for path in sorted((raw / STAMPS).rglob("*.png")):
        text = path.with_suffix(".txt")
        if path.is_file() and not path.is_symlink() and text.is_file():
            caption = tuxpaint_caption(text.read_text(encoding="utf-8", errors="replace"))
            yield Task(path, path.relative_to(raw).as_posix(), "tuxpaint", caption, "GPL-2+")


def emoji_entries(raw: Path) -> list[dict[str, Any]]:
    """The emoji of the package with their code points, names and subgroups; [] without it."""
    path = raw / EMOJI / "emoji.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def emoji_tasks(raw: Path) -> Iterator[Task]:
    """Emoji in their base form, without the variations of skin tone."""
    for entry in emoji_entries(raw):
        path = raw / EMOJI / "img/google/64" / entry["image"]
        if entry["has_img_google"]:
            caption = emoji_caption(entry["name"] or entry["short_name"])
            yield Task(path, path.relative_to(raw).as_posix(), "emoji", caption, "Apache-2.0")


def wallpaper_tasks(raw: Path) -> Iterator[Task]:
    """The wallpapers of wallpapers.csv; of a folder with several sizes, the largest."""
    with open(Path(__file__).with_name("wallpapers.csv"), newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            path = raw / row["package"] / row["path"]
            if path.is_dir():
                sizes = [p for p in (path / "contents/images").iterdir() if "x" in p.stem]
                path = max(sizes, key=lambda p: (math.prod(map(int, p.stem.split("x"))), p))
            if (raw / row["package"]).is_dir():
                caption = f"{row['kind']}: {row['title']}"
                key = path.relative_to(raw).as_posix()
                yield Task(path, key, "wallpapers", caption, row["license"], CROPS[row["kind"]])


def landscape_tasks(raw: Path) -> Iterator[Task]:
    """The landscapes of Endless Sky: photographs, and photographs made into other worlds."""
    for path in sorted((raw / LANDSCAPES).glob("*.jpg")):
        license = (
            "CC-BY-SA-4.0" if any(part in path.stem for part in SHARE_ALIKE) else "public-domain"
        )
        name = path.stem.split("-")[0]
        shown = "landscape" if name.startswith(PHOTOGRAPHERS) else file_caption(name)
        caption = f"photograph: {shown}"
        yield Task(
            path, path.relative_to(raw).as_posix(), "landscapes", caption, license, LANDSCAPE_CROPS
        )


def gcompris_tasks(raw: Path) -> Iterator[Task]:
    """Photographs, paintings and drawings; of an image in pieces the whole, if it exists."""
    for activity, crops in GCOMPRIS_CROPS.items():
        for path in sorted((raw / GCOMPRIS / activity).rglob("*.webp")):
            name = path.stem.removesuffix("_background")
            if activity == "details" and name == path.stem:
                continue
            group = ""
            if activity == "paintings":  # Arcimboldo_Librarian_b3 is a piece of one painting
                group = name = name.rsplit("_", 1)[0]
            caption = file_caption(name)
            yield Task(
                path,
                path.relative_to(raw).as_posix(),
                "gcompris",
                caption,
                "GPL-3+ or CC, per file",
                crops,
                group,
            )


def fluent_tasks(raw: Path) -> Iterator[Task]:
    """Shaded emoji in their base form, with the names of the other emoji package."""
    for entry in emoji_entries(raw):
        path = raw / FLUENT / f"{entry['unified'].lower()}.webp"
        if path.is_file():
            caption = emoji_caption(entry["name"] or entry["short_name"])
            yield Task(path, path.relative_to(raw).as_posix(), "fluent", caption, "MIT")


def fashion_images(
    raw: Path, count: int = FASHION_COUNT
) -> Iterator[tuple[Task, bytes, np.ndarray]]:
    """The `count` images of Fashion-MNIST with the smallest content hashes."""
    found: list[tuple[bytes, str, int, np.ndarray]] = []
    for part in ("train", "t10k"):
        path = raw / FASHION / f"{part}-images-idx3-ubyte.gz"
        if not path.is_file():
            continue
        pixels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16)
        labels = gzip.decompress((raw / FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
        for index, image in enumerate(pixels.reshape(-1, 28, 28)):
            digest = hashlib.sha256(image.tobytes()).digest()
            key = f"{path.relative_to(raw).as_posix()}#{index}"
            found.append((digest, key, labels[index], image))
    found.sort(key=lambda item: item[:2])
    for digest, key, label, image in found[:count]:
        caption = f"a photo of {FASHION_LABELS[label]}"
        yield Task(raw, key, "fashion-mnist", caption, "MIT"), digest, image


def file_tasks(raw: Path) -> list[Task]:
    """The tasks of all packages in `raw`."""
    sources = (
        clipart_tasks,
        stamp_tasks,
        emoji_tasks,
        wallpaper_tasks,
        landscape_tasks,
        gcompris_tasks,
        fluent_tasks,
    )
    return [task for source in sources for task in source(raw)]

"""Captions as their makers publish them, and data sets of our own, as lists of pictures with their captions.

    captions_val2014.json   {"images": [{id, file_name}], "annotations": [{image_id, caption}]}         COCO, NoCaps
    dataset_coco.json       {"images": [{filepath, filename, split, cocoid, sentences: [{raw}]}]}       Karpathy
    what lavit_tok reads    rows of image and caption

Pictures are opened when they are needed. A file that is not there ends the run before it begins: without it the figure
would be of another set. One that cannot be read is counted and named. question_sets.py reads questions likewise.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

from lavit_tok.data.image_sources import load_splits, read_row, row_key, undecoded
from lavit_tok.encode.image_processor import ImageError, open_image

OpenedImages = tuple[Image.Image | None, dict[str, str] | None]
"""The picture, or else its key and what is wrong with it."""
KARPATHY_TEST = 5000


@dataclass(frozen=True)
class CaptionSet:
    """Pictures with their true captions."""

    ids: list[Any]
    """As the results file names the pictures."""
    pictures: list[Any]
    """Files, or (rows, image column, place)."""
    captions: list[list[str]]
    """All captions of each picture; none in sets whose captions are kept secret."""
    name: str
    standard: str | None
    """What the field calls this very set, if it is one that figures are published for."""
    total: int
    """Pictures of the set, of which these were taken."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, places: Sequence[int]) -> CaptionSet:
        picked: dict[str, list[Any]] = {
            name: [getattr(self, name)[i] for i in places]
            for name in ("ids", "pictures", "captions")
        }
        return replace(
            self, standard=self.standard if len(places) == self.total else None, **picked
        )

    def open(self, i: int) -> OpenedImages:
        return open_picture(self.images[i], self.ids[i])

    def describe(self) -> str:
        return f"{len(self)} of the {self.total} pictures of {self.name}"


# Arguments


def add_captions(found: Any) -> None:
    """The arguments that `captions_of` reads."""
    found.add_argument(
        "--annotations", type=Path, help="COCO's caption annotations, or Karpathy's split file"
    )
    found.add_argument(
        "--images", type=Path, help="folder of the pictures that --annotations names"
    )
    found.add_argument(
        "--data",
        help="in their place: image folder, parquet or arrow path, or Hub name, with captions",
    )
    found.add_argument(
        "--split",
        help="of Karpathy's file (test) or of --data (test, else validation, else the first)",
    )


def captions_of(a: Namespace) -> CaptionSet:
    """The set that the arguments name. Raises ValueError for neither, both, or one of another format."""
    if (a.data is None) == (a.annotations is None):
        raise ValueError("expected either --annotations with --images, or --data")
    if a.data is not None:
        return caption_rows(a.data, a.split)
    if a.images is None:
        raise ValueError(
            f"--annotations {a.annotations.name}: expected --images, the folder of its pictures"
        )
    return read_captions(a.annotations, a.images, a.split)


# Captions


def read_captions(path: Path, images: Path, split: str | None = None) -> CaptionSet:
    """COCO's annotations, or Karpathy's splits of them (default: test). Raises ValueError for any other format."""
    expected = "COCO's captions {images: [{id, file_name}], annotations: [{image_id, caption}]} or Karpathy's split "
    expected += "file {images: [{filename, split, sentences}]}"
    with Format(path, expected):
        found = read_json(path)
        entries = found["images"]
        if entries and "sentences" in entries[0]:
            return _karpathy(path, images, found, split or "test")
        if split is not None:
            raise ValueError(f"{path.name}: it has no splits, got --split {split}")
        said: dict[Any, list[str]] = {entry["id"]: [] for entry in entries}
        for one in found.get("annotations", []):
            said[one["image_id"]].append(str(one["caption"]))
        return CaptionSet(
            ids=[entry["id"] for entry in entries],
            pictures=[images / entry["file_name"] for entry in entries],
            captions=[said[entry["id"]] for entry in entries],
            name=path.name,
            standard=None,
            total=len(entries),
        )


def _karpathy(path: Path, images: Path, found: Any, split: str) -> CaptionSet:
    names = sorted({entry["split"] for entry in found["images"]})
    if split not in names:
        raise ValueError(f"{path.name}: expected a split of {names}, got {split!r}")
    entries = [entry for entry in found["images"] if entry["split"] == split]
    files = [images / entry.get("filepath", "") / entry["filename"] for entry in entries]
    flat = [images / entry["filename"] for entry in entries]
    whole = found.get("dataset") == "coco" and split == "test" and len(entries) == KARPATHY_TEST
    return CaptionSet(
        ids=[entry.get("cocoid", entry.get("imgid")) for entry in entries],
        pictures=[
            a if a.exists() or not b.exists() else b for a, b in zip(files, flat, strict=True)
        ],
        captions=[[str(sentence["raw"]) for sentence in entry["sentences"]] for entry in entries],
        name=f"split {split!r} of {path.name}",
        standard="COCO, Karpathy's test split" if whole else None,
        total=len(entries),
    )


def caption_rows(data: str, split: str | None) -> CaptionSet:
    """Rows with a caption of a data set of our own. Raises ValueError for one without captions."""
    rows, column, name = rows_of(data, split)
    if "caption" not in rows.column_names:
        raise ValueError(f"{data}: expected a column caption, got {', '.join(rows.column_names)}")
    captions = [caption or "" for caption in rows["caption"]]
    places = [i for i, caption in enumerate(captions) if caption.strip()]
    return CaptionSet(
        ids=[id_of(row_key(rows[i], column, f"row {i}"), data) for i in places],
        pictures=[(rows, column, i) for i in places],
        captions=[[captions[i]] for i in places],
        name=f"split {name!r} of {Path(data).name}",
        standard=None,
        total=len(places),
    )


def training_captions(data: str) -> frozenset[str]:
    """All captions of a data set's train split, in one spelling; none if there is no such split."""
    rows = load_splits(data).get("train")
    known = rows is not None and "caption" in rows.column_names
    return (
        frozenset(spelling(caption) for caption in rows["caption"] if caption)
        if known
        else frozenset()
    )


def spelling(caption: str) -> str:
    return " ".join(caption.lower().split())


# Pictures and files


def open_picture(source: Any, key: Any) -> OpenedImages:
    """A file, or a place of a data set."""
    if not isinstance(source, Path):
        rows, column, place = source
        return read_row(rows[place], column, f"row {place}", str(key))
    try:
        return open_image(source, name=source.name), None
    except ImageError as error:
        return None, {"key": str(key), "reason": str(error)}


def require_files(found: Any) -> None:
    """Raise ValueError if a picture's file is not there, with its name."""
    files = [source for source in found.images if isinstance(source, Path)]
    missing = [source for source in files if not source.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]}: no such picture; {len(missing)} of the {len(files)} that {found.name} names are missing. "
            "Without them the figure would be of another set: is --images the right folder?"
        )


def limited(found: Any, limit: int | None) -> Any:
    """At most `limit`, evenly spaced, and all their files there."""
    taken = found if limit is None else found.take(common.evenly(limit, len(found)))
    if not len(taken):
        raise ValueError(f"{found.name}: nothing in it")
    require_files(taken)
    return taken


def examples(found: Any, count: int, seed: int) -> list[tuple[int, Image.Image]]:
    """Places and pictures of `count` examples by chance; pictures that cannot be opened are passed over.

    Raises:
        ValueError: fewer usable pictures than that.
    """
    chosen: list[tuple[int, Image.Image]] = []
    for place in np.random.default_rng(seed).permutation(len(found)).tolist():
        if len(chosen) == count:
            break
        picture, _ = found.open(place)
        if picture is not None:
            chosen.append((place, picture))
    if len(chosen) < count:
        raise ValueError(
            f"{found.name}: expected {count} examples, got {len(chosen)} usable pictures"
        )
    return chosen


def rows_of(data: str, split: str | None) -> tuple[Any, str, str]:
    splits = load_splits(data)
    name = split or next((s for s in ("test", "validation") if s in splits), next(iter(splits)))
    if name not in splits:
        raise ValueError(f"{data}: expected a split of {sorted(splits)}, got {name!r}")
    return *undecoded(splits[name], "image"), name


def id_of(key: str, data: str) -> str:
    """A picture's path as seen from its data set: results name no machine's folders."""
    path, folder = Path(key), Path(data).resolve()
    if not path.is_absolute():
        return key
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class Format:
    """Any error of a file's shape becomes one ValueError that says what was expected."""

    def __init__(self, path: Path, expected: str) -> None:
        self.path, self.expected = path, expected

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(
            error,
            (LookupError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError),
        ):
            said = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{self.path}: expected {self.expected}; got another format: {said}"
            ) from None

"""Images of any data set that `datasets` can open; without torch, whose import takes seconds.

    folder | parquet | webdataset | arrow | Hub name  ->  {split: data set}

Images are read undecoded (`datasets.Image(decode=False)`) and opened by `open_image`, so a corrupt
image costs one example, which is reported as a reject, and not the batch or the run.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from lavit_tok.checkpoints.files import printable
from lavit_tok.data.remote_files import fetch, is_url, local_folder, set_readers, sizes
from lavit_tok.encode.image_files import SUFFIXES, ImageError, encoded_image, open_image

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
KEY_COLUMNS = ("key", "__key__", "id", "file_name")
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
SPLITS = ("train", "validation", "test")
WORDS = "train(ing)?|validation|valid|val|dev|test(ing)?|eval(uation)?"  # for splits in `datasets`
SPLIT_WORDS = re.compile(f"(^|[-._ 0-9])({WORDS})([-._ 0-9]|$)|-of-[0-9]")
HOLDOUT_EVERY = 20
"""Without a validation split, one of so many training images is held out."""
HASHED_BYTES = 1 << 16
"""An image's content hash is of its size and its first bytes, so that large data are not read."""


def load_splits(data: str, streaming: bool = False) -> dict[str, Any]:
    """Open an image folder, parquet, webdataset tars, an arrow folder, or a Hub name.

    Captions of an image folder are in its metadata.csv or .jsonl, or in a text file beside each
    image (0001.jpg, 0001.txt), which becomes the column "caption". Of a folder at a URL (s3://...)
    images are paths, which are URLs; tars and parquet are copied to this machine unless streamed.

    Returns: {split name: Dataset or IterableDataset}.

    Raises:
        ValueError: the data set cannot be read; the message names it and the reason.
    """
    set_readers()
    data = local_folder(data)
    path = Path(data)
    try:
        if not path.exists() and not glob.has_magic(data) and not is_url(data):
            from lavit_tok.checkpoints.weights import require_on_hub

            require_on_hub(data, "dataset")
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(data)
            splits = loaded if isinstance(loaded, dict) else {"train": loaded}
            if streaming:
                splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
            return dict(splits)
        suffix = path.suffix
        if is_url(data) and suffix not in BUILDERS and not data.startswith("hf://"):
            return _remote_folder(data.rstrip("/"), streaming)
        if path.is_dir():
            suffix = ".tar" if any(path.glob("*.tar")) else ""
        if suffix in BUILDERS:
            files = str(path / "*.tar") if path.is_dir() else data
            return dict(
                datasets.load_dataset(BUILDERS[suffix], data_files=files, streaming=streaming)
            )
        if path.is_dir() and not streaming and any(map(_text_file, islice(_images(path), 100))):
            # `datasets` would infer a folder of texts
            found = _image_files(path, SUFFIXES | {".txt"})
            loaded = datasets.load_dataset("imagefolder", data_dir=data, data_files=found)
            return {name: _with_captions(split) for name, split in loaded.items()}
        found = _image_files(path, SUFFIXES)
        return dict(datasets.load_dataset(data, data_files=found, streaming=streaming))
    except Exception as error:  # the builders raise many kinds
        names = map(str, path.rglob("*"))
        if foreign := [name for name in names if printable(name) != name]:
            raise ValueError(
                f"{foreign[0]}: expected a name in UTF-8, as `datasets` stores it: rename the file"
            ) from error
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(
            f"{data}: expected an image folder, parquet, webdataset tars, an arrow folder or a Hub "
            f"name: {reason}"
        ) from error


def _image_files(folder: Path, suffixes: set[str]) -> DataFilesDict | None:
    """The files and splits that `datasets` would find in a folder of images by 60 walks through it.

    None if names do not tell; see `_split_patterns`.
    """
    names = []
    for root, folders, files in os.walk(folder):
        if any(os.path.islink(os.path.join(root, name)) for name in folders):
            return None
        head = Path(root).relative_to(folder).parts
        names += ["/".join((*head, name)) for name in files]
    patterns = _split_patterns(names, suffixes)
    return patterns and DataFilesDict.from_patterns(patterns, str(folder.resolve()))


def _split_patterns(names: Iterable[str], suffixes: set[str]) -> dict[str, list[str]] | None:
    """Patterns of the files of each split, from the names of all files relative to their folder.

    None if they do not tell: a file that is neither an image nor metadata, or a word for a split
    anywhere else than in "train", "validation" or "test" as a folder of the first level.
    """
    splits = set()
    for name in names:
        head, *parts = name.split("/")
        split = head if head in SPLITS and parts else ""
        splits.add(split)
        suffix = os.path.splitext(name)[1].lower()
        if (suffix not in suffixes and name.rpartition("/")[2] not in METADATA) or any(
            map(SPLIT_WORDS.search, parts if split else (head, *parts))
        ):
            return None
    patterns = {name: [f"{name}/**"] for name in SPLITS if name in splits} or {"train": ["**"]}
    return patterns if splits else None


def _remote_folder(url: str, streaming: bool) -> dict[str, Any]:
    """The splits of a folder at a URL.

    Raises:
        ValueError: it has no files, or no images.
    """
    fs, root = fsspec.url_to_fs(url)
    names = [name.removeprefix(root).lstrip("/") for name in fs.find(root)]
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    if ".tar" in suffixes:
        tars = {"train": [f"{url}/*.tar"]}
        return dict(datasets.load_dataset("webdataset", data_files=tars, streaming=streaming))
    if not suffixes & SUFFIXES:
        if not names:
            raise ValueError("no files at this address")
        if ".parquet" not in suffixes:
            raise ValueError("no images, tars or parquet files at this address")
        found = DataFilesDict.from_patterns(get_data_patterns(url), url)
        return dict(datasets.load_dataset("parquet", data_files=found, streaming=streaming))
    patterns = _split_patterns(names, SUFFIXES | {".txt"}) or get_data_patterns(url)
    found = DataFilesDict.from_patterns(patterns, url)
    loaded = datasets.load_dataset("imagefolder", data_files=found, streaming=True)
    splits = {name: _in_memory(split) for name, split in loaded.items()}
    if ".txt" in suffixes:
        splits = {name: _with_captions(split) for name, split in splits.items()}
    if streaming:
        return {name: split.to_iterable_dataset() for name, split in splits.items()}
    return splits


def _in_memory(stream: Any) -> Any:
    """The rows of a stream whose images are paths, as a map-style split."""
    stream, _ = undecoded(stream, "image")
    tables = [*stream.with_format("arrow").iter(1000)]
    table = pa.concat_tables(tables).cast(stream.features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=stream.info)


def _images(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _text_file(path: Path) -> Path | None:
    """The text file beside an image, if it exists."""
    text = path.with_suffix(".txt")
    return text if text.is_file() else None


def _with_captions(split: Any) -> Any:
    """The split with the texts beside its images as captions, "" where there is none."""
    if "caption" in split.features:  # from metadata.csv
        return split
    images = split.cast_column("image", datasets.Image(decode=False))["image"]
    paths = [image["path"] for image in images]
    if is_url(next(iter(paths), None)):
        contents = fetch([f"{os.path.splitext(path)[0]}.txt" for path in paths])
    else:
        files = [_text_file(Path(path)) for path in paths]
        contents = [file.read_bytes() if file else None for file in files]
    texts = [(content or b"").decode("utf-8", "replace").strip() for content in contents]
    return split.add_column("caption", texts)


def hold_out(splits: dict[str, Any], image_column: str = "image") -> dict[str, Any]:
    """The splits; without "validation", one of HOLDOUT_EVERY images of "train" becomes that.

    Which ones depends on the content of each image only, so that copies of one image are not in
    both splits, and every command that reads the data set makes the same splits. Unchanged if all
    images are equal.
    """
    if "validation" in splits or "train" not in splits:
        return splits
    train, hashes = splits["train"], _content_hashes(splits["train"], image_column)
    held = [i for i, value in enumerate(hashes) if value % HOLDOUT_EVERY == 0]
    if not held or len(held) == len(hashes):
        held = [i for i, value in enumerate(hashes) if value == min(hashes)]
    if len(held) == len(hashes):
        return splits
    kept = sorted({*range(len(hashes))} - {*held})
    return {**splits, "train": train.select(kept), "validation": train.select(held)}


def _content_hashes(split: Any, image_column: str) -> list[int]:
    """A number of 64 bits for each image, a function of its encoded bytes."""
    images, column = undecoded(split, image_column)
    numbers = []
    for table in images.select_columns(column).with_format("arrow").iter(1000):
        content, paths = (pc.struct_field(table[column], name) for name in ("bytes", "path"))
        lengths = pc.binary_length(content).to_pylist()
        heads = pc.binary_slice(content, 0, HASHED_BYTES).to_pylist()
        remote = {
            i: path for i, path in enumerate(paths.to_pylist()) if heads[i] is None and is_url(path)
        }
        urls = [*remote.values()]
        for i, size, head in zip(remote, sizes(urls), fetch(urls, HASHED_BYTES), strict=True):
            lengths[i], heads[i] = size, head
        for size, head, path in zip(lengths, heads, paths.to_pylist(), strict=True):
            if head is None and path and os.path.isfile(path):
                size = os.path.getsize(path)
                with open(path, "rb") as file:
                    head = file.read(HASHED_BYTES)
            sha = hashlib.sha256(f"{size}:".encode() + (head or b""))
            numbers.append(int.from_bytes(sha.digest()[:8], "big"))
    return numbers


def undecoded(split: Any, image_column: str) -> tuple[Any, str]:
    """Cast the image column to encoded bytes; returns the split and the column's name.

    If `image_column` does not exist, the one column of images is used.
    """
    if split.features is None:
        split = split._resolve_features()
    names = list(split.features)
    if image_column not in names:
        typed = [name for name in names if isinstance(split.features[name], datasets.Image)]
        candidates = typed or [name for name in IMAGE_COLUMNS if name in names]
        if not candidates:
            raise ValueError(
                f"expected an image column {image_column!r}, got columns {', '.join(names)}"
            )
        image_column = candidates[0]
    return split.cast_column(image_column, datasets.Image(decode=False)), image_column


def example_key(
    example: dict[str, Any], column: str, fallback: str, key_columns: Iterable[str] = KEY_COLUMNS
) -> str:
    """The key of an example: the first key column with a value, the image's path, or `fallback`."""
    path = (example[column] or {}).get("path")
    keys = (str(example[name]) for name in key_columns if example.get(name) is not None)
    return next(keys, path or fallback)


def read_image(
    example: dict[str, Any],
    column: str,
    fallback: str,
    key: str | None = None,
    opener: Callable[..., Image.Image] = open_image,
) -> tuple[Image.Image | None, dict[str, str] | None]:
    """Open an example's image: (image, None), or (None, {"key": ..., "reason": ...})."""
    key = key or example_key(example, column, fallback)
    try:
        source: Any = encoded_image(example[column], key)
        if isinstance(source, str) and is_url(source):
            (content,) = fetch([source])
            source = encoded_image(content, key)
        return opener(source, name=key), None
    except ImageError as error:
        return None, {"key": key, "reason": str(error)}

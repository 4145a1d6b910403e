"""What jobs over many pictures share: where pictures come from, what was skipped, files that appear when complete."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from lavit_tok.encode.image_processor import ImageError, VisualImageProcessor, find_images

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "camera.png",
    "coins.png",
)
"""Files of scikit-image's package that are photographs: six in colour, two grey."""
Item = TypeVar("Item")


class Rejects:
    """What a job skips: written as JSON lines of key and reason when it ends, or shown on stderr without a file.

    Args:
        path: the file; an older run's is removed if nothing was skipped.
        only: the job is a single item, whose error ends it instead.
    """

    def __init__(self, path: Path | None, only: bool = False) -> None:
        self.path, self.only = path, only
        self.rows: list[tuple[str, str]] = []

    def add(self, key: str, error: ValueError) -> None:
        if self.only:
            raise error
        reason = str(error).removeprefix(f"{key}: ")
        self.rows.append((key, reason))
        if self.path is None:
            tqdm.write(f"skipped {key}: {reason}", file=sys.stderr)

    def require(self, done: int) -> None:
        """Raise ValueError if nothing was done."""
        if done:
            return
        if not self.rows:
            raise ValueError("nothing to do: the job has no rows")
        key, reason = self.rows[0]
        raise ValueError(f"none of {len(self.rows)} could be used; the first is {key}: {reason}")

    def summary(self) -> str:
        """Nothing, or "; 2 skipped, listed in FILE"."""
        if not self.rows:
            return ""
        return f"; {len(self.rows)} skipped" + (f", listed in {self.path}" if self.path else "")

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *error: object) -> None:
        if self.path is None:
            return
        if not self.rows:
            self.path.unlink(missing_ok=True)
            return
        with atomic(self.path) as part:
            lines = [
                json.dumps({"key": key, "reason": reason}, ensure_ascii=False)
                for key, reason in self.rows
            ]
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder that this process alone writes to; the system frees it whenever, and however, the process ends.

    Removes what a killed run left half-written. Raises ValueError if another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl

            # A record lock is the process's own: the processes that it starts do not inherit it, nor can outlive it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: two jobs in one folder are not noticed
            pass
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"{folder}: another job is writing there: wait for its end, or choose another"
            ) from None
        for part in folder.glob(".*.part"):
            part.unlink()
        yield


def list_images(names: Sequence[str]) -> list[Path]:
    """Files as given, folders walked; - reads more names from stdin, one a line. Raises ImageError for none."""
    lines = [line.rstrip("\n") for line in sys.stdin] if "-" in names else []
    paths = find_images(
        [*(name for name in names if name != "-"), *(line for line in lines if line)]
    )
    if not paths:
        raise ImageError(f"{', '.join(names)}: no pictures found")
    return paths


def photographs() -> list[Path]:
    """The photographs that scikit-image ships inside its package. Raises ImageError where it is not installed."""
    spec = find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    found = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()] if folder else []
    if not found:
        raise ImageError(
            "no pictures given, and no scikit-image whose photographs to take: pip install scikit-image"
        )
    return found


def opened(
    paths: Iterable[tuple[int, Path]], rejects: Rejects, image_processor: VisualImageProcessor
) -> list[tuple[int, Path, Image.Image]]:
    """Those of the numbered pictures that can be opened."""
    found = []
    for number, path in paths:
        try:
            found.append((number, path, image_processor.open(path)))
        except ImageError as error:
            rejects.add(str(path), error)
    return found


def device(name: str) -> torch.device:
    """The device, if it can be used. Raises ValueError."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None


def save_png(image: Image.Image, path: Path) -> None:
    with atomic(path) as part:
        image.save(part, "PNG")


def png_name(number: int, key: str) -> str:
    """Row 7 of "a/cat 1.jpg" -> "000007-cat_1.png"."""
    return f"{number:06d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(key).stem)[:80]}.png"


def progress(items: Iterable[Item], title: str) -> Iterable[Item]:
    """A bar on stderr where that is a terminal."""
    return tqdm(items, title, file=sys.stderr, disable=None)


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one perhaps shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk

"""Files that appear only when complete, and folders that one process writes at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` on success, and removed on an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Create a folder and lock it for this process; the system unlocks it however the process ends.

    Partial files of a killed process are removed.

    Raises:
        ValueError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl

            # lockf, not flock: child processes do not inherit a record lock, so a loader process
            # that outlives a killed job does not keep the folder locked.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: two jobs in one folder are not detected
            pass
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"{folder}: another job is writing to it: wait until it ends, or choose another "
                "folder"
            ) from None
        for partial in folder.glob(".*.part"):
            partial.unlink()
        yield


def printable(text: str) -> str:
    """The text with bytes of file names that are not UTF-8 (surrogates) as `\\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_line(values: Any) -> str:
    """One line of JSON in UTF-8; surrogates of file names are escaped and can be read back."""
    # A surrogate's backslash escape is also its JSON escape.
    return printable(json.dumps(values, ensure_ascii=False)) + "\n"

"""Files that appear only when complete, and folders that one process writes at a time.

Folders are paths, or, for `lavit-tok shards`, URLs of object stores (`folder_or_url`).
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError

WEIGHTS = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
PARTIAL = re.compile(r"\..*\.\d+\.part")
"""Names of partial files and folders."""
AnyPath: TypeAlias = Any
"""A Path, or the UPath of a URL, which has the same methods."""


@contextmanager
def atomic(path: AnyPath) -> Iterator[Path]:
    """A temporary path that is renamed to `path` on success, and removed on an exception.

    In an object store the content is put at once, so it needs no other name there.

    Raises:
        OSError: naming the file.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (local := Path(folder) / path.name)
            put(path, local.read_bytes())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with named_errors(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files replace those of `folder`, one by one, on success.

    Weights that a model had as one file are removed if it now has shards, and the reverse. Other
    files of `folder` stay. The temporary folder is inside `folder`, which may be a file system of
    its own. That of a killed process is removed by the next one that writes there.

    Raises:
        OSError: naming the folder.
    """
    with named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder)
        partial = folder / f".new.{os.getpid()}.part"
        try:
            partial.mkdir(exist_ok=True)
            yield partial
            paths = sorted(path for path in partial.rglob("*") if path.is_file())
            new = {folder / path.relative_to(partial) for path in paths}
            for old in {old for path in new for old in _same_weights(path)} - new:
                old.unlink()
            for path in paths:
                target = folder / path.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _same_weights(path: Path) -> list[Path]:
    """Existing files that hold the weights of the same name: one file, shards and their index."""
    name = WEIGHTS.fullmatch(path.name)
    found = (WEIGHTS.fullmatch(other.name) for other in path.parent.glob("*.safetensors*"))
    return [path.with_name(other[0]) for other in found if name and other and other[1] == name[1]]


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Errors of writing, e.g. of a full disk, as an OSError that names the path."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: not written: {error}") from error
    except OSError as error:
        if error.filename is not None or str(path) in str(error):
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def remove_partials(folder: Path, name: str = "*") -> None:
    """Remove the partial files of `name` (and of names that begin with it) of killed processes.

    Partial folders likewise (atomic_files).
    """
    pattern = name if name == "*" else glob.escape(name)
    for partial in folder.glob(f".{pattern}.*.part"):
        process = partial.name.split(".")[-2]
        if process.isdigit() and not _is_running(int(process)):
            _remove(partial)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def exclusive_folder(folder: AnyPath) -> Iterator[None]:
    """Create a folder and lock it for this process; the system unlocks it however the process ends.

    Partial files of a killed process are removed. Object stores have neither: all processes must
    write the same content there, or `put` it once.

    Raises:
        ValueError: another process holds the lock.
    """
    if is_remote(folder):
        folder.fs.invalidate_cache()
        yield
        return
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
            _remove(partial)
        yield


def folder_or_url(text: str) -> AnyPath:
    """The path of a folder, or that of a URL (s3://bucket/folder).

    Raises:
        ImportError: universal-pathlib, or the package of its file system, is not installed.
        ValueError: no file system for this URL.
    """
    if "://" not in text or text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    try:
        from upath import UPath

        path = UPath(text.rstrip("/"))
        path.fs  # noqa: B018  (imports the package of the file system)
    except ImportError as error:
        raise ImportError(
            f"{text}: writing there needs more packages: pip install 'lavit-tok[s3]', or "
            f"universal-pathlib and the fsspec package of another store ({error})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None
    return path


def is_remote(path: AnyPath) -> bool:
    """Whether a path is that of a URL."""
    return hasattr(path, "fs")


def put(path: AnyPath, content: bytes, once: bool = False) -> None:
    """Write an object at a URL as a whole.

    Raises:
        FileExistsError: with `once`, if it exists.
        OSError: it cannot be written.
    """
    try:
        path.fs.pipe_file(path.path, content, mode="create" if once else "overwrite")
    except Exception as error:  # file systems raise many kinds, also for a condition that fails
        if once and path.exists():
            raise FileExistsError(f"{path} exists") from error
        raise OSError(f"{path}: {error}") from error


def printable(text: str) -> str:
    r"""The text with bytes of file names that are not UTF-8 (surrogates) as `\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_line(values: Any) -> str:
    """One line of JSON in UTF-8; surrogates of file names are escaped and can be read back."""
    # A surrogate's backslash escape is also its JSON escape.
    return printable(json.dumps(values, ensure_ascii=False)) + "\n"


def escape(text: str) -> str:
    r"""Text that UTF-8 can hold: a surrogate, of a file name that is not UTF-8, becomes \udcff.

    Backslashes are doubled in front of it, and in front of text that looks like one, so that
    `unescape` gives back any text. All other text is unchanged.
    """

    def replace(match: re.Match[str]) -> str:
        slashes, code = match[1] * 2, match[2]
        return slashes + (f"\\u{ord(code):04x}" if len(code) == 1 else code)

    return re.sub(r"(\\*)([\ud800-\udfff]|ud[89a-f][0-9a-f]{2})", replace, text)


def unescape(text: str) -> str:
    """The text that `escape` got."""

    def replace(match: re.Match[str]) -> str:
        slashes, code = match[1], match[2]
        is_surrogate = len(slashes) % 2 == 1
        return slashes[: len(slashes) // 2] + (chr(int(code[1:], 16)) if is_surrogate else code)

    return re.sub(r"(\\+)(ud[89a-f][0-9a-f]{2})", replace, text)

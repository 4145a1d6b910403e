"""Files at URLs that fsspec opens (s3://, gs://, memory://, ...), many at the same time; tars."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import fsspec

from lavit_tok.data.shard_manifest import ShardError


class StrictTarInfo(tarfile.TarInfo):
    """A member of a tar; a damaged header is an error.

    tarfile takes it for the end of the archive, and the members after it would be lost unnoticed.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        """Read the next member. Raises ReadError."""
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged header at byte {tar.offset}: {error}") from None


def set_readers() -> None:
    """Set how `datasets` reads tars and s3:// in this process."""
    tarfile.TarFile.tarinfo = StrictTarInfo
    used: Any = "lavit_tok.data.s3.S3"
    if "s3" in fsspec.registry:  # already imported, so that a name would have no effect
        used = resolve_name("lavit_tok.data.s3:S3")
    fsspec.register_implementation("s3", used, clobber=True)


def is_url(path: str | None) -> bool:
    """Whether a path is one that fsspec opens."""
    return path is not None and "://" in path


def local_folder(path: str) -> str:
    """A folder at file:// as its path; other paths and URLs as they are."""
    local = path.removeprefix("file://")
    return local if os.path.isdir(local) else path


def root_folder(path: str) -> str:
    """What the paths of a folder's files start with: an absolute path, or a URL, and a slash."""
    path = local_folder(path)
    if not is_url(path):
        return f"{Path(path).absolute()}/"
    if not path.startswith("hf://"):  # would send a request to the Hub
        fs, name = fsspec.url_to_fs(path)
        path = fs.unstrip_protocol(name)
    return f"{path.rstrip('/')}/"


def fetch(urls: Sequence[str], stop: int | None = None) -> list[bytes | None]:
    """The bytes of files, or their first `stop` ones; None for a file that does not exist.

    Raises:
        ShardError: a file cannot be read for another reason, such as the network.
    """
    contents: dict[str, bytes | None] = {}
    for fs, group, paths in _by_file_system(urls):
        # Of fsspec's functions for many files only this one does not expand * ? [ ] in names.
        values = fs.cat_ranges(paths, None, stop, on_error="return")
        for url, value in zip(group, values, strict=True):
            if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                raise _error(url, value) from None
            contents[url] = value if isinstance(value, bytes) else None
    return [contents[url] for url in urls]


def sizes(urls: Sequence[str]) -> list[int | None]:
    """The sizes of files in bytes; None for a file that does not exist.

    Raises:
        ShardError: as `fetch`.
    """
    found: dict[str, int | None] = {}
    for fs, group, paths in _by_file_system(urls):
        try:
            found.update(zip(group, fs.sizes(paths), strict=True))
        except FileNotFoundError:
            found.update(
                (url, fs.size(path) if fs.exists(path) else None)
                for url, path in zip(group, paths, strict=True)
            )
        except Exception as error:  # file systems raise many kinds
            raise _error(group[0], error) from None
    return [found[url] for url in urls]


def _by_file_system(urls: Sequence[str]) -> Iterator[tuple[Any, list[str], list[str]]]:
    """(file system, URLs, paths in it) of each file system."""
    set_readers()
    groups: dict[int, tuple[Any, list[str], list[str]]] = {}
    for url in urls:
        fs, path = fsspec.url_to_fs(url)  # the same object for the same file system
        _, group, paths = groups.setdefault(id(fs), (fs, [], []))
        group.append(url)
        paths.append(path)
    yield from groups.values()


def _error(url: str, error: Exception) -> ShardError:
    return ShardError(f"{url}: cannot be read: {type(error).__name__}: {error}")

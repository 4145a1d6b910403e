"""Read the files in a Qt resource archive (.rcc), the form in which GCompris ships its images.

An archive has a header, a tree of nodes, their names, and the data; all numbers are big-endian.

    folder    name u32   flags u16 (bit 2)   children u32   first child u32   [time u64]
    file      name u32   flags u16           locale u32     data u32          [time u64]
    name      length u16   hash u32   UTF-16
    data      length u32   bytes, zlib-compressed after a u32 where flag bit 1 is set

Node 0 is the root; the time is there from version 2 on. Source: Qt's rcc.cpp.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

COMPRESSED, FOLDER, ZSTD = 1, 2, 4


def read_archive(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The path and the content of every file of an archive.

    Raises:
        ValueError: bytes that are no archive, or a compression other than zlib.
    """
    if data[:4] != b"qres":
        raise ValueError(
            f"expected a Qt resource archive, which starts with b'qres', got {data[:4]!r}"
        )
    version, tree, content, names = struct.unpack_from(">4I", data, 4)
    size = 14 if version < 2 else 22
    nodes = [(0, "")]
    while nodes:
        index, parent = nodes.pop()
        at, flags = struct.unpack_from(">IH", data, tree + index * size)
        count, start = struct.unpack_from(">II", data, tree + index * size + 6)
        (length,) = struct.unpack_from(">H", data, names + at)
        name = (
            data[names + at + 6 : names + at + 6 + 2 * length].decode("utf-16-be") if index else ""
        )
        path = f"{parent}/{name}" if parent else name
        if flags & FOLDER:
            nodes += [(start + child, path) for child in range(count)]
            continue
        (length,) = struct.unpack_from(">I", data, content + start)
        body = data[content + start + 4 : content + start + 4 + length]
        if flags & ZSTD:
            raise ValueError(f"{path}: compressed with zstd, only zlib can be read")
        yield path, zlib.decompress(body[4:]) if flags & COMPRESSED else body


def extract_images(archive: Path) -> None:
    """Write the raster images of an archive into a folder beside it that has its name without
    .rcc."""
    for path, body in read_archive(archive.read_bytes()):
        if path.endswith((".webp", ".jpg", ".png")):
            target = archive.with_suffix("") / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(body)

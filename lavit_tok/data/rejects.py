"""Rejects: the items that a batch job skips."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavit_tok.checkpoints.files import AnyPath, atomic, json_line, printable

SHOWN = 5  # rejects that are also named on stderr


class AllSkippedError(ValueError):
    """A job whose items were all skipped."""

    exit_code = 1


class Rejects:
    """Collects skipped items; names the first ones on stderr, and writes all of them to a file.

    Args:
        path: JSON lines of key and reason, written at the end; that of an earlier run is removed
            if no item was skipped. None names every item on stderr.
        only: the job is a single item, whose error ends the job.
        overwrite: replace or remove any file at `path`.

    Raises:
        ValueError: another program's file at `path`.

    Warnings of images that could be read despite damage are counted, and the first is in summary().
    """

    def __init__(self, path: Path | None, only: bool = False, overwrite: bool = False) -> None:
        if (
            path is not None
            and path.exists()
            and not overwrite
            and not has_keys(path, {"key", "reason"})
        ):
            raise ValueError(
                f"{path}: not a list of skipped items, which would replace it: move it, or choose "
                "another --out"
            )
        self.path, self.only = path, only
        self.items: list[tuple[str, str]] = []
        self.warnings: list[tuple[str, str]] = []

    def add(self, key: str, error: ValueError) -> None:
        """Skip an item."""
        if self.only:
            raise error
        reason = str(error).removeprefix(f"{key}: ")
        self.items.append((key, reason))
        if self.path is None or len(self.items) <= SHOWN:
            tqdm.write(printable(f"skipped {key}: {reason}"), file=sys.stderr)

    def warn(self, key: str, messages: Iterable[str]) -> None:
        """Count the warnings about an item that is used."""
        self.warnings += [(key, " ".join(messages))] if messages else []

    def require(self, done: int) -> None:
        """Raise AllSkippedError if all items were skipped, ValueError if there were none."""
        if done:
            return
        if not self.items:
            raise ValueError("the input has no items")
        key, reason = self.items[0]
        raise AllSkippedError(
            f"none of {len(self.items)} could be used; the first is {key}: {reason}"
        )

    def summary(self) -> str:
        """E.g. "; 2 skipped, listed in FILE; 1 read with warnings, the first: KEY: WARNING"."""
        text = f"; {len(self.items)} skipped" if self.items else ""
        text += f", listed in {self.path}" if self.items and self.path else ""
        if self.warnings:
            key, warning = self.warnings[0]
            text += f"; {len(self.warnings)} read with warnings, the first: {key}: {warning}"
        return printable(text)

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *error: object) -> None:
        if self.path is not None:
            records = [{"key": key, "reason": reason} for key, reason in self.items]
            write_rejects(self.path, records)


def has_keys(path: Path, keys: set[str]) -> bool:
    """Whether every line is a JSON object of exactly these keys."""
    try:
        with open(path, encoding="utf-8") as file:
            return all({*json.loads(line)} == keys for line in file)
    except (ValueError, TypeError, RecursionError):
        return False


def write_rejects(path: AnyPath, records: Iterable[dict[str, Any]]) -> bool:
    """Write records as JSON lines; without any, remove the file. Returns whether it changed."""
    text = "".join(json_line(record) for record in records)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text:
        path.unlink(missing_ok=True)
    elif text != before:
        with atomic(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return text != before

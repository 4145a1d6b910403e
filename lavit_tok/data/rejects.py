"""Rejects: the items that a batch job skips."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavit_tok.data.files import atomic

SHOWN = 5  # rejects that are also named on stderr


class Rejects:
    """Collects skipped items; names the first ones on stderr, and writes all of them to a file.

    Args:
        path: JSON lines of key and reason, written at the end; that of an earlier run is removed
            if no item was skipped. None names every item on stderr.
        only: the job is a single item, whose error ends the job.
    """

    def __init__(self, path: Path | None, only: bool = False) -> None:
        self.path, self.only = path, only
        self.items: list[tuple[str, str]] = []

    def add(self, key: str, error: ValueError) -> None:
        """Skip an item."""
        if self.only:
            raise error
        reason = str(error).removeprefix(f"{key}: ")
        self.items.append((key, reason))
        if self.path is None or len(self.items) <= SHOWN:
            tqdm.write(f"skipped {key}: {reason}", file=sys.stderr)

    def require(self, done: int) -> None:
        """Raise ValueError if no item was processed."""
        if done:
            return
        if not self.items:
            raise ValueError("the input has no items")
        key, reason = self.items[0]
        raise ValueError(f"none of {len(self.items)} could be used; the first is {key}: {reason}")

    def summary(self) -> str:
        """An empty string, or "; 2 skipped, listed in FILE"."""
        if not self.items:
            return ""
        return f"; {len(self.items)} skipped" + (f", listed in {self.path}" if self.path else "")

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *error: object) -> None:
        if self.path is not None:
            records = [{"key": key, "reason": reason} for key, reason in self.items]
            write_rejects(self.path, records)


def write_rejects(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records as JSON lines; without any, remove the file."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    if not lines:
        path.unlink(missing_ok=True)
        return
    with atomic(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")

"""Runs that can be killed at any moment and go on with the same result.

    out/NAME.work/settings.json   what the result depends on: model, data, sampling, batch size, versions
                  lines.jsonl     one line for each item that is done, written as it comes

A batch is made of the same items whether the run was stopped or not, since other neighbours change the last bits of a
sum; what of a batch is missing is made again with the whole batch. A run of other settings is refused, not mixed in.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

VERSIONS = ("torch", "transformers", "diffusers")


def work_folder(out: Path, name: str, settings: dict[str, Any], fresh: bool) -> Path:
    """out/NAME.work, new or of the same settings.

    Raises:
        ValueError: one of other settings, with what differs; or of no settings at all.
    """
    folder = out / f"{name}.work"
    settings = settings | {"versions": {p: importlib.metadata.version(p) for p in VERSIONS}}
    text = json.dumps(settings, indent=2, sort_keys=True)
    if fresh and folder.exists():
        if not (folder / "settings.json").exists():
            raise ValueError(f"{folder}: --fresh would remove it, but it holds no settings.json of an earlier run")
        shutil.rmtree(folder)
    file = folder / "settings.json"
    if file.exists():
        try:
            old = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: cannot be read: {error}; --fresh begins anew") from None
        now = json.loads(text)
        changed = [key for key in sorted({*old, *now}) if old.get(key) != now.get(key)]
        if changed:
            raise ValueError(
                f"{folder}: an earlier run had another {', '.join(changed)}: mixed, the result would be of neither. "
                "Give the same settings to go on, another --name, or --fresh to begin anew"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, text.encode())
    return folder


def write_whole(file: Path, content: bytes) -> None:
    """The file is there as a whole, or not at all."""
    draft = file.with_name(f".{file.name}.part")
    draft.write_bytes(content)
    os.replace(draft, file)


class Lines:
    """lines.jsonl of a work folder: dicts with an item's number "i"."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[int, dict[str, Any]] = {}
        whole = 0
        for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
            try:
                one = json.loads(line)
                self.found.setdefault(one["i"], one)
            except (ValueError, LookupError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
        if file.exists():
            os.truncate(file, whole)  # the last line of a killed run may be half a line

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        new = [line for line in lines if line["i"] not in self.found]
        with self.file.open("ab") as out:
            out.write("".join(json.dumps(line) + "\n" for line in new).encode())
            out.flush()
            os.fsync(out.fileno())
        self.found |= {line["i"]: line for line in new}


def in_batches(
    lines: Lines, count: int, batch_size: int, work: Callable[[list[int]], list[dict[str, Any]]], unit: str
) -> list[dict[str, Any]]:
    """Lines of all items 0..count-1; `work` makes those of a batch of which any is missing."""
    with tqdm(total=count, initial=len(lines.found), unit=f" {unit}") as bar:
        for start in range(0, count, batch_size):
            items = list(range(start, min(start + batch_size, count)))
            before = len(lines.found)
            if any(i not in lines.found for i in items):
                lines.add(work(items))
            bar.update(len(lines.found) - before)
    return [lines.found[i] for i in range(count)]


def digest(*parts: Any) -> str:
    """Of modules by their weights, of pipelines and other objects by their modules, of plain values by their JSON."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, nn.Module):
            for name, tensor in sorted(part.state_dict().items()):
                total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif part is None or isinstance(part, (str, int, float, list, tuple, dict)):
            total.update(json.dumps(part, sort_keys=True).encode())
        else:
            parts_of = getattr(part, "components", None) or vars(part)
            modules = {k: v for k, v in parts_of.items() if isinstance(v, nn.Module)}
            total.update(digest(type(part).__name__, *(modules[k] for k in sorted(modules))).encode())
    return total.hexdigest()


def seeded(*parts: Any) -> torch.Generator:
    """A generator of its own for each (seed, item, sample), whatever is drawn before or beside it."""
    number = int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
    return torch.Generator().manual_seed(number)

"""What the benchmarks share: pictures under the protocol's crop, where a run happened, results as text and JSON.

    data set -datasets-> rows, evenly spaced -> shorter side to S, bicubic, centre cut SxS, RGB -> uint8 [n 3 S S]

The reference of every measurement is these same crops, never the raw files: other crops are the first reason why two
people's numbers for one model differ.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavit_tok import VisualTokenizer
from lavit_tok.images import resize
from lavit_tok.training.sources import load_splits, read_row, undecoded

PACKAGES = ("torch", "transformers", "diffusers", "datasets", "torchmetrics", "numpy", "pillow", "scipy", "lavit-tok")


@dataclass(frozen=True)
class Pictures:
    """Pictures of one split, cropped to the protocol's square."""

    pixels: Tensor
    """uint8 [n 3 S S]."""
    groups: list[str] | None
    """Each picture's `source` column; None if the data set has none."""
    rejects: list[dict[str, str]]
    """Rows without a usable picture: key and reason."""
    split: str
    total: int
    """Rows of the split, of which these were taken evenly spaced."""

    def __len__(self) -> int:
        return len(self.pixels)

    def describe(self) -> str:
        size = self.pixels.shape[-1]
        text = f"{len(self)} pictures, evenly spaced over the {self.total} of split {self.split!r}, crop {size}x{size}"
        return text + (f"; {len(self.rejects)} bad rows skipped" if self.rejects else "")

    def batches(self, size: int) -> Iterator[Tensor]:
        return iter(self.pixels.split(size))


def load_pictures(data: str, size: int, split: str | None = None, limit: int | None = None) -> Pictures:
    """Open a data set through `datasets` and crop its pictures.

    Args:
        data: image folder, parquet, webdataset or arrow path, or Hub name.
        size: S, the side of the crop in pixels.
        split: which split; by default test, else validation, else the first there is.
        limit: at most this many rows, evenly spaced over the split, so that no source of a sorted set is left out.

    Raises:
        ValueError: unreadable data, unknown split, or not one usable picture.
    """
    splits = load_splits(data)
    name = split or next((s for s in ("test", "validation") if s in splits), next(iter(splits)))
    if name not in splits:
        raise ValueError(f"{data}: expected a split of {sorted(splits)}, got {name!r}")
    rows, column = undecoded(splits[name], "image")
    total = len(rows)
    count = total if limit is None else limit
    places = evenly(count, total)

    def crop(place: int) -> tuple[Tensor | None, dict[str, str] | None, str | None]:
        row = rows[place]
        image, reject = read_row(row, column, f"row {place}")
        return (None if image is None else resize(image, size, crop=True)), reject, row.get("source")

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes outside the interpreter lock
        found = list(pool.map(crop, places))
    pixels = [p for p, _, _ in found if p is not None]
    rejects = [r for _, r, _ in found if r is not None]
    if not pixels:
        raise ValueError(f"{data}: not one usable picture in split {name!r} ({len(rejects)} bad rows)")
    groups = [str(g) for p, _, g in found if p is not None and g is not None]
    return Pictures(torch.stack(pixels), groups if len(groups) == len(pixels) else None, rejects, name, total)


def evenly(count: int, total: int) -> list[int]:
    """`count` places of 0..total-1, evenly spaced; all of them if there are no more."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def reference_pictures(data: str, size: int, limit: int, fallback: Pictures) -> Pictures:
    """Pictures over which data-set means are taken: the train split if there is one, else the measured set itself."""
    return load_pictures(data, size, "train", limit) if "train" in load_splits(data) else fallback


# Where it ran


def parser(description: str | None, data: bool = True, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    found = argparse.ArgumentParser(
        description=(description or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if data:
        found.add_argument("--data", required=True, help="image folder, parquet or arrow path, or Hub name")
        found.add_argument("--split", help="test, else validation, else the first, if not given")
        found.add_argument("--limit", type=_positive, help="at most this many pictures, evenly spaced")
    found.add_argument("--tokenizer", default="default", help="'default', a directory or a Hub id")
    found.add_argument("--out", default="results", type=Path, help="folder of the result files")
    found.add_argument("--batch-size", type=_positive, default=64)
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=_positive, help="CPU threads of torch; its own choice if not given")
    found.set_defaults(**defaults)
    return found


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def run(main: Callable[[argparse.Namespace], Any], arguments: argparse.Namespace) -> int:
    """main(arguments); what a user can mend is one line on stderr and exit code 2."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        main(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load_tokenizer(arguments: argparse.Namespace) -> VisualTokenizer:
    return VisualTokenizer.from_pretrained(arguments.tokenizer, device=arguments.device)


def stamp() -> dict[str, Any]:
    """Command, date, commit, hardware and package versions. Of foreign paths only the last part is shown."""
    return {
        "command": shlex.join(["python", *map(_short, sys.argv)]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def hardware() -> str:
    """Processor, its cores here, torch's threads, memory, GPU, and how busy the machine was."""
    cpu, memory = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        cpu = names[0] if names else cpu
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        memory = f", {gib:.0f} GiB"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads{memory}{gpu}{load}"


def _short(argument: str) -> str:
    path = Path(argument)
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd())) if inside else path.name


def _commit() -> str:
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../lavit_tok", ".")
        return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# What comes out


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; floats with four significant digits."""
    cells = [[_cell(value) for value in row] for row in (headers, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(headers))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and spread of one figure over several seeds; the spread is their standard deviation (n - 1)."""
    found = torch.tensor(list(values), dtype=torch.float64)
    return {"mean": float(found.mean()), "std": float(found.std()) if len(found) > 1 else 0.0, "seeds": len(found)}


def plus_minus(value: dict[str, float]) -> str:
    return f"{_cell(value['mean'])} ± {value['std']:.2g}"


def write(name: str, out: Path, title: str, body: str, values: dict[str, Any]) -> None:
    """Print the result and write it as out/name.md and out/name.json, each with the stamp of this run."""
    where = stamp()
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    head = [
        f"# {title}\n",
        f"- command: `{where['command']}`",
        f"- date: {where['date']}; commit: {where['commit']}",
        f"- hardware: {where['hardware']}",
        f"- versions: {versions}",
    ]
    text = "\n".join(head) + "\n\n" + body.strip() + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps({"stamp": where, **values}, indent=2) + "\n")
    print(text)


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def count_groups(groups: Sequence[str]) -> list[str]:
    """Names of the groups, the largest first."""
    return [name for name, _ in Counter(groups).most_common()]

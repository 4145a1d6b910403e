"""What the benchmarks share: pictures under the protocol's crop, where a run happened, results as text and JSON.

    data set -datasets-> rows, evenly spaced -> shorter side to S, bicubic, centre cut SxS, RGB -> uint8 [n 3 S S]

The reference of every measurement is these same crops, never the raw files: other crops are the first reason why two
people's numbers for one model differ.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parts import progress
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lavit_tok
from lavit_tok import VisualCodes, VisualTokenizer
from lavit_tok.images import resize
from lavit_tok.training.sources import load_splits, read_row, row_key, undecoded

PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "datasets",
    "lightning",
    "torchmetrics",
    "numpy",
    "pillow",
    "scipy",
    "lavit-tok",
)


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
    cropped: bool
    """Centre crop; False: the whole picture, resized to a square."""
    keys: list[str]
    """What each picture is called."""
    captions: list[str]
    """Each picture's `caption` column; empty where it has none."""

    def __len__(self) -> int:
        return len(self.pixels)

    def describe(self) -> str:
        size = self.pixels.shape[-1]
        form = "crop" if self.cropped else "resized to"
        text = (
            f"{len(self)} pictures, evenly spaced over the {self.total} of split {self.split!r}, {form} {size}x{size}"
        )
        return text + (f"; {len(self.rejects)} bad rows skipped" if self.rejects else "")

    def record(self) -> dict[str, Any]:
        """For a result file: which pictures, how many, and every row without a usable one, by name."""
        bad = {"bad_rows": len(self.rejects), "rejects": self.rejects}
        return {"set": self.describe(), "images": len(self), **bad}

    def named_rejects(self, most: int = 20) -> str:
        """A markdown list of the rows without a usable picture; empty if there are none."""
        if not self.rejects:
            return ""
        lines = [f"- `{r['key']}`: {r['reason']}" for r in self.rejects[:most]]
        more = [f"- and {len(self.rejects) - most} more, in the JSON file"] if len(self.rejects) > most else []
        return f"\n\n{len(self.rejects)} rows have no usable picture and are in no figure:\n\n" + "\n".join(
            lines + more
        )

    def batches(self, size: int) -> Iterator[Tensor]:
        return iter(self.pixels.split(size))


def load_pictures(
    data: str, size: int, split: str | None = None, limit: int | None = None, crop: bool = True
) -> Pictures:
    """Open a data set through `datasets` and crop its pictures.

    Args:
        data: image folder, parquet, webdataset or arrow path, or Hub name.
        size: S, the side of the crop in pixels.
        split: which split; by default test, else validation, else the first there is.
        limit: at most this many rows, evenly spaced over the split, so that no source of a sorted set is left out.
        crop: False resizes the whole picture to a square, as a tokenizer without `crop` in its config does.

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

    def read(place: int) -> tuple[Tensor | None, dict[str, str] | None, dict[str, Any]]:
        row = rows[place]
        key = row_key(row, column, f"row {place}")
        image, reject = read_row(row, column, f"row {place}", key)
        texts = {"key": key, "source": row.get("source"), "caption": row.get("caption") or ""}
        return (None if image is None else resize(image, size, crop)), reject, texts

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes outside the interpreter lock
        found = list(progress(pool.map(read, places), "pictures", len(places)))
    pixels = [p for p, _, _ in found if p is not None]
    rejects = [_nameable(r) for _, r, _ in found if r is not None]
    if not pixels:
        raise ValueError(f"{data}: not one usable picture in split {name!r} ({len(rejects)} bad rows)")
    texts = [t for p, _, t in found if p is not None]
    groups = [str(t["source"]) for t in texts if t["source"] is not None]
    return Pictures(
        pixels=torch.stack(pixels),
        groups=groups if len(groups) == len(pixels) else None,
        rejects=rejects,
        split=name,
        total=total,
        cropped=crop,
        keys=[t["key"] for t in texts],
        captions=[t["caption"] for t in texts],
    )


def _nameable(reject: dict[str, str]) -> dict[str, str]:
    """A reject for a result file: of an absolute path only the last part, as in the stamp."""
    key = reject["key"]
    return {"key": short(key), "reason": reject["reason"].replace(key, short(key))}


def evenly(count: int, total: int) -> list[int]:
    """`count` places of 0..total-1, evenly spaced; all of them if there are no more."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def reference_pictures(data: str, size: int, limit: int, fallback: Pictures) -> Pictures:
    """Pictures over which data-set means are taken: the train split if there is one, else the measured set itself."""
    return load_pictures(data, size, "train", limit) if "train" in load_splits(data) else fallback


# Where it ran


def parser(
    description: str | None, data: bool = True, tokenizer: bool = True, **defaults: Any
) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    found = argparse.ArgumentParser(
        description=(description or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if data:
        found.add_argument("--data", required=True, help="image folder, parquet or arrow path, or Hub name")
        found.add_argument("--split", help="test, else validation, else the first, if not given")
        found.add_argument("--limit", type=positive, help="at most this many pictures, evenly spaced")
    if tokenizer:
        found.add_argument("--tokenizer", default="default", help="'default', a directory or a Hub id")
    found.add_argument("--out", default="results", type=Path, help="folder of the result files")
    found.add_argument("--batch-size", type=positive, default=64)
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=positive, help="CPU threads of torch; its own choice if not given")
    found.set_defaults(**defaults)
    return found


def any_tokenizer(found: argparse.ArgumentParser) -> None:
    """The arguments of scripts that measure any tokenizer, beside --tokenizer."""
    group = found.add_argument_group(
        "other tokenizers",
        "--tokenizer also takes emu3, chameleon, janus or vqmodel (random weights), KIND:DIR with weights, or "
        "package.module:function, a factory of your own; see benchmarks/adapters.py",
    )
    group.add_argument("--image-size", type=positive, default=256, help="of those four, in pixels")
    group.add_argument(
        "--squeeze", action="store_true", help="whole pictures squeezed to a square, not the protocol's centre crop"
    )


def positive(text: str) -> int:
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
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def load_tokenizer(arguments: argparse.Namespace) -> VisualTokenizer:
    return VisualTokenizer.from_pretrained(arguments.tokenizer, device=arguments.device)


def stamp() -> dict[str, Any]:
    """Command, date, commit, hardware and package versions. Of foreign paths only the last part is shown."""
    return {
        "command": shlex.join(["python", *map(short, sys.argv)]),
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


MEASURING = ("adapters", "common", "grid_tokenizers", "metrics", "parts", "protocol", "speeds")
"""The files that the benchmarks share."""


def provenance(script: str) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on from, so that its numbers are the same.

    The code itself, not the commit: a commit of something else need not throw finished parts away, and an uncommitted
    change of what measures must.
    """
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in MEASURING] + sorted(here.glob(f"{script}*.py"))
    found = hashlib.sha256()
    for path in [*files, *sorted(Path(lavit_tok.__file__).parent.rglob("*.py"))]:
        found.update(path.read_bytes())
    return {"code": found.hexdigest()[:12], "versions": _versions(), "threads": torch.get_num_threads()}


def short(argument: str) -> str:
    """A path for a result file: relative where it lies in the working directory, else its last part."""
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
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../lavit_tok", "../lavit_lm", ".")
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


# How long it takes


def flops(call: Callable[[], Any]) -> int:
    """FLOPs (two for a multiply-add) of matrix products, convolutions and attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def clock(device: str) -> tuple[float, float]:
    """Seconds of the wall clock, and of CPU time that this process's threads used."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def interleaved(
    calls: Sequence[Callable[[], Any]], repeats: int, device: str, seconds: float = 0.0, warm: int = 2
) -> list[list[tuple[float, float]]]:
    """(wall, CPU) seconds of each call, taken in turns after `warm` rounds that do not count.

    At least `repeats` rounds, and up to 100 until they last `seconds` together, since small models are noisy.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    began = time.perf_counter()
    for turn in range(warm + max(repeats, 100)):
        if turn >= warm + repeats and time.perf_counter() - began > seconds:
            break
        for call, found in zip(calls, times, strict=True):
            start = clock(device)
            call()
            if turn >= warm:
                end = clock(device)
                found.append((end[0] - start[0], end[1] - start[1]))
    return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the pairs' ratios: what slows the machine for a while slows both of a pair."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


# Pictures from codes


def draw(
    decoder: Any, codes: VisualCodes, size: int, seed: int, batch_size: int, device: str, steps: int, guidance: float
) -> Tensor:
    """Pictures of all codes, float [n 3 S S] in 0..1; each picture has its own noise, whatever the batch size."""
    parts = []
    for start in range(0, len(codes), batch_size):
        places = range(start, min(start + batch_size, len(codes)))
        noise = [torch.Generator().manual_seed(seed * len(codes) + i) for i in places]
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        images = decoder(codes.take(places).to(device), generator=noise, **options).images.float().cpu()
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        parts.append(images.clamp(0, 1))
    return torch.cat(parts)


def to_uint8(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


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

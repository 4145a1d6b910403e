"""What the benchmarks share: their arguments, where a run happened, results as text and JSON."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import lavit_tok
from lavit_tok import VisualTokenizer

PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "datasets",
    "pytorch_lightning",
    "torchmetrics",
    "numpy",
    "pillow",
    "scipy",
    "lavit-tok",
)


# Arguments


def parser(
    description: str | None, data: bool = True, tokenizer: bool = True, **defaults: Any
) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    found = argparse.ArgumentParser(
        description=(description or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if data:
        found.add_argument(
            "--data", required=True, help="image folder, parquet or arrow path, or Hub name"
        )
        found.add_argument("--split", help="test, else validation, else the first, if not given")
        found.add_argument(
            "--limit", type=positive, help="at most this many pictures, evenly spaced"
        )
    if tokenizer:
        found.add_argument(
            "--tokenizer", default="default", help="'default', a directory or a Hub id"
        )
    found.add_argument("--out", default="results", type=Path, help="folder of the result files")
    found.add_argument("--batch-size", type=positive, default=64)
    found.add_argument("--device", default="cpu")
    found.add_argument(
        "--threads", type=positive, help="CPU threads of torch; its own choice if not given"
    )
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
        "--squeeze",
        action="store_true",
        help="whole pictures squeezed to a square, not the protocol's centre crop",
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


def evenly(count: int, total: int) -> list[int]:
    """`count` places of 0..total-1, evenly spaced; all of them if there are no more."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def load_tokenizer(arguments: argparse.Namespace) -> VisualTokenizer:
    return VisualTokenizer.from_pretrained(arguments.tokenizer, device=arguments.device)


# Where it ran


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
        names = [
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ]
        cpu = names[0] if names else cpu
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        memory = f", {gib:.0f} GiB"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads{memory}{gpu}{load}"
    )


MEASURING = (
    "adapters",
    "common",
    "grid_tokenizers",
    "metrics",
    "parts",
    "picture_sets",
    "protocol",
    "speeds",
    "timing",
)
"""The files that the benchmarks share."""


def provenance(*scripts: str, packages: Sequence[ModuleType] = (lavit_tok,)) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on from, so that its numbers are the same.

    The code itself, not the commit: a commit of something else need not throw finished parts away, and an uncommitted
    change of what measures must.
    """
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in MEASURING] + sorted(
        path for script in scripts for path in here.glob(f"{script}*.py")
    )
    found = hashlib.sha256()
    for package in packages:
        files += sorted(Path(str(package.__file__)).parent.rglob("*.py"))
    for path in files:
        found.update(path.read_bytes())
    return {
        "code": found.hexdigest()[:12],
        "versions": _versions(),
        "threads": torch.get_num_threads(),
    }


def given(arguments: argparse.Namespace) -> dict[str, str]:
    """The command line, for the settings of a resumed run: not where results go, nor threads, which provenance has."""
    return {
        name: str(value)
        for name, value in vars(arguments).items()
        if name not in ("out", "threads")
    }


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
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            "../lavit_tok",
            "../lavit_lm",
            ".",
        )
        return git("rev-parse", "--short", "HEAD") + (
            " with uncommitted changes" if changed else ""
        )
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
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
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
    return {
        "mean": float(found.mean()),
        "std": float(found.std()) if len(found) > 1 else 0.0,
        "seeds": len(found),
    }


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


def rejected(rejects: Sequence[dict[str, str]], most: int = 20) -> str:
    """A markdown list of what could not be read, by name; empty if there is nothing."""
    if not rejects:
        return ""
    lines = [f"- `{r['key']}`: {r['reason']}" for r in rejects[:most]]
    lines += [f"- and {len(rejects) - most} more, in the JSON file"] if len(rejects) > most else []
    return f"\n\n{len(rejects)} pictures could not be read and are in no figure:\n\n" + "\n".join(
        lines
    )


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt

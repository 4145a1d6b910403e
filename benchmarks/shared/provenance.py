"""Where a number comes from: command, date, commit, hardware, package versions, code."""

import datetime
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
CODE = ("benchmarks", "lavit_tok", "lavit_lm")
PACKAGES = "torch transformers diffusers datasets pytorch-lightning torchmetrics numpy pillow scipy"


def stamp() -> dict[str, Any]:
    """What every result file states. Of absolute paths only the last part is shown."""
    return {
        "command": shlex.join(["python", *map(short_path, sys.argv)]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def hardware() -> str:
    """Processor, cores, threads of torch, memory, GPU, and how busy the machine was."""
    cpu, memory, info = platform.processor() or platform.machine(), "", Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if "model name" in x), cpu)
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        memory = f", {gib:.0f} GiB"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    return f"{cpu}, {cores}{memory}{gpu}, load average {os.getloadavg()[0]:.1f}"


def commit() -> str:
    """The short hash of the checked-out commit, and whether the code differs from it."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
        return git("rev-parse", "--short", "HEAD") + " with uncommitted changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def versions() -> dict[str, str]:
    """Python, and the installed packages that numbers depend on."""
    found = {d.name: d.version for d in importlib.metadata.distributions(name=None)}
    names = [name for name in (*PACKAGES.split(), "joblib", "lavit-tok") if name in found]
    return {"python": platform.python_version(), **{name: found[name] for name in names}}


def code_digest() -> str:
    """12 hexadecimal digits of the code, whose uncommitted changes must count, too."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def short_path(argument: str) -> str:
    """A path for a result file: relative inside the working directory, else its last part."""
    path, folder = Path(argument), Path.cwd()
    if not path.is_absolute():
        return argument
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def recipe(path: str) -> Any:
    """A script of recipes/ as a module; it may import scripts beside it."""
    file = ROOT / "recipes" / path
    spec: Any = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module

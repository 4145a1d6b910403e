"""Runs the parts in turn, counts, and writes docs/robustness.md; goes on where it was stopped.

A trial is a pure function of its part and number. Counts and the next number of each part are in
results.json, beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from robustness import codes, determinism, directories, images, jobs
from robustness.process import Outcome, preload
from robustness.small import Workshop

ROOT = Path(__file__).parents[2]
STATE, REPORT = Path(__file__).with_name("results.json"), ROOT / "docs/robustness.md"
INTRODUCTION = """# Robustness campaign

Written by `python -m tests.robustness --minutes N [--only PARTS] [--restart]`; SECURITY.md states
what is promised. A trial is seeded by its part and number, given in brackets, and runs in a process
of its own, on small models that the library's own commands make. Counts add up over runs; the
commit (+ for uncommitted changes) is that of a part's last run. What failed stays listed, with what
was done since ("since" in results.json, written after the trial was repeated). Memory is above that
at the start, time that of the processor.
"""


@dataclass(frozen=True)
class Part:
    """Number of trials, percentage of the time, and what counts as a failure."""

    trial: Callable[..., Outcome] | None  # None: images, many to a process
    target: int
    weight: int
    unit: str
    failure: str


VARIED = determinism.BLOCKS * len(determinism.VARIANTS)
PARTS = {
    "determinism": Part(determinism.trial, VARIED, 10, "images", "other codes"),
    "resources": Part(jobs.scarce, 89, 8, "jobs", "as kills, or over 0.4 GB for large inputs"),
    "codes": Part(codes.trial, 300, 7, "files", "good lines lost, altered values, a traceback"),
    "directories": Part(directories.trial, 540, 20, "directories", "code run, a question, "
        "a traceback, other results, over 10 s or 1 GB"),
    "images": Part(None, 100_000, 27, "images", "no codes or ImageError, over 2 s or 1 GB"),
    "kills": Part(jobs.kill, 360, 28, "kills", "files half written, lost, different, left behind"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="for all parts together")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--restart", action="store_true", help="begin these parts again")
    parser.add_argument("--trials", help="JSON list of [part, number, {arguments}]: only these")
    args = parser.parse_args(argv)
    if args.trials:
        return some(json.loads(args.trials))
    chosen = args.only.split(",")
    if unknown := {*chosen} - {*PARTS}:
        parser.error(f"unknown parts {sorted(unknown)}, expected some of {', '.join(PARTS)}")
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    preload()
    commit = _git("rev-parse", "--short=10", "HEAD")
    commit += "+" * bool(_git("status", "--porcelain", "lavit_tok", "lavit_lm"))
    left, weights = args.minutes * 60, sum(PARTS[name].weight for name in chosen)
    with tempfile.TemporaryDirectory() as folder:
        work = Workshop(Path(folder))
        for name in chosen:
            part, started = PARTS[name], time.monotonic()
            end = started + left * part.weight / weights
            if args.restart or name not in state:
                state[name] = {"next": 0, "minutes": 0.0, "kinds": {}, "failures": {}}
            known = state[name] | {"date": str(date.today()), "commit": commit}
            state[name] = known
            before = known["minutes"]
            while known["next"] < part.target and time.monotonic() < end:
                run_some(part, known, work)
                known["minutes"] = round(before + (time.monotonic() - started) / 60, 2)
                STATE.write_text(json.dumps(state, indent=1) + "\n")
            REPORT.write_text(report(state))
            left, weights = left - (time.monotonic() - started), weights - part.weight
            tried, failed = totals(known)
            print(f"{name}: {tried} {part.unit}, {failed} failures", flush=True)
    return int(any(totals(state[name])[1] for name in chosen))


def outcomes(part: Part, work: Workshop, numbers: Sequence[int], **more: Any) -> list[Outcome]:
    if part.trial is None:
        return list(images.run(work, numbers))
    try:
        return [part.trial(work, number, **more) for number in numbers]
    except AssertionError as error:  # what the trials start from could not be made
        return [Outcome("preparation", str(error), 0) for _ in numbers]


def some(trials: list[Any]) -> int:
    """A few trials, whose outcomes are printed as JSON: the fast tests."""
    preload()
    with tempfile.TemporaryDirectory() as folder:
        work = Workshop(Path(folder))
        for name, numbers, more in trials:
            run = outcomes(PARTS[name], work, range(*numbers), **more)
            print(json.dumps([vars(outcome) for outcome in run]), flush=True)
    return 0


def run_some(part: Part, known: dict[str, Any], work: Workshop) -> None:
    """One trial, or a bulk of images."""
    end = known["next"] + (1 if part.trial else images.BULK)
    numbers = range(known["next"], min(end, part.target))
    for number, outcome in zip(numbers, outcomes(part, work, numbers), strict=True):
        empty = {"tried": 0, "failed": 0, "slowest": [0, 0], "largest": [0, 0], "notes": {}}
        kind = known["kinds"].setdefault(outcome.kind, empty)
        kind["tried"] += outcome.tried
        kind["slowest"] = max(kind["slowest"], [round(outcome.seconds, 2), number])
        kind["largest"] = max(kind["largest"], [round(outcome.mb), number])
        if outcome.note:
            kind["notes"][outcome.note] = kind["notes"].get(outcome.note, 0) + 1
        if outcome.failure:
            kind["failed"] += 1
            text = " ".join(outcome.failure.replace("`", "'").split())[-240:]
            name = f"{outcome.kind}: {re.sub(r'[0-9]+|/[^ ]*/', '#', text)[:100]}"
            failure = known["failures"].setdefault(name, {"numbers": [], "example": text})
            failure["numbers"].append(number)
        known["next"] = number + 1


def totals(known: dict[str, Any]) -> tuple[int, int]:
    """Tried and failed."""
    kinds = known["kinds"].values()
    return sum(kind["tried"] for kind in kinds), sum(kind["failed"] for kind in kinds)


def report(state: dict[str, Any]) -> str:
    """docs/robustness.md."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pillow"))
    text = (
        f"{INTRODUCTION}\n{os.cpu_count()} CPU cores ({platform.machine()}), {memory} GB; Python "
    )
    text += f"{platform.python_version()}, {packages}.\n\n"
    text += "| part | tried | failures | a failure is | minutes | commit | date |\n" + "|---" * 7
    for name, known in state.items():
        tried, failed = totals(known)
        text += f"|\n| {name} | {tried:,} {PARTS[name].unit} | {failed:,} | {PARTS[name].failure} "
        text += f"| {known['minutes']} | {known['commit']} | {known['date']} "
    text += "|\n"
    for name, known in state.items():
        text += f"\n## {name.capitalize()}\n\n"
        text += "| kind | tried | failures | ended | slowest | most memory |\n" + "|---" * 6
        for kind, k in sorted(known["kinds"].items()):
            notes = ", ".join(f"{count:,} {note}" for note, count in sorted(k["notes"].items()))
            text += f"|\n| {kind} | {k['tried']:,} | {k['failed']:,} | {notes} "
            text += f"| {k['slowest'][0]:.2f} s ({k['slowest'][1]}) "
            text += f"| {k['largest'][0]:,} MB ({k['largest'][1]}) "
        text += "|\n\n" if known["failures"] else "|\n"
        for title, failure in sorted(known["failures"].items()):
            count, numbers = len(failure["numbers"]), failure["numbers"][:5]
            text += f"- {count:,} x {title.split(': ')[0]}: `{failure['example']}` {numbers}"
            text += f": {failure['since']}\n" if "since" in failure else "\n"
    return text


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or ("unknown" if done.returncode else "")

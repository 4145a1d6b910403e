"""Jobs under kill -9, with full disks, read-only folders and few file handles, and of many images.

What is there is whole at every moment, and the same command goes on to the same bytes and losses.
"""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path
from resource import RLIMIT_FSIZE, RLIMIT_NOFILE
from typing import Any

import numpy as np

from robustness.process import Outcome
from robustness.small import JOBS, STEPS, Workshop, cleared, file_name, files, image

INPUTS = ("20 megapixels", "a FIFO", "an endless device", "a sparse file of 3 GB")
KILLS = 4  # of a job, at most, before it is left to end
# A kill of training costs five times that of the others.
ORDER = ["codes", "shards", "decoded", "table"] * 3 + ["tokenizer", "lm", "decoder"]
ALONE = 300  # trials of these; from there on, shards with loading processes
SCARCE = ["codes", "table", "shards", "decoded", "tokenizer", "decoder", "lm"]


def kill(work: Workshop, number: int, at_replace: int = 0) -> Outcome:
    rng, job = np.random.default_rng((4, number)), ORDER[number % len(ORDER)]
    job = job if number < ALONE else "workers"
    expected, duration = reference(work, job)
    if job == "workers":  # the files of one process
        expected = reference(work, "shards")[0]
    folder, kills, seconds, failure = cleared(work.folder / "killed"), 0, 0.0, None
    while failure is None:
        moment: dict[str, Any] = {}
        if kills < KILLS:
            moment = {"kill_after": float(rng.uniform(0, 1.05 * duration))}
            if job in (*ORDER[:4], "workers") and rng.integers(3) == 0:
                moment = {"kill_at_replace": int(rng.integers(1, 4))}
        if at_replace:
            moment, at_replace = {"kill_at_replace": at_replace}, 0
        done = work.run(job, folder / file_name(job), **moment)
        seconds += done.seconds
        if done.code != -signal.SIGKILL:
            failure = done.complaint or different(folder, expected)
            break
        kills += 1
        failure = half_written(folder, expected)
    return Outcome(job, failure, seconds / max(1, kills), tried=kills)


def scarce(work: Workshop, number: int) -> Outcome:
    if number < 1 + len(INPUTS):
        return inputs(work, INPUTS[number - 1]) if number else many(work, 20_000)
    rng, job = np.random.default_rng((5, number)), SCARCE[number % len(SCARCE)]
    want = ("full disk", "read-only", "few handles")[number % 3]
    expected, _ = reference(work, job)
    folder = cleared(work.folder / "scarce")
    program, args = JOBS[job](work, folder / file_name(job))
    how: dict[str, Any] = {"limits": {RLIMIT_NOFILE: int(rng.integers(5)) - 1}}
    if want == "full disk":
        size = int(rng.integers(max(map(len, expected.values()))))
        how = {"limits": {RLIMIT_FSIZE: size}}
    elif want == "read-only":
        folder.chmod(0o555)
        how = {"nobody": True}
    done = work.command(program, args, **how)
    folder.chmod(0o755)
    failure = done.complaint or half_written(folder, expected)
    if failure is None and want == "read-only" and done.code == 0:
        failure = "exit code 0, though nothing could be written"
    if failure is None and (left := [path.name for path in folder.rglob("*.part")]):
        failure = f"{left[0]}: left behind"
    again = work.command(program, args)
    failure = failure or again.complaint or different(folder, expected)
    note = "refused" if done.code else "done"
    return Outcome(f"{job}: {want}", failure, done.seconds, done.mb, note=note)


def inputs(work: Workshop, kind: str) -> Outcome:
    """`encode` of a good image beside something else, which is skipped, or costs little memory."""
    folder, limit = cleared(work.folder / "inputs"), 400
    image(1).save(folder / "good.png")
    path = folder / "other.jpg"
    if kind == "20 megapixels":
        image(2).resize((5000, 4000)).save(path)
        for i in range(5):
            os.link(path, folder / f"{i}.jpg")
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "an endless device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 3 << 30)
    names = sorted(folder.iterdir())
    args = ["encode", *names, "--tokenizer", work.tokenizer]
    done = work.command("lavit-tok", args, limit_s=10)
    failure = done.complaint or (done.code and "the good image was not encoded") or None
    failure = failure or (f"{done.mb:.0f} MB" if done.mb > limit else None)
    return Outcome(f"input: {kind}", failure, done.seconds, done.mb)


def many(work: Workshop, count: int) -> Outcome:
    """`encode` of a quarter of the images, then of all: time in proportion, memory the same."""
    folder, sources = cleared(work.folder / "many"), sorted(work.images.glob("train/1*.png"))
    args = ["encode", folder, "--tokenizer", work.tokenizer, "--out", work.folder / "many.jsonl"]
    done = []
    for start, end in ((0, count // 4), (count // 4, count)):
        for i in range(start, end):
            os.link(sources[i % len(sources)], folder / f"{i:06}.png")
        (work.folder / "many.jsonl").unlink(missing_ok=True)
        done.append(work.command("lavit-tok", args, limit_s=900))
    quarter, whole = done
    cleared(folder)
    failure = whole.complaint or (whole.code and "refused") or None
    if whole.mb > quarter.mb + 64 or whole.seconds > 6 * quarter.seconds + 2:
        failure = f"{quarter.mb:.0f} to {whole.mb:.0f} MB, {quarter.seconds:.1f} to "
        failure += f"{whole.seconds:.1f} s for four times as many"
    return Outcome(f"codes: {count} images", failure, whole.seconds, whole.mb)


@cache
def reference(work: Workshop, job: str) -> tuple[dict[str, bytes], float]:
    """What the job writes undisturbed, and how long it takes when its inputs have been read."""
    assert getattr(work, job)
    folder = cleared(work.folder / f"reference-{job}")
    done = work.run(job, folder / file_name(job))
    assert done.code == 0, done.err
    return files(folder), done.duration


def half_written(folder: Path, expected: dict[str, bytes]) -> str | None:
    """A file that is not under its final name what it will be; lists that grow are left out."""
    for name, data in files(folder).items():
        growing = name.endswith((".json", "rejects.jsonl")) or not _is_output(name)
        if not growing and data != expected.get(name, data):
            return f"{name}: half written, or different, under its final name"
    return None


def different(folder: Path, expected: dict[str, bytes]) -> str | None:
    """What is lost, different or left behind at the end, losses of every step included."""
    found = files(folder)
    for name in sorted(name for name in found.keys() | expected.keys() if _is_output(name)):
        if found.get(name) != expected.get(name):
            how = "different" if name in expected else "left behind"
            return f"{name}: {how if name in found else 'lost'}"
    for name in (name for name in expected if name.endswith(".losses")):
        lines, wanted = ({*text[name].decode().splitlines()} for text in (found, expected))
        if lines != wanted or len(lines) != STEPS:
            return f"losses differ: {sorted(lines ^ wanted)}"
    return None


def _is_output(name: str) -> bool:
    return not name.split("/")[0].endswith((".run", ".losses", ".yaml"))

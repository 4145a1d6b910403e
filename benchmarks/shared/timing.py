"""Times and FLOPs of calls, beside a baseline in the same run."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Measurement, TaskSpec, timer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shared import report


def flops(call: Callable[[], Any]) -> int:
    """FLOPs (two for a multiply-add) of matrix products, convolutions and attention.

    Attention is counted under the plain ("math") kernel, because FlopCounterMode does not count the
    fused CPU kernel; entries that a mask drops count as work.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def in_turns(calls: dict[str, Any], repeats: int, warm: int = 2) -> dict[str, Measurement]:
    """Wall-clock times of each call, taken in turns after `warm` rounds that do not count.

    Not Timer.timeit, which times one call after another: in turns a busy machine slows all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm + repeats):
        for name, call in calls.items():
            start = timer()  # waits for the accelerator, as torch.utils.benchmark does
            call()
            if turn >= warm:
                times[name].append(timer() - start)
    return {name: measurement(name, values) for name, values in times.items()}


def measurement(name: str, seconds: Sequence[float]) -> Measurement:
    """Seconds of single calls as a Measurement of torch.utils.benchmark."""
    spec = TaskSpec(stmt=name, setup="", num_threads=torch.get_num_threads())
    return Measurement(number_per_run=1, raw_times=list(seconds), task_spec=spec)


def ratio(slow: Measurement, fast: Measurement) -> float:
    """Median of the pairs' ratios: what slows the machine for a while slows both of a pair."""
    return statistics.median(a / b for a, b in zip(slow.raw_times, fast.raw_times, strict=True))


@dataclass(frozen=True)
class Entry:
    """One line of a speed table."""

    name: str
    call: Callable[[], Any]
    """What is timed, over a whole batch."""
    batch: int
    one: Callable[[], Any] | None = None
    """The same over one image, whose FLOPs are counted."""
    baseline: str | None = None
    """The name of the entry that it is compared with."""
    info: dict[str, Any] = field(default_factory=dict)
    """What speed alone would hide: weights, codes and bits per image."""


@torch.no_grad()
def compare(entries: Sequence[Entry], repeats: int, warm: int = 2) -> list[dict[str, Any]]:
    """One record for each entry, all timed in turns, without gradients."""
    counts = {e.name: flops(e.one) for e in entries if e.one is not None}
    times = in_turns({e.name: e.call for e in entries}, repeats, warm)
    records = []
    for entry in entries:
        time = times[entry.name]
        record = {"name": entry.name, "batch": entry.batch, **entry.info, "seconds": time.median}
        record["images_per_second"] = entry.batch / time.median
        record["repeats"] = len(time.raw_times)
        if entry.name in counts:
            record["gflops_per_image"] = counts[entry.name] / 1e9
        if entry.baseline is not None:
            record["baseline"] = entry.baseline
            record["time_ratio"] = ratio(time, times[entry.baseline])
            if entry.name in counts and entry.baseline in counts:
                record["flop_ratio"] = counts[entry.name] / counts[entry.baseline]
                record["overhead"] = record["time_ratio"] / record["flop_ratio"]
        records.append(record)
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as markdown; columns without any value are left out."""
    names = dict.fromkeys(n for r in records for n, value in r.items() if value is not None)
    rows = [[record.get(name) for name in names] for record in records]
    return report.table([name.replace("_", " ") for name in names], rows)

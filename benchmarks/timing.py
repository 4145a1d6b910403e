"""How long calls take, and how many FLOPs they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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
    calls: Sequence[Callable[[], Any]],
    repeats: int,
    device: str,
    seconds: float = 0.0,
    warm: int = 2,
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

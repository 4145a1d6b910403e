"""What the speed benchmarks share: several calls timed in turns, side by side, and the memory that each takes alone.

A row names what ran, and beside images/s what that alone would hide: codes and bits an image, weights, FLOPs an image,
peak memory. Times are medians of interleaved rounds after warm ones, so that a busy machine slows all rows; `ratio` is
the median of the pairs' ratios with the row that it is compared to.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import timing
import torch

from lavit_tok import VisualCodes


@dataclass(frozen=True)
class Entry:
    """One row: a call over a whole batch, and the same over one image, whose FLOPs are counted."""

    name: str
    weights: str
    batch: int
    call: Callable[[], Any]
    one: Callable[[], Any]
    parameters: int
    tokens: float | None = None
    """Codes an image, mean."""
    bits: float | None = None
    """Bits an image, codes x log2 K."""
    beside: int | None = None
    """Index of the row that it is compared to."""
    load: dict[str, Any] | None = None
    """Arguments of adapters.load that give this tokenizer, to measure its memory in another process."""


@torch.no_grad()
def side_by_side(
    entries: Sequence[Entry], repeats: int, device: str, seconds: float = 0.0, warm: int = 1
) -> list[dict[str, Any]]:
    """One result row for each entry, all timed in turns, without gradients."""
    counts = [timing.flops(entry.one) for entry in entries]
    found = timing.interleaved([entry.call for entry in entries], repeats, device, seconds, warm)
    walls = [[wall for wall, _ in times] for times in found]
    rows = []
    for entry, count, times in zip(entries, counts, walls, strict=True):
        middle = statistics.median(times)
        row = {
            "name": entry.name,
            "weights": entry.weights,
            "batch": entry.batch,
            "tokens_per_image": entry.tokens,
            "bits_per_image": entry.bits,
            "parameters": entry.parameters,
            "gflops_per_image": count / 1e9,
            "seconds": middle,
            "images_per_second": entry.batch / middle,
            "repeats": len(times),
            "load": entry.load,
        }
        if entry.beside is not None:
            other = entries[entry.beside]
            floor = count / counts[entry.beside]
            ratio = timing.ratio(times, walls[entry.beside]) * other.batch / entry.batch
            row |= {"beside": other.name, "flop_ratio": floor, "time_ratio": ratio}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        (
            r["name"],
            r["weights"],
            r["batch"],
            r["tokens_per_image"],
            r["bits_per_image"],
            f"{r['parameters'] / 1e6:.4g}",
            r["gflops_per_image"],
            r["images_per_second"],
            r.get("beside"),
            r.get("flop_ratio"),
            r.get("time_ratio"),
            r.get("peak_memory", {}).get("run_gib"),
        )
        for r in rows
    ]
    head = (
        "what",
        "weights",
        "batch",
        "codes an image",
        "bits",
        "weights, M",
        "GFLOPs an image",
        "images/s",
    )
    return common.table((*head, "beside", "FLOP ratio", "time ratio", "peak memory, GiB"), lines)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Images/s of all rows, on a logarithmic scale."""
    plt = common.pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 0.9 + 0.34 * len(rows)), layout="constrained")
    names = [
        f"{r['name']} ({r['tokens_per_image']:.0f} codes)" if r["tokens_per_image"] else r["name"]
        for r in rows
    ]
    values = [r["images_per_second"] for r in rows]
    bars = axis.barh(
        range(len(rows)), values, color=["tab:red" if "lavit-tok" in n else "0.6" for n in names]
    )
    axis.bar_label(bars, [f"{v:.3g}" for v in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="images/s", title=title)
    axis.set_xlim(right=max(values) * 2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Memory, in a process of its own: the greatest resident size of a process never falls again


def peak_gib() -> float:
    """GiB. Not from getrusage, whose maximum a new process inherits from its parent on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def in_own_process(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What work(*arguments) gives in a new process; both must be importable from there."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def add_memory(what: str, rows: Sequence[dict[str, Any]]) -> None:
    """Each row's peak memory, where it says how its tokenizer is loaded; that is then taken out of the row."""
    for row in rows:
        options = row.pop("load")
        if options is not None:
            row["peak_memory"] = in_own_process(tokenizer_memory, what, options, row["batch"])


def tokenizer_memory(what: str, options: dict[str, Any], batch: int) -> dict[str, float]:
    """Peak memory of loading one tokenizer and of encoding or decoding a batch once.

    On a CPU resident memory of the process, Python and torch included (`imports_gib`); on CUDA allocated memory.

    Args:
        what: "encode" or "decode"; to decode, codes are drawn at random, a third of the greatest number for ours.
        options: of adapters.load.
    """
    import adapters

    cuda = str(options.get("device", "cpu")).startswith("cuda")
    peak = (lambda: torch.cuda.max_memory_allocated() / 2**30) if cuda else peak_gib
    found = {"imports_gib": peak()}
    tokenizer = adapters.load(**options)
    found["loaded_gib"] = peak()
    size = tokenizer.image_size
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    if what == "encode":
        tokenizer.encode(images)
    else:
        count = tokenizer.most_codes // (3 if isinstance(tokenizer, adapters.Lavit) else 1)
        rows = list(torch.randint(0, tokenizer.codebook_size, (batch, count)))
        codes = VisualCodes.from_list(rows, codebook_size=tokenizer.codebook_size)
        tokenizer.decode(codes, [torch.Generator().manual_seed(i) for i in range(batch)])
    return found | {"run_gib": peak(), "batch": batch}

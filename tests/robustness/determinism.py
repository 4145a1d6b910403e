"""The shipped tokenizer's codes of the same images, under everything that must not matter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustness.process import Outcome, fork
from robustness.small import Workshop, image

BLOCK, BLOCKS = 500, 4  # images per trial, and trials of other images per variant


def trial(work: Workshop, number: int, block: int = BLOCK, variant: str = "") -> Outcome:
    """One variant on one block of images."""
    variant = variant or [*VARIANTS][number % len(VARIANTS)]
    numbers = range(start := number // len(VARIANTS) * BLOCK, start + block)
    expected, path = work.folder / f"codes-{start}-{block}", work.folder / "codes-again"
    if not expected.exists():
        done = fork(lambda: write(expected, encode(numbers)), limit_s=300)
        assert done.code == 0, done.err
    done = fork(lambda: write(path, VARIANTS[variant](numbers)), limit_s=300)
    failure = done.complaint
    if failure is None:
        pairs = zip(*(p.read_text().splitlines() for p in (expected, path)), strict=True)
        wrong = sum(first != second for first, second in pairs)
        failure = f"{wrong} of {block} images have other codes" if wrong else None
    return Outcome(variant, failure, done.seconds, done.mb, tried=block)


def encode(numbers: Any, batch: int = 32, threads: int = 1) -> dict[int, list[int]]:
    from lavit_tok import VisualTokenizer

    torch.set_num_threads(threads)
    tokenizer, codes = VisualTokenizer.from_pretrained("selected"), {}
    for at in range(0, len(numbers), batch):
        some = [int(i) for i in numbers[at : at + batch]]
        images = [image(i, 40 + i % 90, 100 - i % 60) for i in some]  # resizing is part of it
        codes |= dict(zip(some, tokenizer.encode(images).to_list(), strict=True))
    return codes


def write(path: Path, codes: dict[int, list[int]]) -> None:
    path.write_text("".join(f"{codes[i]}\n" for i in sorted(codes)))


def _inside(context: Callable[[], Any]) -> Callable[[Any], Any]:
    def inside(numbers: Any) -> Any:
        with context():
            return encode(numbers)

    return inside


@contextmanager
def _default(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)  # the child ends with it
    yield


def _worker(method: str) -> Callable[[Any], Any]:
    def worker(numbers: Any) -> Any:
        with multiprocessing.get_context(method).Pool(1) as pool:
            return pool.apply(encode, (numbers,))

    return worker


VARIANTS: dict[str, Callable[[Any], dict[int, list[int]]]] = {
    **{f"batches of {n}": lambda numbers, n=n: encode(numbers, n) for n in (1, 7, 64)},
    "another order": lambda numbers: encode(np.random.default_rng(0).permutation(numbers)),
    "two threads": lambda numbers: encode(numbers, threads=2),
    "inference mode": _inside(torch.inference_mode),
    "autocast": _inside(lambda: torch.autocast("cpu", torch.bfloat16)),
    "default dtype bfloat16": _inside(lambda: _default(torch.bfloat16)),
    "default dtype float64": _inside(lambda: _default(torch.float64)),
    "a forked worker": _worker("fork"),
    "a spawned worker": _worker("spawn"),
}

"""Resumable stages: a run that was stopped continues when the same command is given again.

    out/.NAME-KEY/joblib/...    finished stages, by joblib.Memory, until the result is written

KEY is a digest of what the numbers depend on: options, weights, images, code, package versions. A
stage may depend on its name and these contents alone, not on the stages before it: a resumed run
then gives exactly the numbers of an uninterrupted one.
"""

import hashlib
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import joblib
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.shared import provenance

T = TypeVar("T")


class Stages:
    """The finished stages of one run.

    Args:
        args: the command line; all of it is part of the key, but --out and --threads.
        contents: weights, tensors and values that the numbers depend on, see `digest`.
    """

    def __init__(self, args: Namespace, name: str, *contents: Any) -> None:
        options = {k: str(v) for k, v in vars(args).items() if k not in ("out", "threads")}
        code, threads = provenance.code_digest(), torch.get_num_threads()
        self.key = digest(options, code, provenance.versions(), threads, *contents)
        self.folder = args.out / f".{name}-{self.key}"
        finished = len(list(self.folder.rglob("output.pkl")))
        if finished:
            print(f"{name}: continuing from {finished} finished stages", flush=True)
        self._cached = joblib.Memory(self.folder, verbose=0).cache(_stage, ignore=["compute"])

    def __call__(self, stage: str, compute: Callable[[], T]) -> T:
        """compute()'s value, or the one that an earlier run kept."""
        return self._cached(self.key, stage, compute)

    def batches(
        self, stage: str, items: Sequence[int], size: int, compute: Callable[[list[int]], T]
    ) -> list[T]:
        """compute() of each batch of the items, every batch a stage of its own."""
        parts = [list(items[start : start + size]) for start in range(0, len(items), size)]
        bar = progress(parts, stage)
        return [self(f"{stage} {digest(part)}", partial(compute, part)) for part in bar]

    def tensors(
        self, stage: str, items: Sequence[int], size: int, compute: Callable[[list[int]], Any]
    ) -> dict[str, Tensor]:
        """The tensors of all batches, one after another; not every batch needs every name."""
        parts = self.batches(stage, items, size, compute)
        names = dict.fromkeys(name for part in parts for name in part)
        return {n: torch.cat([part[n] for part in parts if n in part]) for n in names}

    def done(self) -> None:
        """Remove the stages: the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _stage(key: str, stage: str, compute: Callable[[], T]) -> T:
    return compute()


def progress(items: Iterable[T], label: str) -> Iterable[T]:
    """The items, with a progress bar on stderr if that is a terminal."""
    return tqdm(items, desc=label, disable=None, leave=False, dynamic_ncols=True)


def digest(*contents: Any) -> str:
    """12 hexadecimal digits of modules and pipelines (their weights), tensors and plain values."""
    return str(joblib.hash([_plain(content) for content in contents]))[:12]


def _plain(content: Any) -> Any:
    """The content in a form whose pickle is the same in every process, unlike that of a tensor."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    elif hasattr(content, "components"):  # a pipeline of diffusers
        content = {k: v for k, v in content.components.items() if isinstance(v, nn.Module)}
    if isinstance(content, dict):
        return {str(name): _plain(value) for name, value in content.items()}
    if isinstance(content, Tensor):
        flat = content.detach().cpu().contiguous().flatten()
        return str(content.dtype), list(content.shape), flat.view(torch.uint8).numpy()
    return content


def generator_for(*key: Any) -> torch.Generator:
    """A generator for each (purpose, seed, item): the same whatever the batch, subset or order."""
    number = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1
    return torch.Generator().manual_seed(number)

"""What the trainings share: learning-rate shape, repeatable chance, logged numbers and pictures."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Shaped
from PIL import Image
from torch import Tensor, nn


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the peak rate: linear from 0 over `warmup` steps, then a half cosine down to `floor` at `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def step_generator(seed: int, step: int, rank: int, device: torch.device | str) -> torch.Generator:
    """A generator that depends on nothing but its arguments, so a resumed step draws what it would have drawn."""
    mixed = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(mixed >> np.uint64(1)))


def log_image(module: pl.LightningModule, name: str, image: Image.Image) -> Path | None:
    """Save a picture under the run's log directory and hand it to a TensorBoard logger where there is one."""
    path = _log_directory(module.trainer) / "images" / f"{name}-{module.global_step:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    for logger in module.loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_image"):
            writer.add_image(name, np.asarray(image), module.global_step, dataformats="HWC")
    return path


def log_text(module: pl.LightningModule, name: str, text: str) -> Path:
    """Save a text of Markdown, as log_image does a picture, under `texts`."""
    path = _log_directory(module.trainer) / "texts" / f"{name}-{module.global_step:07d}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    for logger in module.loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_text"):
            writer.add_text(name, text, module.global_step)
    return path


def _log_directory(trainer: Any) -> Path:
    """Trainer.log_dir, which waits for all processes to ask for it, without that: often one process alone logs."""
    first = trainer.loggers[0] if trainer.loggers else None
    return Path(
        getattr(first, "log_dir", None)
        or getattr(first, "save_dir", None)
        or trainer.default_root_dir
    )


class Recent(nn.Module):
    """The latest rows of a stream, in a buffer, so that a checkpoint holds them.

        size 4, after rows 1 2 3 and then 4 5:    5 2 3 4    latest() is all of them, oldest overwritten first

    Args:
        size: how many rows are held.
        shape: of one row; () for numbers.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, size: int, *shape: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, *shape))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, rows: Shaped[Tensor, "n *shape"]) -> None:
        """Overwrite the oldest rows by these."""
        size = len(self.rows)
        rows = rows[-size:].to(self.rows.dtype)
        self.rows[(self.seen + torch.arange(len(rows), device=self.rows.device)) % size] = rows
        self.seen += len(rows)

    def latest(self) -> Shaped[Tensor, "n *shape"]:
        """The rows held, in no particular order."""
        return self.rows[: min(len(self.rows), int(self.seen))]


class PrintMetrics(pl.Callback):
    """One plain line of the latest numbers now and then: what a log file wants instead of a progress bar.

    Args:
        every: training steps between two lines.
    """

    def __init__(self, every: int = 50) -> None:
        self.every, self.started = every, time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.is_global_zero:
            values = " ".join(
                f"{name} {float(value):.4f}" for name, value in trainer.callback_metrics.items()
            )
            seconds = time.monotonic() - self.started
            print(
                f"step {trainer.global_step} of {trainer.max_steps} after {seconds:.0f} s: {values}",
                flush=True,
            )

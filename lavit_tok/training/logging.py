"""What trainers log: images, texts and printed numbers; and generators that repeat on resume."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image


@dataclass(frozen=True)
class SampleConfig:
    """Logged samples of the decoder in training."""

    every: int = 1000
    """Steps between two sheets of samples; 0 for none."""
    count: int = 8
    """Images on a sheet."""
    steps: int = 25
    """Denoising steps per sample."""
    guidance: float = 3.0
    """Guidance scale of the samples."""

    def due(self, step: int) -> bool:
        """Whether samples are logged after this step."""
        return self.every > 0 and step % self.every == 0


def step_generator(seed: int, step: int, rank: int, device: torch.device | str) -> torch.Generator:
    """A generator that is a pure function of its arguments, so a resumed step repeats its draws."""
    mixed = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(mixed >> np.uint64(1)))


def log_image(module: pl.LightningModule, name: str, image: Image.Image) -> Path:
    """Save an image under `images` in the log directory, and log it to TensorBoard if in use."""
    path = _log_path(module, f"images/{name}", ".png")
    image.save(path)
    for logger in module.loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_image"):
            writer.add_image(name, np.asarray(image), module.global_step, dataformats="HWC")
    return path


def log_text(module: pl.LightningModule, name: str, text: str) -> Path:
    """Save Markdown under `texts` in the log directory, and log it to TensorBoard if in use."""
    path = _log_path(module, f"texts/{name}", ".md")
    path.write_text(text, encoding="utf-8")
    for logger in module.loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_text"):
            writer.add_text(name, text, module.global_step)
    return path


def _log_path(module: pl.LightningModule, name: str, suffix: str) -> Path:
    # Not Trainer.log_dir: it broadcasts between processes, and often only one of them logs.
    trainer: Any = module.trainer
    first = trainer.loggers[0] if trainer.loggers else None
    folder = getattr(first, "log_dir", None) or getattr(first, "save_dir", None)
    path = Path(folder or trainer.default_root_dir) / f"{name}-{module.global_step:07d}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class PrintMetrics(pl.Callback):
    """Prints the latest metrics on one line, in place of a progress bar.

    Args:
        every: training steps between two lines.
    """

    def __init__(self, every: int = 50) -> None:
        self.every, self.started = every, time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.is_global_zero:
            metrics = " ".join(
                f"{name} {float(value):.4f}" for name, value in trainer.callback_metrics.items()
            )
            seconds = time.monotonic() - self.started
            print(
                f"step {trainer.global_step} of {trainer.max_steps} after {seconds:.0f} s: "
                f"{metrics}",
                flush=True,
            )

"""What trainers log: images, texts and progress; and generators that repeat on resume."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
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
    """Save an image under `images` in the log directory; log it to TensorBoard or W&B if in use."""
    path = _log_path(module, f"images/{name}", ".png")
    image.save(path)
    for logger in module.loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_image"):
            writer.add_image(name, np.asarray(image), module.global_step, dataformats="HWC")
        elif hasattr(logger, "log_image"):  # WandbLogger
            logger.log_image(name, [image], step=module.global_step)
    return path


def log_text(module: pl.LightningModule, name: str, text: str) -> Path:
    """Save Markdown under `texts` in the log directory; log it to TensorBoard or W&B if in use."""
    path = _log_path(module, f"texts/{name}", ".md")
    path.write_text(text, encoding="utf-8")
    for logger in module.loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_text"):
            writer.add_text(name, text, module.global_step)
        elif hasattr(logger, "log_text"):  # WandbLogger
            logger.log_text(name, columns=["text"], data=[[text]], step=module.global_step)
    return path


def _log_path(module: pl.LightningModule, name: str, suffix: str) -> Path:
    # Not Trainer.log_dir: it broadcasts between processes, and often only one of them logs.
    trainer: Any = module.trainer
    first = trainer.loggers[0] if trainer.loggers else None
    folder = getattr(first, "log_dir", None) or getattr(first, "save_dir", None)
    path = Path(folder or trainer.default_root_dir) / f"{name}-{module.global_step:07d}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Speed:
    """Images per second over the latest steps, and the time left."""

    def __init__(self, steps: int = 50) -> None:
        self._times: deque[tuple[int, float]] = deque(maxlen=steps + 1)

    def texts(self, trainer: pl.Trainer) -> dict[str, str]:
        """To be called after every batch. {"images/s": "41.2", "left": "0:03:10"} or less."""
        self._times.append((trainer.global_step, time.monotonic()))
        (first, start), (last, end) = self._times[0], self._times[-1]
        if last == first:
            return {}
        rate = (last - first) / max(1e-9, end - start)
        images = getattr(getattr(trainer, "datamodule", None), "batch_size", 0)
        images *= trainer.world_size * int(trainer.accumulate_grad_batches)
        name = getattr(trainer.lightning_module, "batched", "images")
        texts = {f"{name}/s": f"{rate * images:.1f}"} if images else {}
        if trainer.max_steps > 0:
            left = int((trainer.max_steps - last) / rate)
            texts["left"] = str(timedelta(seconds=left))
        return texts


def progress_bar() -> pl.Callback:
    """Lightning's bar of rich, or of tqdm where rich is not installed, over the steps of a run.

    It shows loss, cosine, codes per image, images/s and time left.
    """
    name = "RichProgressBar" if find_spec("rich") else "TQDMProgressBar"
    base: Any = getattr(pl.callbacks, name)
    shown = ("loss", "cosine", "codes_per_image", "text", "image", "commitment")

    class StepBar(base):
        """One bar for the run, not one for each epoch: epochs of small data have a few steps."""

        def __init__(self) -> None:
            super().__init__()
            self.speed, self.started = Speed(), False
            self.texts: dict[str, str] = {}

        @property
        def total_train_batches(self) -> int | float:
            if self.trainer.max_steps < 1:
                return super().total_train_batches
            return self.trainer.max_steps * int(self.trainer.accumulate_grad_batches)

        def _get_train_description(self, current_epoch: int) -> str:
            return "training"

        def on_train_epoch_start(self, *args: Any) -> None:
            if not self.started:
                super().on_train_epoch_start(*args)
            self.started = True

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.texts = self.speed.texts(trainer)
            done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
            super().on_train_batch_end(trainer, module, outputs, batch, done - 1)

        def get_metrics(self, trainer: Any, module: Any) -> Any:
            values = {n: trainer.callback_metrics.get(f"train/{n}") for n in shown}
            texts = {n: f"{float(value):.3f}" for n, value in values.items() if value is not None}
            return {**texts, **self.texts}

    return StepBar()


class PrintMetrics(pl.Callback):
    """Prints the latest metrics on one line, where the output is no terminal with a progress bar.

    Args:
        every: training steps between two lines.
    """

    def __init__(self, every: int = 50) -> None:
        self.every, self.started, self.speed = every, time.monotonic(), Speed()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        texts = self.speed.texts(trainer)
        if trainer.global_step % self.every == 0 and trainer.is_global_zero:
            metrics = " ".join(
                f"{name} {float(value):.4f}" for name, value in trainer.callback_metrics.items()
            )
            speed = "".join(f", {name} {text}" for name, text in texts.items())
            seconds = time.monotonic() - self.started
            print(
                f"step {trainer.global_step} of {trainer.max_steps} after {seconds:.0f} s{speed}: "
                f"{metrics}",
                flush=True,
            )

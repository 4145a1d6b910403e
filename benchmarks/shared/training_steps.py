"""Steps of a Lightning run, timed; the baseline's step follows each of them on the same batch."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch.utils.benchmark import timer


class TimedSteps(pl.Callback):
    """Seconds of each training step with its data, and of the baseline's steps between them.

    Args:
        baseline: step(batch), called after each of Lightning's steps.
    """

    def __init__(self, baseline: Callable[[Any], Any]) -> None:
        self.baseline = baseline
        self.seconds: tuple[list[float], list[float]] = ([], [])

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start the clock."""
        self._since = timer()

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, *_: Any) -> None:
        """The time between two of the baseline's steps is Lightning's."""
        start = timer()
        self.baseline(batch)
        self.seconds[0].append(start - self._since)
        self._since = timer()
        self.seconds[1].append(self._since - start)


def fit(module: Any, data: Any, steps: int, device: str, *callbacks: Any) -> None:
    """Train for `steps` steps without files, progress bars or warnings about few workers."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    kind, _, index = device.partition(":")
    devices: Any = {"accelerator": "cpu", "devices": 1}
    if kind == "cuda":
        devices = {"accelerator": "gpu", "devices": [int(index or 0)]}
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {**dict.fromkeys(silent, False), "limit_val_batches": 0, **devices}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options |= {"max_steps": steps, "max_epochs": -1, "gradient_clip_val": 1.0}
        pl.Trainer(callbacks=[*callbacks], **options).fit(module, data)

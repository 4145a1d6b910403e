"""Steps of a Lightning run, timed; the baseline's step follows each of them on the same batch."""

import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch.utils.benchmark import Measurement, timer

from benchmarks.shared.timing import measurement

OURS = "lavit-tok"


class TimedSteps(pl.Callback):
    """Seconds of each training step with its data, and of the baselines' steps between them.

    Args:
        baselines: name -> step(batch), called after each of Lightning's steps.
        after_step: called with (module, outputs, batch) after each of Lightning's steps.
    """

    def __init__(
        self,
        baselines: dict[str, Callable[[Any], Any]] | None = None,
        after_step: Callable[[Any, Any, Any], None] = lambda *_: None,
    ) -> None:
        self.baselines, self.after_step = baselines or {}, after_step
        self.seconds: dict[str, list[float]] = {name: [] for name in (OURS, *self.baselines)}
        self._since = 0.0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start the clock."""
        self._since = timer()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """What lies between two of the baselines' steps is Lightning's."""
        self.seconds[OURS].append(timer() - self._since)
        self.after_step(module, outputs, batch)
        for name, step in self.baselines.items():
            start = timer()
            step(batch)
            self.seconds[name].append(timer() - start)
        self._since = timer()

    def measurements(self, warm: int) -> dict[str, Measurement]:
        """Times without the first `warm` steps."""
        return {name: measurement(name, found[warm:]) for name, found in self.seconds.items()}


def fit(module: Any, data: Any, steps: int, device: str, *callbacks: Any, **options: Any) -> None:
    """Train for `steps` steps without checkpoints, progress bars or warnings about few workers."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    kind, _, index = device.partition(":")
    defaults: dict[str, Any] = {
        "accelerator": "gpu" if kind == "cuda" else "cpu",
        "devices": [int(index or 0)] if kind == "cuda" else 1,
        "max_steps": steps,
        "max_epochs": -1,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {**defaults, "default_root_dir": folder, **options}
        pl.Trainer(callbacks=list(callbacks), **options).fit(module, data)

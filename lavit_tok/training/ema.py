"""EMATraining: a trainer whose result is the moving average of the trained parameters.

    step t:  average <- d average + (1 - d) parameters,   d = min(ema_decay, (1 + t) / (10 + t))

The averages are part of the checkpoint, are used for validation, and are what is exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.training_utils import EMAModel

from lavit_tok.training.base import TrainingModule


class EMATraining(TrainingModule):
    """A subclass creates its trained parameters, then calls `start_average`."""

    ema: EMAModel

    def start_average(self, decay: float) -> None:
        """Start the averages of all trained parameters.

        Args:
            decay: largest decay of the averages; the first steps use smaller ones.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_decay: expected a number in 0..1, got {decay}")
        self.ema = EMAModel(self.trained, decay=decay, foreach=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters hold their averages."""
        self._use_average()
        try:
            yield
        finally:
            self.ema.restore(self.trained)

    def _use_average(self) -> None:
        self.ema.to(self.device)
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)

    # Lightning hooks

    def on_fit_start(self) -> None:
        self.ema.to(self.device)

    def on_validation_epoch_start(self) -> None:
        self._use_average()

    def on_validation_epoch_end(self) -> None:
        self.ema.restore(self.trained)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.step(self.trained)  # after the step of AdamW, not after every batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.ema.load_state_dict(checkpoint["ema"])

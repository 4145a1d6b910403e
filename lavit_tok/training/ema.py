"""What trainings of pixel decoders share: AdamW under a cosine, and moving averages of what is trained.

    step t:  average <- d average + (1 - d) parameters,   d = min(ema_decay, (1 + t) / (10 + t))

The averages are part of the checkpoint, validation sees them in the parameters' places, and they are what is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from lavit_tok.training.logging import warmup_cosine


class AveragedTraining(pl.LightningModule):
    """A training of which the averaged weights come out.

    A subclass sets `settings` (lr, warmup_steps, weight_decay, betas, ema_decay) and its trained parts, then calls
    `average_trained`.
    """

    settings: Any
    ema: EMAModel

    def average_trained(self) -> None:
        """Begin the averages of all parameters that are trained."""
        self.ema = EMAModel(self.trained, decay=self.settings.ema_decay, foreach=True)

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.parameters() if p.requires_grad]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold their moving averages."""
        self._swap_in()
        try:
            yield
        finally:
            self.ema.restore(self.trained)

    def _swap_in(self) -> None:
        self.ema.to(self.device)
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)

    # Lightning's hooks

    def on_fit_start(self) -> None:
        self.ema.to(self.device)

    def on_validation_epoch_start(self) -> None:
        self._swap_in()

    def on_validation_epoch_end(self) -> None:
        self.ema.restore(self.trained)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.step(self.trained)

    def configure_optimizers(self) -> Any:
        """AdamW, decay on matrices and kernels only; linear warm-up, then a cosine to 0."""
        s = self.settings
        groups = [
            {"params": [p for p in self.trained if p.ndim >= 2], "weight_decay": s.weight_decay},
            {"params": [p for p in self.trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=tuple(s.betas))
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, total, s.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.ema.load_state_dict(checkpoint["ema"])

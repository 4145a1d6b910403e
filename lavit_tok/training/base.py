"""TrainingModule: what the trainers of both packages have in common."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lavit_tok.training.frozen import drop_frozen, restore_frozen
from lavit_tok.training.optimizers import (
    OptimizerConfig,
    ScheduleConfig,
    parameter_groups,
    scheduled,
)


class TrainingModule(pl.LightningModule):
    """A LightningModule that is trained by AdamW and leaves frozen weights out of checkpoints.

    A subclass sets `optimizer_config` and `schedule_config`, has `export`, and overrides
    `parameter_groups`, `learning_rate_factor` or `frozen_names` where they differ.
    """

    kind = "model"
    """What a run saves, as its last line names it."""
    out: str | None = None
    """Where it is saved."""
    optimizer_config: OptimizerConfig
    schedule_config: ScheduleConfig

    def save_arguments(self, *ignore: str) -> None:
        """Save the arguments of `__init__` as hyperparameters, config records as plain dicts.

        Plain dicts because a checkpoint that holds other classes is refused by
        `torch.load(weights_only=True)`.
        """
        frame: Any = inspect.currentframe()
        self.save_hyperparameters(ignore=list(ignore), frame=frame.f_back)
        for name, value in list(self.hparams.items()):
            if is_dataclass(value) and not isinstance(value, type):
                self.hparams[name] = asdict(value)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that are trained."""
        return [p for p in self.parameters() if p.requires_grad]

    @property
    def num_processes(self) -> int:
        """Processes that train together; 1 without a trainer."""
        return 1 if self._trainer is None else self.trainer.world_size

    def micro_step(self, batch_idx: int) -> int:
        """Number of the batch since the start of training; accumulated steps have several."""
        accumulated = int(self.trainer.accumulate_grad_batches)
        return self.global_step * accumulated + batch_idx % accumulated

    def completes_step(self, batch_idx: int) -> bool:
        """Whether this batch is the last of its accumulated step."""
        return (batch_idx + 1) % int(self.trainer.accumulate_grad_batches) == 0

    def require_finite(self, loss: Tensor) -> None:
        """Raise ValueError for a loss that would spoil the weights."""
        if not bool(loss.isfinite()):
            raise ValueError(
                f"step {self.global_step}: expected a finite loss, got {float(loss)}; stopped "
                "before the weights are updated"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups of AdamW."""
        return parameter_groups(self.trained, self.optimizer_config.weight_decay)

    def learning_rate_factor(self, step: int, total: int) -> float:
        """Factor on the peak learning rates at a step of a run of `total` steps."""
        return self.schedule_config.factor(step, total)

    def frozen_names(self) -> Iterable[str]:
        """Names in `state_dict()` that checkpoints leave out."""
        return ()

    def not_saved(self) -> str | None:
        """Why nothing was saved at the end of `fit`; None if it was."""
        return None if self.out else "model.out is not set"

    def next_command(self) -> str:
        """The command line that uses what was saved, or an empty string."""
        return ""

    def shards_command(self, tokenizer: str) -> str:
        """The command line that makes shards of the training's data set."""
        data = getattr(self.trainer.datamodule, "data", "DATASET")
        return f"lavit-tok shards {data} --tokenizer {tokenizer} --out runs/lm/shards"

    def outcome(self) -> str:
        """The last line of a run: what was saved and the next command, or why nothing was."""
        reason = self.not_saved()
        if reason is None:
            following = self.next_command()
            return f"wrote the {self.kind} to {self.out}" + (following and f"; next: {following}")
        folder = Path(self.trainer.default_root_dir)
        return f"no {self.kind} saved: {reason}; checkpoints and logs are in {folder}"

    def configure_optimizers(self) -> Any:
        """AdamW with one factor on all learning rates, updated every step."""
        total = int(self.trainer.estimated_stepping_batches)
        return scheduled(
            self.parameter_groups(),
            self.optimizer_config,
            lambda step: self.learning_rate_factor(step, total),
        )

    def on_fit_end(self) -> None:
        if self.out and self.not_saved() is None and self.trainer.is_global_zero:
            self.export(self.out)

    def export(self, directory: str | Path) -> None:
        """Save what was trained."""
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        drop_frozen(checkpoint, self.frozen_names())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_frozen(checkpoint, self, self.frozen_names())

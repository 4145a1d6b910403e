"""Command line and learning-rate schedule of the default model's training recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from torch.optim.lr_scheduler import LambdaLR

from lavit_tok.training.checkpoints import AtomicCheckpointIO
from lavit_tok.training.logging import PrintMetrics
from lavit_tok.training.optimizers import ScheduleConfig


class RecipeCLI(LightningCLI):
    """LightningCLI with `--out`, the folder of results, checkpoints and logs, and `--threads`.

    `--ckpt_path last` resumes from `OUT/checkpoints/last.ckpt`, or starts anew if there is none.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out", type=str, required=True, help="folder of results, checkpoints and logs"
        )
        parser.add_argument(
            "--threads", type=int, default=0, help="torch threads; 0 for torch's default"
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(PrintMetrics, "print")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_top_k": 1})
        parser.link_arguments(
            "out", "checkpoint.dirpath", compute_fn=lambda out: str(Path(out) / "checkpoints")
        )
        parser.link_arguments("out", "trainer.default_root_dir")
        parser.link_arguments(
            "out", "model.init_args.out" if self.subclass_mode_model else "model.out"
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With checkpoints that are whole whenever the run is killed."""
        return super().instantiate_trainer(plugins=[AtomicCheckpointIO()], **kwargs)

    def before_instantiate_classes(self) -> None:
        threads = self.config[self.subcommand].threads if self.subcommand else self.config.threads
        if threads:
            torch.set_num_threads(threads)


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> dict:
    """Lightning's config of a per-step schedule: linear warmup, then a cosine to 1% of the peak."""
    schedule = ScheduleConfig(warmup, min_lr_ratio=0.01)
    scheduler = LambdaLR(optimizer, lambda step: schedule.factor(step, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

"""What the default model's training recipes share: their command line and their learning-rate schedule."""

from __future__ import annotations

from pathlib import Path

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from torch.optim.lr_scheduler import LambdaLR

from lavit_tok.training import logging
from lavit_tok.training.logging import PrintMetrics


class RecipeCLI(LightningCLI):
    """LightningCLI with `--out`, the folder of results, checkpoints and logs, and `--threads` for laptops.

    `--ckpt_path last` continues from `OUT/checkpoints/last.ckpt`, or starts afresh where there is none.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out", type=str, required=True, help="folder of results, checkpoints and logs"
        )
        parser.add_argument(
            "--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice"
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

    def before_instantiate_classes(self) -> None:
        threads = self.config[self.subcommand].threads if self.subcommand else self.config.threads
        if threads:
            torch.set_num_threads(threads)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup: int, total: int, floor: float = 0.01
) -> dict:
    """Lightning's record of a per-step schedule: linear up for `warmup` steps, then a cosine to `floor` at `total`."""

    def factor(step: int) -> float:
        return logging.warmup_cosine(step, total, warmup, floor)

    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
    }

"""Tokens/s and MFU of a training, logged beside its losses.

    tokens, FLOPs of each batch, time of each step  ->  train/tokens_per_s, train/mfu

MFU (model FLOPs utilization; PaLM, Chowdhery et al. 2022, appendix B) is the ratio of the FLOP/s
that the model needs to those that the device can do at best. Needed are, for each token, 2 FLOPs a
weight forward, 2 for the gradient of the inputs and 2 for that of a trained weight (frozen weights
have none), and attention to a whole block. Not counted are padding, what gradient checkpointing
computes again, and the encoder and bridge of images; so MFU is a lower limit.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.throughput import get_available_flops
from torch import nn

from lavit_lm.models.encoder_decoder import PrefixSeq2Seq
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.sequences.packing import PADDING, PackedBatch


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a training step: for each token, and for each target that the output layer has."""

    token: int
    target: int

    @classmethod
    def of(cls, model: SequenceModel, length: int) -> TrainingFlops | None:
        """Those of an LM on blocks of so many positions.

        With a restricted softmax the output layer is left out, since only a part of it is computed.
        None for an encoder-decoder, in which tokens differ in the layers that they pass.
        """
        if isinstance(model, PrefixSeq2Seq):
            return None
        config: Any = model.causal.config.get_text_config()
        output = model.causal.get_output_embeddings()
        layers = [m for m in model.causal.base_model.modules() if isinstance(m, nn.Linear)]
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        # Scores and sums of values, forward and twice as much backward
        attention = 3 * 4 * config.num_hidden_layers * width * length
        return cls(
            sum(map(_linear, layers)) + attention,
            0 if model.restricted is not None else _linear(output),
        )

    def batch(self, batch: PackedBatch) -> int:
        """FLOPs of a batch."""
        return self.token * tokens(batch) + self.target * int(batch.predict.sum())


def _linear(layer: Any) -> int:
    return layer.weight.numel() * (6 if layer.weight.requires_grad else 4)


def tokens(batch: PackedBatch) -> int:
    """Positions that are not padding: of text, codes and vectors."""
    return int((batch.documents != PADDING).sum())


class LogThroughput(pl.Callback):
    """Logs `train/tokens_per_s`, of all processes, and `train/mfu`, a ratio from 0 to 1.

    Both are of the latest steps. Validation does not count; waiting for data and writing
    checkpoints do. All processes are taken to have as many tokens as this one.

    Args:
        peak_tflops: TFLOP/s of a device at the precision of the training. By default those of
            Lightning's table of GPUs; for a device that is not in it, such as a CPU, MFU is not
            logged.
        steps: over how many of the latest steps.
    """

    def __init__(self, peak_tflops: float | None = None, steps: int = 50) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"peak_tflops: expected a positive number, got {peak_tflops}")
        self.peak = None if peak_tflops is None else 1e12 * peak_tflops
        self.flops: TrainingFlops | None = None
        self.done: deque[tuple[float, int, int]] = deque(maxlen=steps + 1)
        self.tokens = self.batch_flops = 0
        self.paused, self.pause = 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Count the FLOPs of a token, and look up those of the device."""
        self.done.clear()
        self.flops = TrainingFlops.of(module.model, trainer.datamodule.block)
        if self.peak is None and trainer.strategy.root_device.type == "cuda":
            self.peak = get_available_flops(trainer.strategy.root_device, _dtype(trainer))

    def on_validation_start(self, *_: Any) -> None:
        """Stop the clock."""
        self.paused = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        """Start it again."""
        self.pause += time.perf_counter() - self.paused

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Count a batch; after the last of a step, log."""
        self.tokens += tokens(batch)
        self.batch_flops += 0 if self.flops is None else self.flops.batch(batch)
        if not module.completes_step(batch_idx):
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.done.append((time.perf_counter() - self.pause, self.tokens, self.batch_flops))
        values = {"tokens_per_s": self.tokens_per_s * trainer.world_size, "mfu": self.mfu}
        for name, value in values.items():
            if value:
                module.log(f"train/{name}", value, batch_size=1, rank_zero_only=True)

    @property
    def tokens_per_s(self) -> float:
        """Of this process; 0 before two steps."""
        return self._rate(1)

    @property
    def mfu(self) -> float | None:
        """Of this process's device; None where its peak or the model's FLOPs are not known."""
        return None if self.peak is None or self.flops is None else self._rate(2) / self.peak

    def _rate(self, what: int) -> float:
        if len(self.done) < 2:
            return 0.0
        first, last = self.done[0], self.done[-1]
        return (last[what] - first[what]) / (last[0] - first[0])


def _dtype(trainer: pl.Trainer) -> torch.dtype:
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32

"""AdamW, its parameter groups and the learning-rate schedule, for all trainers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay of matrices and convolution kernels; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the running mean of gradients and of their squares."""


@dataclass(frozen=True)
class ScheduleConfig:
    r"""Learning rate: linear warm-up, then half a cosine.

    1      /\
          /  \_
    0    /      \__ min_lr_ratio
    """

    warmup_steps: int = 100
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.0
    """Fraction of the peak learning rate at which the cosine ends."""

    def factor(self, step: int, total: int) -> float:
        """Factor on the peak learning rate at a step of a run of `total` steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)  # + 1: the first step already learns
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine


def parameter_groups(
    parameters: Iterable[Tensor], weight_decay: float, **options: Any
) -> list[dict[str, Any]]:
    """AdamW groups: weight decay for matrices and kernels, none for vectors and scalars.

    Args:
        parameters: the parameters to train.
        weight_decay: weight decay of those with two or more dimensions.
        options: further options of both groups, e.g. `lr`.
    """
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, **options},
        {"params": vectors, "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    groups: list[dict[str, Any]], config: OptimizerConfig, factor: Callable[[int], float]
) -> dict[str, Any]:
    """AdamW with a per-step factor on its learning rates, as `configure_optimizers` returns it."""
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

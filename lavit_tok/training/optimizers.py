"""AdamW, Muon, their parameter groups and the learning-rate schedule, for all trainers."""

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


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameter groups and AdamW for all others, as one optimizer.

    torch.optim.Muon (Jordan et al., 2024) takes matrices only. Its updates are scaled to the size
    of AdamW's, so that both share a learning rate.

    Args:
        groups: parameter groups; those with a true "muon" hold hidden matrices only.
        lr: learning rate of groups without one.
        betas: AdamW's decay rates.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        muon = [group for group in groups if group.get("muon")]
        others = [group for group in groups if not group.get("muon")]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(muon, lr=lr, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=betas),
        ]
        # The groups of the parts themselves: a schedule changes the learning rates of both
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of both."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def scheduled(
    groups: list[dict[str, Any]], config: OptimizerConfig, factor: Callable[[int], float]
) -> dict[str, Any]:
    """AdamW, and Muon for groups that request it, with a per-step factor on all learning rates.

    Returns: what Lightning's `configure_optimizers` returns.
    """
    kind = MuonWithAdamW if any(group.get("muon") for group in groups) else torch.optim.AdamW
    optimizer = kind(groups, lr=config.lr, betas=config.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

"""Frozen modules: no gradient, no optimizer state, not saved in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module")


class Frozen(Generic[Module]):
    """Holds a module (or pipeline) that a LightningModule uses and does not train.

    `Frozen` is not an nn.Module: assigned to an attribute of a LightningModule, its weights appear
    neither in `parameters()` nor in `state_dict()`, and DDP does not synchronize them. The owner
    moves it to its device by `to`.

    Args:
        module: an nn.Module, or any object with a `to` method.
    """

    def __init__(self, module: Module) -> None:
        if isinstance(module, nn.Module):
            module.requires_grad_(False)
        self.module = module

    def to(self, device: torch.device | str) -> None:
        """Move the module."""
        self.module.to(device)  # type: ignore[attr-defined]  # any module or pipeline


def drop_frozen(checkpoint: dict[str, Any], names: Iterable[str]) -> None:
    """Remove frozen weights, by name, from a checkpoint that is about to be saved."""
    for name in names:
        checkpoint["state_dict"].pop(name, None)


def restore_frozen(checkpoint: dict[str, Any], module: nn.Module, names: Iterable[str]) -> None:
    """Fill frozen weights into a loaded checkpoint, from the module as it was constructed."""
    names = list(names)
    if not names:
        return  # a sharded checkpoint of FSDP2 has no "state_dict": torch reads it into the modules
    weights = module.state_dict()
    checkpoint["state_dict"].update({name: weights[name] for name in names})

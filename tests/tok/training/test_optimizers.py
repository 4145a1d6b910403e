"""Muon and AdamW as one optimizer: each part steps as it would alone, also after a restart."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lavit_tok.training.optimizers import OptimizerConfig, parameter_groups, scheduled

CONFIG = OptimizerConfig(lr=0.01, betas=(0.9, 0.95))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    """The first matrix by Muon, all other parameters by AdamW."""
    first, *others = model.parameters()
    muon = {"params": [first], "lr": 0.01, "weight_decay": 0.1, "muon": True}
    return [muon, *parameter_groups(others, 0.1, lr=0.02)]


def steps(model: nn.Module, optimizers: list[Any], numbers: range) -> None:
    for number in numbers:
        torch.manual_seed(number)
        x = torch.randn(5, 4)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_each_part_steps_as_it_would_alone() -> None:
    model, plain = network(), network()
    optimizer = scheduled(groups(model), CONFIG, lambda step: 1.0)["optimizer"]
    muon, *others = groups(plain)
    del muon["muon"]
    alone = [
        torch.optim.Muon([muon], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=CONFIG.betas),
    ]
    steps(model, [optimizer], range(4))
    steps(plain, alone, range(4))
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert not torch.equal(next(model.parameters()), next(network().parameters()))


def test_a_restart_continues_exactly() -> None:
    def factor(step: int) -> float:
        return 1 / (step + 1)

    model = network()
    made = scheduled(groups(model), CONFIG, factor)
    schedule = made["lr_scheduler"]["scheduler"]
    for number in range(3):
        steps(model, [made["optimizer"]], range(number, number + 1))
        schedule.step()
    rates = [group["lr"] for group in made["optimizer"].param_groups]
    assert rates == [0.01 / 4, 0.02 / 4, 0.02 / 4], "the schedule changes both parts"
    again = network()
    again.load_state_dict(model.state_dict())
    other = scheduled(groups(again), CONFIG, factor)
    other["optimizer"].load_state_dict(copy.deepcopy(made["optimizer"].state_dict()))
    other["lr_scheduler"]["scheduler"].load_state_dict(schedule.state_dict())
    for each, parts in ((model, made), (again, other)):
        for number in range(3, 6):
            steps(each, [parts["optimizer"]], range(number, number + 1))
            parts["lr_scheduler"]["scheduler"].step()
    for ours, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, expected)

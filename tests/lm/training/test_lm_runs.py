"""Training in processes of their own: killed and resumed, several together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lm_runs import (
    SMALL,
    TOGETHER,
    Losses,
    data,
    module,
    saving,
    start,
    together,
    train_together,
    train_until_killed,
    trainer,
)

from lavit_lm import MultimodalLM
from lavit_lm.models.losses import LossSum
from lavit_lm.training.sampler import HeldOutSampler

LORA = {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
TIED = {"continuous": True, "visual_lr": 1e-3, "lm": {**SMALL, "tie_word_embeddings": True}}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As many as the other processes have: sums over more would be rounded in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_in_mid_run(folder: Path):
    """By SIGKILL, which no process can answer."""
    steps = 8
    whole = Losses()
    trainer(folder, steps, [whole]).fit(module(folder), data(folder))
    process, _ = start(train_until_killed, folder, folder / "losses.txt", steps, 0.1)
    output, waited = 0, time.monotonic()
    while output < 4 and time.monotonic() - waited < 120:
        time.sleep(0.05)
        output = (
            len((folder / "losses.txt").read_text().splitlines())
            if (folder / "losses.txt").exists()
            else 0
        )
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    lines = [line.split() for line in (folder / "losses.txt").read_text().splitlines()]
    assert 4 <= len(lines) < steps
    rest = Losses()
    trainer(folder, steps, [rest, saving(folder)]).fit(
        module(folder), data(folder), ckpt_path="last"
    )
    assert (
        rest.values == whole.values[-len(rest.values) :]
        and rest.keys == whole.keys[-len(rest.values) :]
    )
    assert [float(loss) for _, loss in lines] == whole.values[: len(lines)]
    assert len(rest.values) + len(lines) in (steps, steps + 1), (
        "at most the step that was being saved is made again"
    )


@pytest.mark.parametrize(
    ("strategy", "world", "settings"),
    [("ddp", 4, TIED), ("fsdp", 4, TIED), ("fsdp, one file", 2, LORA)],
    ids=["ddp", "fsdp", "fsdp-one-file-lora"],
)
def test_several_processes_are_one(
    strategy: str, world: int, settings: dict[str, Any], folder: Path
):
    """One of four is killed in the third step; two others continue, each with half of the batch."""
    images = str(folder / "pictures") if "continuous" in settings else None
    one, whole = Losses(), module(folder, **settings)
    trainer(folder, 4, [one], **TOGETHER).fit(whole, data(folder, images=images, batch_size=world))
    settings = settings | {"out": str(folder / "out")}
    assert together(world, train_together, folder, strategy, 1, 3, settings) == []
    for rank in range(world):
        lines = (folder / f"losses-{world}-{rank}").read_text().split()
        values = [float(loss) for loss in lines[1::2]]
        assert len(values) == 3 or rank != 1
        torch.testing.assert_close(values, one.values[: len(values)], atol=1e-5, rtol=0)
    rest = together(2, train_together, folder, strategy, world // 2, None, settings)
    left = len(rest[0][0])
    assert left in (1, 2), "only what was not saved is made again"
    for values, held_out, _ in rest:
        torch.testing.assert_close(values, one.values[-left:], atol=1e-5, rtol=0)
        torch.testing.assert_close(held_out[-1], one.held_out[-1], atol=1e-5, rtol=0)
    for number, (first, second) in enumerate(zip(rest[0][2], rest[1][2], strict=True)):
        assert (*first, *second) == one.keys[number - left], "half of the blocks each"
    made = MultimodalLM.from_pretrained(folder / "out", decoder=None)
    whole.save(folder / "whole")
    expected = MultimodalLM.from_pretrained(folder / "whole", decoder=None).model.state_dict()
    torch.testing.assert_close(dict(made.model.state_dict()), dict(expected), atol=1e-4, rtol=1e-3)
    assert (folder / "texts" / "captions-0000004.md").exists(), (
        "samples were logged without a change"
    )


def test_held_out_blocks_are_assigned_in_turn():
    """The image in HeldOutSampler."""
    blocks = [[(0, i)] for i in range(5)]
    first, second = HeldOutSampler(blocks, 0, 2), HeldOutSampler(blocks, 1, 2)
    assert list(first) == [blocks[0], blocks[2], blocks[4]] and list(second) == [
        blocks[1],
        blocks[3],
        [],
    ]
    assert (
        len(first) == len(second) == 3
        and list(HeldOutSampler(blocks)) == blocks
        and len(HeldOutSampler([])) == 0
    )


def test_counts_of_two_processes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The drawing in LanguageModeling._across_processes."""
    training: Any = module(folder)
    monkeypatch.setattr(type(training), "num_processes", 2)
    other = torch.tensor([[1.0, 1.0]])
    training.all_gather = lambda own: torch.stack([own, other])
    descend, shown = training._across_processes(
        {"text": LossSum(torch.tensor(6.0), torch.tensor(3))}
    )
    assert descend["text"].mean == 3 and shown["text"].mean == 7 / 4

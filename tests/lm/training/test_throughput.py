"""Tokens/s and MFU: the FLOPs that are counted are those of the kernels, and time is a step's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.lm_parts import losses, plain_sequence, processor_and_model
from helpers.lm_runs import SMALL_BART, data, module, trainer
from pytorch_lightning import Callback
from torch.utils.flop_counter import FlopCounterMode

from lavit_lm.objectives.davinci import DaVinci
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.packing import pack
from lavit_lm.training import throughput
from lavit_lm.training.throughput import LogThroughput, TrainingFlops, tokens
from lavit_tok.training.logging import PrintMetrics


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_a_step(family: str, frozen: bool) -> None:
    """Against the kernels that run, forward and backward; a padded batch needs fewer."""
    _, model = processor_and_model(family, kernel="eager")
    if frozen:  # as LoRA freezes matrices; the embeddings, to which a gradient flows, are trained
        for layer in model.causal.base_model.layers:
            layer.mlp.requires_grad_(False)
    length = 64
    whole = [[plain_sequence([5 + i for i in range(length)])] for _ in range(2)]
    batch = pack(whole, length, pad_id=0)
    flops = TrainingFlops.of(model, length)
    assert flops is not None
    with FlopCounterMode(display=False) as counter:
        (loss,) = (x.total for x in losses(model, LaVIT(), batch).values() if x.count)
        loss.backward()
    assert flops.batch(batch) == pytest.approx(counter.get_total_flops(), rel=0.01)
    half = [[plain_sequence([5] * (length // 2))] for _ in range(2)]
    assert tokens(pack(half, length, pad_id=0)) == length
    assert flops.batch(pack(half, length, pad_id=0)) < 0.51 * flops.batch(batch)


class Batches(Callback):
    """Records the tokens and targets of each batch; a batch takes 1 s, one of validation 100 s."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.validations = 0

    def perf_counter(self) -> float:
        return self.now

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self.now += 1
        self.tokens.append(tokens(batch))
        self.targets.append(int(batch.predict.sum()))

    def on_validation_batch_end(self, *_: Any) -> None:
        self.now += 100
        self.validations += 1


def test_tokens_over_time(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two batches a step; validation after every step, which does not count."""
    batches, log = Batches(), LogThroughput(peak_tflops=1e-6)
    monkeypatch.setattr(throughput, "time", batches)
    options = {"accumulate_grad_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": 0}
    run = trainer(folder, 4, [batches, log, PrintMetrics(every=4)], **options)
    run.fit(module(folder), data(folder))
    assert len(batches.tokens) == 8 and batches.validations >= 3
    assert log.tokens_per_s == sum(batches.tokens[2:]) / 6
    flops = TrainingFlops.of(run.lightning_module.model, 64)
    assert flops is not None and log.mfu is not None
    needed = flops.token * sum(batches.tokens[2:]) + flops.target * sum(batches.targets[2:])
    assert log.mfu == pytest.approx(needed / 6 / 1e6)
    printed = capsys.readouterr().out
    assert f"train/tokens_per_s {log.tokens_per_s:.4f}" in printed
    assert f"train/mfu {log.mfu:.4f}" in printed


def test_no_mfu_where_the_peak_or_the_flops_are_unknown(folder: Path) -> None:
    log = LogThroughput()
    run = trainer(folder, 2, [log])
    run.fit(module(folder), data(folder))
    assert run.callback_metrics["train/tokens_per_s"] > 0
    assert "train/mfu" not in run.callback_metrics
    with pytest.raises(ValueError, match=r"peak_tflops: expected a positive number, got 0\.0"):
        LogThroughput(peak_tflops=0.0)
    seq2seq = module(folder, lm=SMALL_BART, objective=DaVinci(prompt_drop=0.0))
    seq2seq.configure_model()
    assert TrainingFlops.of(seq2seq.model, 64) is None

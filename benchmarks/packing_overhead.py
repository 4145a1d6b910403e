"""What Lightning with our code costs over a bare model, step by step in turns; packing.py reports it."""

from __future__ import annotations

import copy
import logging
import statistics
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from language_models import autocast
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from timing import clock, ratio

from lavit_lm.sequences.packing import FREE, Packed
from lavit_lm.training.data_module import ResumingLoader
from lavit_lm.training.sampler import BlockOrder, Blocks, RaggedLayout


def useful(batches: Sequence[Packed]) -> int:
    return sum(int((batch.documents != FREE).sum()) for batch in batches)


class Bare:
    """The transformers model alone: ids, positions and labels in, one optimizer step."""

    def __init__(self, causal: Any, module: Any, a: Namespace) -> None:
        s = module.settings
        self.model, self.a = causal, a
        self.optimizer = torch.optim.AdamW(
            causal.parameters(), lr=s.lr / s.warmup_steps, betas=s.betas
        )

    def step(self, batch: Packed, documents: bool) -> float:
        labels = batch.ids.masked_fill(~batch.predict, -100)
        positions = batch.positions if documents else None
        with autocast(self.a.device, self.a.dtype):
            loss = self.model(
                input_ids=batch.ids, position_ids=positions, labels=labels, use_cache=False
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.a.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class InTurns(pl.Callback):
    """After each of Lightning's steps, the bare model's on the same batch; what lies between them is Lightning's."""

    def __init__(self, bare: Bare, device: str) -> None:
        self.bare, self.device, self.since = bare, device, 0.0
        self.seconds: dict[str, list[float]] = {
            "lightning": [],
            "bare": [],
            "bare, plain causal": [],
        }
        self.losses: dict[str, list[float]] = {"lightning": [], "bare": []}
        self.tokens: list[int] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.since = clock(self.device)[0]

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Packed, index: int
    ) -> None:
        now = clock(self.device)[0]
        self.seconds["lightning"].append(now - self.since)
        self.losses["lightning"].append(float(outputs["loss"]))
        self.tokens.append(useful([batch]))
        for name, documents in (("bare", True), ("bare, plain causal", False)):
            start = clock(self.device)[0]
            loss = self.bare.step(batch, documents)
            self.seconds[name].append(clock(self.device)[0] - start)
            if documents:
                self.losses["bare"].append(loss)
        self.since = clock(self.device)[0]


def overhead(module: Any, layout: RaggedLayout, a: Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a whole step: Lightning with our code, as `fit` runs it, and the bare model."""
    blocks = Blocks(layout, a.block)
    order = BlockOrder(layout, a.block, a.batch_size, a.window)
    loader = ResumingLoader(
        blocks,
        a.batch_size,
        sampler=order,
        drop_last=True,
        collate_fn=blocks.collate,
        num_workers=a.num_workers,
    )
    turns = InTurns(
        Bare(copy.deepcopy(module.model.causal).to(a.device).train(), module, a), a.device
    )
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    index = torch.device(a.device).index or 0
    trainer = pl.Trainer(
        accelerator="gpu" if a.device.startswith("cuda") else "cpu",
        devices=[index] if a.device.startswith("cuda") else 1,
        precision="32-true" if a.dtype == "float32" else "bf16-mixed",
        max_steps=a.warm + a.steps,
        max_epochs=-1,
        gradient_clip_val=a.clip,
        logger=[TensorBoardLogger(folder, name="tensorboard"), CSVLogger(folder, name="csv")],
        callbacks=[turns],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers and few batches
        trainer.fit(module, loader)
    seconds = {name: found[a.warm :] for name, found in turns.seconds.items()}
    tokens = statistics.fmean(turns.tokens[a.warm :])
    return {
        "steps": a.steps,
        "num_workers": a.num_workers,
        "places_a_step": a.batch_size * a.block,
        "useful_tokens_a_step": tokens,
        "first_loss": {name: found[0] for name, found in turns.losses.items()},
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "useful_tokens_per_second": {
            name: tokens / statistics.median(found) for name, found in seconds.items()
        },
        "share_of_bare": ratio(seconds["bare"], seconds["lightning"]),
        "share_of_plain_causal": ratio(seconds["bare, plain causal"], seconds["lightning"]),
    }

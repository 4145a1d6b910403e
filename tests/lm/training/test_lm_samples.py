"""Examples logged while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers.lm_runs import CAPTIONS, Losses, data, module, trainer
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger

from lavit_lm.training.log_samples import LogSamples, evaluation_mode
from lavit_tok import PixelDecoder


def log(
    folder: Path, name: str, decoder: str | None, steps: int = 4, **settings: Any
) -> tuple[Losses, Path]:
    """A run with samples at every second step; returns its losses and where they lie."""
    pl.seed_everything(0, verbose=False)
    output, at = Losses(), folder / name
    logger = TensorBoardLogger(at, name="", version="run")
    samples = LogSamples(
        every=2, images=3, decoder=decoder, max_new_tokens=6, num_inference_steps=2
    )
    images = str(folder / "pictures") if settings.get("continuous") else None
    fitted = trainer(at, steps, [output, samples], logger=logger, accumulate_grad_batches=2)
    fitted.fit(module(folder, **settings), data(folder, images=images))
    return output, at / "run"


def test_samples_change_nothing(folder: Path, tiny_decoder: PixelDecoder):
    """Dropout draws from the global generator, so that any draw of the callback would show."""
    from helpers.lm_runs import SMALL

    tiny_decoder.save_pretrained(folder / "decoder")
    settings = {"lm": {**SMALL, "attention_dropout": 0.3}}
    pl.seed_everything(0, verbose=False)
    plain = Losses()
    trainer(folder, 4, [plain], accumulate_grad_batches=2).fit(
        module(folder, **settings), data(folder)
    )
    with_samples, at = log(folder, "a", str(folder / "decoder"), **settings)
    assert with_samples.values == plain.values
    again, there = log(folder, "b", str(folder / "decoder"), **settings)
    assert again.values == plain.values
    for step in (2, 4):
        text = f"texts/captions-{step:07d}.md"
        lines = (at / text).read_text().splitlines()
        assert len(lines) == 2 + 3 and lines[2].startswith(f"| {CAPTIONS[0]} | ")
        assert (at / text).read_text() == (there / text).read_text()
        with Image.open(at / f"images/generated-{step:07d}.png") as sheet:
            assert sheet.size == (3 * 16, 2 * 16)
            pixels = np.asarray(sheet)
        with Image.open(there / f"images/generated-{step:07d}.png") as sheet:
            assert np.array_equal(pixels, np.asarray(sheet))
    assert len(list((at / "texts").iterdir())) == 2, "once a step, however many batches it has"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(at)).Reload()
    assert [event.step for event in events.Images("generated")] == [2, 4]
    assert "captions/text_summary" in events.Tags()["tensors"]


def test_captions_of_vectors(folder: Path):
    """A model that reads images as vectors is asked with the images."""
    _, at = log(folder, "a", None, continuous=True)
    assert (at / "texts" / "captions-0000004.md").exists() and not (at / "images").exists()


def test_a_sample_that_cannot_be_made_does_not_end_the_run(folder: Path):
    from helpers.lm_runs import SMALL

    output = Losses()
    samples = LogSamples(every=1, decoder=None, max_new_tokens=400)
    with pytest.warns(
        UserWarning, match=r"step \d: no samples are logged: .* exceed the model's context"
    ):
        trainer(folder, 2, [output, samples]).fit(module(folder, lm=SMALL), data(folder))
    assert len(output.values) == 2
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        LogSamples(every=0)


def test_modes_come_back():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    with evaluation_mode(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == [True, True, False, False]

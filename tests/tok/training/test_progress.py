"""Progress of a run: the bar in a terminal, printed lines elsewhere, images to any logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers.trainers import quiet_trainer
from PIL import Image
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader

from lavit_tok.training.logging import PrintMetrics, log_image, log_text, progress_bar


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log_dict({"train/loss": loss, "train/cosine": 0.25, "train/codes_per_image": 7.0})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Data(pl.LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(6, 1), 2)  # three batches an epoch


class Recorder(DummyLogger):
    """Has the methods of WandbLogger."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[Any, ...]] = []

    @property
    def experiment(self) -> Any:
        return None  # a run of W&B has no add_image

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.logged.append((key, images, step))

    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self.logged.append((key, columns, data, step))


def run(folder: Path, callback: pl.Callback, bar: bool, logger: Any = False) -> pl.Trainer:
    options = {"max_epochs": -1, "logger": logger, "enable_progress_bar": bar}
    trainer = quiet_trainer(folder, 8, callback, **options)
    trainer.fit(Line(), Data())
    return trainer


def test_printed_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, PrintMetrics(every=4), bar=False)
    first, second = capsys.readouterr().out.splitlines()
    assert (
        first.startswith("step 4 of 8 after ") and ", images/s " in first and ", left 0:" in first
    )
    assert "train/cosine 0.2500" in second and "left 0:00:00" in second


@pytest.mark.parametrize("rich", [True, False])
def test_one_bar_for_all_epochs(
    rich: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    if not rich:
        monkeypatch.setattr("lavit_tok.training.logging.find_spec", lambda name: None)
    bar: Any = progress_bar()
    assert isinstance(bar, pl.callbacks.RichProgressBar) == rich
    trainer = run(tmp_path, bar, bar=True)
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    assert (shown["cosine"], shown["codes_per_image"]) == ("0.250", "7.000")
    assert {"loss", "images/s", "left"} <= set(shown)
    assert bar.total_train_batches == 8
    printed = "".join(capsys.readouterr())
    assert "8/8" in printed and "3/3" not in printed


def test_images_and_texts_reach_a_logger_like_that_of_wandb(tmp_path: Path) -> None:
    logger = Recorder()
    trainer = run(tmp_path, PrintMetrics(), bar=False, logger=logger)
    image = Image.new("RGB", (4, 4))
    assert log_image(trainer.lightning_module, "sample", image).is_file()
    log_text(trainer.lightning_module, "captions", "a | b")
    assert logger.logged == [("sample", [image], 8), ("captions", ["text"], [["a | b"]], 8)]

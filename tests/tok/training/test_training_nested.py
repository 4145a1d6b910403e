"""Training of nested codes: budgets, exact resuming, what is trained, train -> save -> encode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers.small_nested import SETTINGS
from PIL import Image

from lavit_tok import TokenizerConfig, VisualTokenizer
from lavit_tok.encode.rate_control import RateControl
from lavit_tok.encode.rate_distortion import Target
from lavit_tok.training.codebook import QuantizationConfig
from lavit_tok.training.data_module import ImageDataModule
from lavit_tok.training.nested_training import (
    BudgetConfig,
    NestedTokenizerTraining,
    budgets,
)
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig

CONFIG = TokenizerConfig(**SETTINGS, error_hidden=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images: a rectangle of one color on another."""
    root, rng = tmp_path_factory.mktemp("images") / "train", np.random.default_rng(0)
    root.mkdir()
    for i in range(40):
        image = np.full((32, 32, 3), rng.integers(256, size=3), np.uint8)
        top, left = rng.integers(0, 20, size=2)
        image[top : top + 12, left : left + 12] = rng.integers(256, size=3)
        Image.fromarray(image).save(root / f"{i:02}.png")
    return root.parent


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        found = trainer.callback_metrics.items()
        self.values.append({k: float(v) for k, v in found if k.startswith("train/")})


def fit(folder: Path, root: Path, steps: int, ckpt: str | None = None, **arguments: Any) -> Any:
    """Train a few steps; returns the module, its trainer and the losses of every step."""
    pl.seed_everything(0, verbose=False)
    module = NestedTokenizerTraining(
        CONFIG,
        budget=BudgetConfig(cut=4, large_ratio=0.25, patches_per_image=6),
        codebook=QuantizationConfig(start_step=3, blend_steps=2, kmeans_samples=256),
        optimizer=OptimizerConfig(lr=1.0),
        # The length of the run then does not enter the learning rate.
        schedule=ScheduleConfig(warmup_steps=1000),
        **arguments,
    )
    losses = Losses()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[losses],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        num_sanity_val_steps=0,
    )
    data = ImageDataModule(str(folder), image_size=32, batch_size=8, flip=0.5, cache=True)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False if ckpt else None)
    return module, trainer, losses.values


def test_budgets_cover_all_numbers_of_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [budgets(16, 64, 8, 0.25, generator) for _ in range(200)]
    counts, large = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    assert large[:, :12].sum() == 0 and bool(large[:, 12:].all())
    assert int(counts[~large].min()) == 1 and int(counts[~large].max()) == 8
    assert bool((counts[:, 12:14] == 64).all())  # half of the large ones
    assert int(counts[large].min()) >= 8 and int(counts.max()) == 64
    ratios = [(counts[~large] == k).float().mean() for k in (1, 2, 4)]
    assert (
        ratios[0] > ratios[1] > ratios[2]
    )  # log-uniform: as many between 1 and 2 as between 4 and 8
    alone, _ = budgets(3, 1, 8, 0.5, generator)
    assert alone.tolist() == [1, 1, 1]


def test_resumed_run_repeats_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """Stopped before quantization and resumed over the switch."""
    whole, _, losses = fit(folder, tmp_path, 5)
    _, trainer, first = fit(folder, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, second = fit(folder, tmp_path, 5, ckpt=str(tmp_path / "half.ckpt"))
    assert first + second == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_every_part_learns_but_the_encoder(folder: Path, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    before = NestedTokenizerTraining(CONFIG).tokenizer.state_dict()
    module, trainer, _ = fit(folder, tmp_path, 6)
    for name, value in module.tokenizer.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(value, before[name]), name
    moved = dict(module.tokenizer.named_parameters())
    trained = [n for n in moved if not n.startswith(("encoder.", "error_heads."))]
    still = [n for n in trained if torch.equal(moved[n], before[n])]
    assert [n for n in still if not n.endswith("key.bias")] == []  # which no softmax depends on
    optimized = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not optimized & set(module.tokenizer.encoder.parameters())


def test_trained_saved_and_encoded(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, 6, out=str(tmp_path / "tokenizer"))
    tokenizer = VisualTokenizer.from_pretrained(tmp_path / "tokenizer")
    images = [folder / "train" / f"{i:02}.png" for i in range(3)]
    codes = tokenizer.encode(images)
    assert codes.nested and codes.predicted_error is not None
    assert tokenizer.reconstruct_patches(codes).colors.shape == (3, 16, 48)


def test_error_heads_predict_what_the_saved_tokenizer_measures(
    folder: Path, tmp_path: Path
) -> None:
    """Better than the mean curve over images would: which image is hard is learned, too."""
    fit(folder, tmp_path, 6, out=str(tmp_path / "tokenizer"), error_images=40)
    tokenizer = VisualTokenizer.from_pretrained(tmp_path / "tokenizer")
    pixels = tokenizer.preprocess([folder / "train" / f"{i:02}.png" for i in range(40)])
    features = tokenizer.features(pixels)
    measure = RateControl(tokenizer, features, pixels).measure
    for kind in ("cosine", "psnr"):
        measured = measure(Target(kind, 0.5))(torch.full((40,), 4))
        predicted = tokenizer.predicted_errors(features, kind)[:, 3]
        assert (predicted - measured).square().mean() < 0.7 * measured.var()


def test_kept_features_give_the_same_run(folder: Path, tmp_path: Path) -> None:
    """Float16 rounds them: the losses are nearly those of a run that computes them each time."""
    _, _, losses = fit(folder, tmp_path, 2)
    module, _, kept = fit(folder, tmp_path, 2, keep_features=True)
    assert kept[0]["train/loss"] == pytest.approx(losses[0]["train/loss"], rel=1e-3)
    seen = len(module.encode.known)
    images = next(iter(module.trainer.datamodule.train_dataloader()))["images"]
    first = module.encode(images)
    assert torch.equal(first, module.encode(images))
    assert len(module.encode.known) <= seen + 8
    torch.testing.assert_close(first, module.features(images), rtol=1e-3, atol=1e-3)


def test_the_first_step_starts_at_the_scale_of_the_features(folder: Path, tmp_path: Path) -> None:
    module = NestedTokenizerTraining(CONFIG)
    data = ImageDataModule(str(folder), image_size=32, batch_size=40, cache=True)
    data.setup("fit")
    images = next(iter(data.train_dataloader()))["images"]
    features, colors = module.features(images) * torch.logspace(-1, 1, 24), module.colors(images)
    module._start_at(features, colors)
    scaled = module.tokenizer.merger.norm_in(features).flatten(0, 1).std(0)
    assert float(scaled.max()) < 1.01 and float(scaled.median()) > 0.9
    torch.testing.assert_close(module.tokenizer.reconstructor.colors.bias, colors.mean((0, 1)))


def test_only_nested_codes_are_trained_so() -> None:
    with pytest.raises(ValueError, match="sequence 'nested'"):
        NestedTokenizerTraining(TokenizerConfig())

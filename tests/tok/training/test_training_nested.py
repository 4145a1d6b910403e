"""Training of nested codes: budgets, exact resuming, what is trained, train -> save -> encode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers.small_nested import SETTINGS
from helpers.trainers import EachStep, quiet_trainer, rectangles, training_metrics

from lavit_tok import TokenizerConfig, VisualTokenizer
from lavit_tok.encode.rate_control import RateControl
from lavit_tok.encode.rate_distortion import Target
from lavit_tok.training.data_module import ImageDataModule
from lavit_tok.training.nested_codebook import NestedCodebookConfig
from lavit_tok.training.nested_training import NestedTokenizerTraining, log_uniform
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig

CONFIG = TokenizerConfig(**SETTINGS, error_hidden=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rectangles(tmp_path_factory.mktemp("images"), train=40)


def fit(
    folder: Path,
    root: Path,
    steps: int,
    ckpt: str | None = None,
    config: TokenizerConfig = CONFIG,
    streaming: bool = False,
    **arguments: Any,
) -> Any:
    """Train a few steps; returns the module, its trainer and the losses of every step."""
    pl.seed_everything(0, verbose=False)
    module = NestedTokenizerTraining(
        config,
        codebook=NestedCodebookConfig(images=30, samples=256, iterations=3),
        optimizer=OptimizerConfig(lr=1.0),
        # The length of the run then does not enter the learning rate.
        schedule=ScheduleConfig(warmup_steps=1000),
        **arguments,
    )
    losses = EachStep(training_metrics)
    trainer = quiet_trainer(root, steps, losses)
    options = {"streaming": streaming, "cache": not streaming}
    data = ImageDataModule(str(folder), image_size=32, batch_size=8, flip=0.5, **options)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False if ckpt else None)
    return module, trainer, losses.values


def test_budgets_are_log_uniform_up_to_all_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.cat([log_uniform(16, 64, generator) for _ in range(300)])
    assert int(counts.min()) == 1 and int(counts.max()) == 64
    shares = [((counts >= k) & (counts < 2 * k)).float().mean() for k in (1, 2, 4, 8, 16)]
    assert max(shares) < 1.2 * min(shares)  # as many in 1..1 as in 16..31
    assert 0.05 < (counts == 64).float().mean() < 0.09
    assert log_uniform(3, 1, generator).tolist() == [1, 1, 1]


def test_resumed_run_repeats_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """Stopped and resumed, with the codebook that was fitted before the first step."""
    whole, _, losses = fit(folder, tmp_path, 5)
    _, trainer, first = fit(folder, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, second = fit(folder, tmp_path, 5, ckpt=str(tmp_path / "half.ckpt"))
    assert first + second == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_reconstructor_learns_and_the_codebook_is_fitted(folder: Path, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    before = NestedTokenizerTraining(CONFIG).tokenizer.state_dict()
    module, trainer, _ = fit(folder, tmp_path, 6)
    after = module.tokenizer.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    expected = {n for n in after if n.startswith(("reconstructor.", "quantizer."))}
    biases = {n for n in expected if n.endswith("key.bias")}  # no softmax depends on them
    assert changed | biases == expected
    optimized = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == set(module.tokenizer.reconstructor.parameters())


def test_a_tokenizer_is_trained_on(folder: Path, tmp_path: Path) -> None:
    """Its codebook stays, so that its codes do."""
    fit(folder, tmp_path, 2, out=str(tmp_path / "tokenizer"), error_steps=1)
    module, _, _ = fit(folder, tmp_path, 2, start_from=str(tmp_path / "tokenizer"))
    first = VisualTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert module.tokenizer.fingerprint() == first.fingerprint()
    reconstructors = (t.reconstructor.project_out.weight for t in (module.tokenizer, first))
    assert not torch.equal(*reconstructors)


def test_error_heads_predict_what_the_saved_tokenizer_measures(
    folder: Path, tmp_path: Path
) -> None:
    """Better than the mean curve over images would: which image is hard is learned, too.

    The saved tokenizer encodes and reconstructs.
    """
    fit(folder, tmp_path, 6, out=str(tmp_path / "tokenizer"), error_images=40)
    tokenizer = VisualTokenizer.from_pretrained(tmp_path / "tokenizer")
    codes = tokenizer.encode(folder / "train" / "00.png")
    assert codes.nested and codes.predicted_error is not None
    assert tokenizer.reconstruct_patches(codes).colors.shape == (1, 16, 48)
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


def test_the_codebook_is_fitted_to_images_that_are_evenly_spaced(
    folder: Path, tmp_path: Path
) -> None:
    module, trainer, _ = fit(folder, tmp_path, 1)
    images = trainer.datamodule.sets["train"]
    total = len(images)
    for limit in (7, 30, 100):
        found = torch.cat([colors for _, colors in module._training_images(limit)])
        wanted = [int(i * max(1, total / limit)) for i in range(min(limit, total))]
        assert torch.equal(found, module.colors(torch.stack([images[i]["images"] for i in wanted])))


def test_only_nested_codes_are_trained_so() -> None:
    with pytest.raises(ValueError, match="sequence 'nested'"):
        NestedTokenizerTraining(TokenizerConfig())

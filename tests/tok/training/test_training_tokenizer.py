"""Stage 1: what it trains and does not, exact resuming, and the chain train -> save -> encode."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers.trainers import EachStep, quiet_trainer, rectangles, trainer_of, training_metrics

from lavit_tok import TokenizerConfig, VisualTokenizer
from lavit_tok.encode.allocation import straight_through
from lavit_tok.encode.selector import keep_scores
from lavit_tok.training.codebook import RecentValues
from lavit_tok.training.data_module import ImageDataModule
from lavit_tok.training.logging import step_generator
from lavit_tok.training.optimizers import ScheduleConfig
from lavit_tok.training.tokenizer_training import TokenizerTraining


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rectangles(tmp_path_factory.mktemp("images"), train=40)


def fit(
    config: TokenizerConfig,
    folder: Path,
    root: Path,
    steps: int,
    ckpt: str | None = None,
    **arguments: Any,
) -> Any:
    """Train a little; returns the module, its trainer and the logged losses of every step."""
    pl.seed_everything(0, verbose=False)
    chosen = {"stop_sampling_step": 3, "start_step": 4, "blend_steps": 2, "kmeans_samples": 256}
    chosen |= {"warmup_steps": 1, "lr": 3e-3, "log_images_every": 0, **arguments}
    module = trainer_of(TokenizerTraining, config=config, **chosen)
    losses = EachStep(training_metrics)
    trainer = quiet_trainer(root, steps, losses)
    data = ImageDataModule(str(folder), image_size=32, batch_size=8, flip=0.5, cache=True)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False if ckpt else None)
    return module, trainer, losses.values


def test_resumed_run_repeats_the_uninterrupted_one(
    tiny_config: TokenizerConfig, folder: Path, tmp_path: Path
) -> None:
    """Stopped in stretch A' and resumed over the switch to quantisation."""
    constant = {"min_lr_ratio": 1.0}  # the plan's length then does not enter the learning rate
    whole, _, losses = fit(tiny_config, folder, tmp_path, 8, **constant)
    _, trainer, first = fit(tiny_config, folder, tmp_path, 4, **constant)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, second = fit(
        tiny_config, folder, tmp_path, 8, ckpt=str(tmp_path / "half.ckpt"), **constant
    )
    assert first + second == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_encoder_is_frozen_and_absent(
    tiny_config: TokenizerConfig, folder: Path, tmp_path: Path
) -> None:
    pl.seed_everything(0, verbose=False)
    untouched = TokenizerTraining(tiny_config).tokenizer.encoder.state_dict()
    module, trainer, _ = fit(tiny_config, folder, tmp_path, 6)
    for name, value in module.tokenizer.encoder.state_dict().items():
        assert torch.equal(value, untouched[name]), name
    frozen = set(module.tokenizer.encoder.parameters())
    optimised = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not frozen & optimised
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    names = torch.load(tmp_path / "x.ckpt", weights_only=False)["state_dict"]
    assert not [n for n in names if ".encoder." in n]


def test_every_trained_part_moves(
    tiny_config: TokenizerConfig, folder: Path, tmp_path: Path
) -> None:
    pl.seed_everything(0, verbose=False)
    before = {n: p.clone() for n, p in TokenizerTraining(tiny_config).tokenizer.named_parameters()}
    module, _, values = fit(tiny_config, folder, tmp_path, 3)
    still = [
        n
        for n, p in module.tokenizer.named_parameters()
        if "encoder" not in n and torch.equal(p, before[n])
    ]
    # A key's bias shifts a query's scores by one number, which does not change the softmax.
    assert [n for n in still if not n.endswith("key.bias")] == []
    assert values[-1]["train/loss"] < values[0]["train/loss"]


def test_settled_selector_keeps_rho_and_freezes(
    tiny_config: TokenizerConfig, folder: Path, tmp_path: Path
) -> None:
    """From stop_sampling_step on, each batch keeps rho of its patches by its own scores.

    (At least: every image keeps one patch, even where all of its scores lie below the batch's upper
    quarter.)
    """
    arguments = {"random_budget_ratio": 0.0, "rho": 0.25, "stop_sampling_step": 3, "start_step": 7}
    module, _, values = fit(tiny_config, folder, tmp_path, 7, **arguments)
    ratios = [v["train/keep_ratio"] for v in values[3:]]
    assert 0.25 - 1 / 128 <= ratios[0] <= 0.25 + 8 / 128, "but for the patch at the border itself"
    assert np.mean(ratios) == pytest.approx(0.25, abs=0.1)
    assert not any(p.requires_grad for p in module.tokenizer.selector.parameters())


def test_live_selector_goes_on_learning(
    tiny_config: TokenizerConfig, folder: Path, tmp_path: Path
) -> None:
    short, _, _ = fit(tiny_config, folder, tmp_path, 5, selector_after="live", min_lr_ratio=1.0)
    long, _, _ = fit(tiny_config, folder, tmp_path, 8, selector_after="live", min_lr_ratio=1.0)
    a, b = short.tokenizer.selector.state_dict(), long.tokenizer.selector.state_dict()
    assert not torch.equal(a["judge.0.weight"], b["judge.0.weight"])


def test_selector_gets_a_gradient_from_the_features_alone(tiny_config: TokenizerConfig) -> None:
    """Without the ratio loss, the straight-through policy passes a gradient to the selector."""
    torch.manual_seed(0)
    module = TokenizerTraining(tiny_config)
    module.configure_model()
    features = torch.randn(3, 16, 32)
    log_probs = module.tokenizer.score(features)
    policy = straight_through(log_probs, step_generator(0, 0, 0, "cpu"))
    reconstructed, _, _ = module._dense(features, policy, policy.detach() > 0.5)
    (1 - module.cosines(features, reconstructed)[0]).backward()
    assert module.tokenizer.selector.judge[0].weight.grad.abs().sum() > 0


def test_training_and_encoding_agree(tiny_tokenizer: VisualTokenizer, photos: list[Path]) -> None:
    """The dense path with final decisions, the ragged path and encode() give equal features."""
    module = TokenizerTraining(tiny_tokenizer.config)
    module.tokenizer = tiny_tokenizer
    features = tiny_tokenizer.features(tiny_tokenizer.preprocess(photos))
    keep = tiny_tokenizer.select(tiny_tokenizer.score(features))
    dense, _, _ = module.eval()._dense(features, keep.float(), keep)
    ragged, _, _ = module._ragged(features, keep)
    torch.testing.assert_close(dense, ragged, atol=1e-5, rtol=1e-4)


def test_chain_train_save_load_encode_reconstruct(
    tiny_config: TokenizerConfig, folder: Path, tmp_path: Path, photos: list[Path]
) -> None:
    module, _, values = fit(tiny_config, folder, tmp_path, 8, out=str(tmp_path / "tok"))
    assert {
        "train/codebook_usage",
        "train/perplexity",
        "train/feature_loss",
        "train/keep_ratio",
    } <= set(values[-1])
    loaded = VisualTokenizer.from_pretrained(tmp_path / "tok")
    torch.testing.assert_close(loaded.quantizer.codebook.embeddings, module.codebook.embeddings)
    codes = loaded.encode(photos)
    assert len(codes) == len(photos) and int(codes.lengths.min()) >= 1
    assert loaded.reconstruct_features(codes).shape == (len(photos), 16, 32)
    scores = keep_scores(loaded.score(loaded.features(loaded.preprocess(photos))))
    assert torch.equal(
        codes.keep, (scores > 0) | torch.nn.functional.one_hot(scores.argmax(1), 16).bool()
    )


def test_recent_rows_overwrite_the_oldest() -> None:
    """The drawing of the docstring, then no values, then more values at once than are kept."""
    recent = RecentValues(4)
    assert recent.latest().tolist() == []
    recent.add(torch.tensor([1.0, 2.0, 3.0]))
    assert recent.latest().tolist() == [1, 2, 3]
    recent.add(torch.tensor([4.0, 5.0]))
    assert recent.latest().tolist() == [5, 2, 3, 4]
    recent.add(torch.zeros(0))
    recent.add(torch.arange(10, 16).float())
    assert sorted(recent.latest().tolist()) == [12, 13, 14, 15]
    pairs = RecentValues(2, 3)
    pairs.add(torch.ones(1, 3))
    assert pairs.latest().shape == (1, 3)


def test_learning_rate_shape() -> None:
    """
    1 |   /\\
      |  /   \\_
    0 | /       \\__ floor
    """
    factors = [ScheduleConfig(10, 0.1).factor(s, 100) for s in range(101)]
    assert factors[0] == pytest.approx(1 / 11) and max(factors) == factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1) and factors[55] == pytest.approx(0.55, abs=0.01)
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(
        factors[10:], reverse=True
    )


def test_step_generator_depends_on_its_arguments_only() -> None:
    draw = lambda *a: torch.rand(3, generator=step_generator(*a, "cpu")).tolist()  # noqa: E731
    assert draw(0, 5, 0) == draw(0, 5, 0)
    assert len({tuple(draw(*a)) for a in [(0, 5, 0), (1, 5, 0), (0, 6, 0), (0, 5, 1)]}) == 4


@pytest.mark.parametrize(
    "bad", [{"rho": 0.0}, {"rho": 1.5}, {"stop_sampling_step": 9, "start_step": 3}]
)
def test_impossible_arguments_are_refused(
    tiny_config: TokenizerConfig, bad: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        trainer_of(TokenizerTraining, config=tiny_config, **bad)


def test_a_tokenizer_that_only_encodes_cannot_be_trained(tiny_config: TokenizerConfig) -> None:
    with pytest.raises(ValueError, match="the loss compares reconstructed features"):
        TokenizerTraining(dataclasses.replace(tiny_config, reconstructor_depth=0))

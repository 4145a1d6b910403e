"""Training of the pixel decoder: its loss by hand, exact resuming, averages, export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_diffusion import UNET, small_vae
from helpers.trainers import EachStep, quiet_trainer, rectangles, trainer_of, two_steps
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint

from lavit_tok import PixelDecoder, VisualTokenizer
from lavit_tok.cli import main
from lavit_tok.training.data_module import ImageDataModule
from lavit_tok.training.decoder_training import PixelDecoderTraining
from lavit_tok.training.encoded_images import EncodedSet, FrozenEncoders
from lavit_tok.training.logging import step_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rectangles(tmp_path_factory.mktemp("images"), train=20, validation=4)


@pytest.fixture
def parts(tmp_path: Path, tiny_tokenizer: VisualTokenizer) -> dict[str, str]:
    """Folders of a tokenizer (32 pixels, 16 patches) and of a VAE with factor 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        vae = small_vae(32, scaling_factor=0.8)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    vae.save_pretrained(tmp_path / "vae")
    return {"tokenizer": str(tmp_path / "tokenizer"), "vae": str(tmp_path / "vae")}


def training(parts: dict[str, str], **arguments: Any) -> PixelDecoderTraining:
    chosen = {"config": UNET, "cross_dims": (16,), "every": 0, "warmup_steps": 1, "lr": 1e-2}
    chosen |= {"flip": 0.5, "ema_decay": 0.6, **arguments}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trainer_of(PixelDecoderTraining, **parts, **chosen)


def fit(
    module: PixelDecoderTraining,
    folder: Path,
    root: Path,
    steps: int,
    *callbacks: Any,
    ckpt: str | None = None,
    **options: Any,
) -> Any:
    trainer = quiet_trainer(root, steps, *callbacks, **options)
    data = ImageDataModule(str(folder), 32, 8, cache=True)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False)
    return trainer


def pixels_of(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def parameters(module: PixelDecoderTraining) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def weights(trainer: Any, module: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Of EachStep."""
    return parameters(module)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_loss_by_hand(prediction: str, min_snr: float, parts: dict[str, str]) -> None:
    """Equal to the formulas, image by image, with steps, noise and drops drawn as documented."""
    module = training(parts, prediction_type=prediction, min_snr=min_snr).eval()
    encoded, velocity = module.encoders(pixels_of(4)), prediction == "v_prediction"
    with torch.no_grad():
        loss = module.diffusion_loss(encoded, torch.Generator().manual_seed(2), condition_drop=0.5)
        g = torch.Generator().manual_seed(2)
        t = ((torch.randperm(4, generator=g) + torch.rand(4, generator=g)) * 250).long()
        noise, dropped = torch.randn(4, 4, 16, 16, generator=g), torch.rand(4, generator=g) < 0.5
        assert 0 < dropped.sum() < 4 and sorted((t // 250).tolist()) == [0, 1, 2, 3]
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        total, null = 0.0, module.projection.null
        for i in range(4):
            product = (1 - betas)[: t[i] + 1].prod()
            a, s, z = product.sqrt(), (1 - product).sqrt(), encoded.latents[i]
            given = module.projection(encoded.features[i : i + 1]).tokens
            tokens = null if dropped[i] else given
            predicted = module.unet((a * z + s * noise[i])[None], t[i], tokens).sample[0]
            target = a * noise[i] - s * z if velocity else noise[i]
            snr = (a / s) ** 2
            weight = min(snr, min_snr) / (snr + 1 if velocity else snr) if min_snr else 1.0
            total += float(weight * (predicted - target).square().mean()) / 4
    assert float(loss) == pytest.approx(total, rel=1e-3)


def test_features_and_latents_are_the_frozen_parts_own(parts: dict[str, str]) -> None:
    frozen, tokenizer = FrozenEncoders(**parts), VisualTokenizer.from_pretrained(parts["tokenizer"])
    images = pixels_of(3)
    encoded = frozen(images)
    assert torch.equal(encoded.features, tokenizer.reconstruct_features(tokenizer.encode(images)))
    latents = frozen.vae.encode(images.float() / 127.5 - 1).latent_dist.mean * 0.8
    torch.testing.assert_close(encoded.latents, latents)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = frozen(images).features
    assert torch.equal(mixed, encoded.features), "mixed precision changes no code"
    # Decoded at another size than the tokenizer's.
    larger = frozen(images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert larger.latents.shape == (3, 4, 32, 32)
    assert larger.features.shape == encoded.features.shape


def test_encoded_once(parts: dict[str, str], tmp_path: Path) -> None:
    frozen, pixels, cache = FrozenEncoders(**parts), pixels_of(5), tmp_path / "cache"
    index = torch.tensor([0, 2, 3, 7, 9])
    made = EncodedSet(pixels, index, frozen, True, cache, batch_size=2)
    got = made(torch.tensor([7, 0, 7]), torch.tensor([False, True, True]), "cpu")
    expected = frozen(torch.stack([pixels[3], pixels[0].flip(2), pixels[3].flip(2)]))
    torch.testing.assert_close(got.features, expected.features, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got.latents, expected.latents, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"images \[1\] were not encoded"):
        made(torch.tensor([1]), torch.tensor([False]), "cpu")
    frozen.tokenizer.reconstructor = None  # the stored file is enough; nothing is encoded again
    again = EncodedSet(pixels, index, FrozenEncoders(**parts), True, cache)
    assert torch.equal(again.features, made.features) and len(list(cache.iterdir())) == 1
    EncodedSet(255 - pixels, index, FrozenEncoders(**parts), True, cache)
    assert len(list(cache.iterdir())) == 2, "other images, another file"
    plain = EncodedSet(pixels, index, FrozenEncoders(**parts), flipped=False)
    assert len(plain.latents) == 5
    sides = [m(index, torch.zeros(5, dtype=torch.bool), "cpu") for m in (made, plain)]
    torch.testing.assert_close(sides[0].latents, sides[1].latents, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="flipped images were not encoded"):
        plain(index, torch.ones(5, dtype=torch.bool), "cpu")


@pytest.mark.parametrize("cache", [False, True])
def test_resuming_is_exact(
    cache: bool, parts: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    """Resumed after 1 to 3 of 5 steps (2 an epoch); parameters, averages, moments are bit-equal."""
    kept = tmp_path / "kept"
    keep = ModelCheckpoint(kept, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = training(parts, cache=cache)
    trainer = fit(whole, folder, tmp_path, 5, keep, enable_checkpointing=True)
    for stop in (1, 2, 3):
        resumed = training(parts, cache=cache)
        again = fit(resumed, folder, tmp_path, 5, ckpt=str(kept / f"step={stop}.ckpt"))
        assert again.global_step == 5
        for name, value in parameters(whole).items():
            assert torch.equal(value, parameters(resumed)[name]), (stop, name)
        for a, b in zip(whole.ema.shadow_params, resumed.ema.shadow_params, strict=True):
            assert torch.equal(a, b)
        states = [t.optimizers[0].state.values() for t in (trainer, again)]
        for a, b in zip(*states, strict=True):
            assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_another_seed_is_another_run(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    runs = [training(parts, seed=seed) for seed in (0, 0, 1)]
    for module in runs:
        fit(module, folder, tmp_path, 1)
    one, same, other = (parameters(m)["unet.conv_in.weight"] for m in runs)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_average_is_the_formula(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """a_1 = w_1; a_t = d a_{t-1} + (1 - d) w_t with d = min(0.6, (1 + k) / (10 + k)), k = t - 1."""
    steps, module = EachStep(weights), training(parts)
    fit(module, folder, tmp_path, 6, steps)
    expected = steps.values[0]
    for k, now in enumerate(steps.values[1:], start=1):
        decay = min(0.6, (1 + k) / (10 + k))
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    average = dict(zip(parameters(module), module.ema.shadow_params, strict=True))
    for name, value in average.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    before = parameters(module)
    with module.averaged():
        assert torch.equal(module.unet.conv_in.weight, average["unet.conv_in.weight"])
    assert all(torch.equal(before[n], p) for n, p in module.named_parameters())


def test_frozen_parts_are_absent(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    module = training(parts)
    encoders, condition = module.encoders, module.conditioner.module
    frozen = [*encoders.tokenizer.state_dict().values(), *encoders.vae.state_dict().values()]
    frozen += [*condition.codebook.buffers(), *condition.reconstructor.parameters()]
    before = [t.clone() for t in frozen]
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer = fit(module, folder, tmp_path, 2, keep, enable_checkpointing=True)
    optimized = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert not {id(t) for t in frozen} & {id(p) for p in optimized}
    trained = {name for name, _ in module.named_parameters()}
    assert {n.split(".")[0] for n in trained} == {"unet", "projection"}
    checkpoint = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=False)
    assert set(checkpoint["state_dict"]) == trained
    assert len(checkpoint["ema"]["shadow_params"]) == len(optimized) == len(trained)
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))


def test_it_learns_and_exports_the_average(
    parts: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    """The loss falls; the averaged decoder is exported, and needs no tokenizer or Lightning."""
    arguments = {"spatial_channels": 4, "spatial_scale": 2, "feature_norm": True}
    arguments |= {"null_length": 16, "cache": True}
    module = training(parts, out=str(tmp_path / "out"), **arguments)
    decoded = ImageDataModule(str(folder), 32, 8, cache=True)
    decoded.setup("fit")
    images = torch.stack([decoded.sets["train"][i]["images"] for i in range(16)])

    def loss() -> float:
        with torch.no_grad(), module.averaged():
            encoded, generator = module.encoders(images), torch.Generator().manual_seed(9)
            return float(module.diffusion_loss(encoded, generator, 0.0))

    before = loss()
    fit(module, folder, tmp_path, 40)
    assert loss() < 0.75 * before
    codes = module.encoders.codes(images[:2])
    decoder = PixelDecoder.from_pretrained(tmp_path / "out")
    decoder.set_progress_bar_config(disable=True)
    generators = [step_generator(0, i, 2**32, "cpu") for i in range(2)]
    drawn = decoder(codes, 25, 3.0, generators, output_type="pt").images
    assert drawn.shape == (2, 3, 32, 32)
    torch.testing.assert_close(drawn, module.sample(images[:2]), rtol=1e-3, atol=1e-3)
    stored = decoder.unet.state_dict()["conv_in.weight"]
    average = dict(zip(parameters(module), module.ema.shadow_params, strict=True))
    assert torch.equal(stored, average["unet.conv_in.weight"])
    assert not torch.equal(stored, module.unet.conv_in.weight)


def test_sheets_and_validation(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """Every 2 steps a grid of 3 originals above 3 samples; validation restores the weights."""
    module, steps = training(parts, every=2, count=3, steps=2), EachStep(weights)
    every_step = {"check_val_every_n_epoch": None, "val_check_interval": 1}
    trainer = fit(module, folder, tmp_path, 4, steps, **every_step)
    sheets = sorted((tmp_path / "images").glob("samples-*.png"))
    assert [s.name for s in sheets] == ["samples-0000002.png", "samples-0000004.png"]
    sheet = np.asarray(Image.open(sheets[0]))
    assert sheet.shape == (64, 96, 3)
    originals = [np.asarray(Image.open(p)) for p in sorted((folder / "validation").iterdir())[:3]]
    assert np.abs(sheet[:32].astype(int) - np.concatenate(originals, 1)).max() <= 1
    batch = next(iter(trainer.datamodule.val_dataloader()))
    generator = step_generator(0, 0, 2**31, "cpu")
    with torch.no_grad(), module.averaged():
        expected = module.diffusion_loss(module.encoders(batch["images"]), generator, 0.0)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(expected), rel=1e-4)
    assert math.isfinite(float(trainer.callback_metrics["sample/psnr"]))
    quiet = EachStep(weights)
    fit(training(parts), folder, tmp_path / "plain", 4, quiet, limit_val_batches=0)
    for a, b in zip(steps.values, quiet.values, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a), "the training is not changed"


def test_sdxl_and_accumulated_steps(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = {**UNET, **extra, "projection_class_embeddings_input_dim": 8 + 6 * 4}
    sizes = {"cross_dims": (8, 8), "pooled_dim": 8, "pool_heads": 2}
    out = tmp_path / "out"
    module = training(parts, out=str(out), style="sdxl", config=unet, **sizes)
    losses: list[float] = []
    module.log = lambda name, value, **_: losses.append(float(value))  # type: ignore[method-assign]
    fit(module, folder, tmp_path, 2, accumulate_grad_batches=2, limit_val_batches=0)
    assert len(losses) == 4 and len(set(losses)) == 4
    assert PixelDecoder.from_pretrained(out).conditioner.config.style == "sdxl"


def test_starts_from_a_pretrained_unet(parts: dict[str, str], tmp_path: Path) -> None:
    """New input channels begin at zero, so the pretrained U-Net predicts what it did."""
    first = training(parts)
    first.unet.save_pretrained(tmp_path / "unet")
    second = training(
        parts, config=None, pretrained=str(tmp_path / "unet"), spatial_channels=2, sample_size=8
    )
    latents, tokens = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 16)
    with torch.no_grad():
        wide = second.unet(torch.cat([latents, torch.randn(2, 2, 16, 16)], 1), 5, tokens).sample
        torch.testing.assert_close(wide, first.unet(latents, 5, tokens).sample)
    assert second.unet.config.in_channels == 6 and second.decoder().unet.config.sample_size == 8


def test_bad_arguments_are_refused(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        ({"zero_terminal_snr": True}, "zero_terminal_snr: expected prediction_type v_prediction"),
        ({"condition_drop": 10.0}, r"condition_drop: expected a number in 0\.\.1, got 10.0"),
        ({"config": None}, r"either unet.config or unet.pretrained"),
        ({"config": {**UNET, "in_channels": 5}}, r"values do not fit .*'in_channels': \(5, 4\)"),
    ):
        with pytest.raises(ValueError, match=reason):
            training(parts, **arguments)
    with pytest.raises(ValueError, match="no such file or directory"):
        training({**parts, "vae": "nowhere"})
    for options, reason in (
        ({"flip": 0.5, "cache": True}, "cache: expected no augmentation in the data module"),
        ({}, "cache: expected a data module with cache=True"),
    ):
        data = ImageDataModule(str(folder), 32, 8, **options)
        with pytest.raises(ValueError, match=reason):
            quiet_trainer(tmp_path, 1).fit(training(parts, cache=True), data)


RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*/decoder.yaml"))
RECIPES = [recipe for recipe in RECIPES if "fit-decoder" in recipe.read_text()]  # by diffusion


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.parent.name)
def test_recipe_trains(recipe: Path, parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """The recipe with other width, devices, data and pretrained models: two steps and an export."""
    overrides = {
        "data.data": folder,
        "data.image_size": 32,
        "data.batch_size": 4,
        "data.streaming": "false",
        "trainer.default_root_dir": tmp_path / "run",
        "model.tokenizer": parts["tokenizer"],
        "model.vae": parts["vae"],
        "model.unet.pretrained": "null",
        "model.unet.config": json.dumps(UNET),
        "model.condition.cross_dims": "[16]",
        "model.condition.null_length": 16,
        "model.samples.every": 2,
        "model.samples.steps": 2,
        "model.out": tmp_path / "out",
    }
    assert main(["fit-decoder", *two_steps(recipe, overrides)]) == 0
    assert PixelDecoder.from_pretrained(tmp_path / "out").unet.config.block_out_channels == [16, 16]
    assert (tmp_path / "run" / "images" / "samples-0000002.png").is_file()


def test_there_is_a_recipe_of_each_size() -> None:
    assert [r.parent.name for r in RECIPES] == ["base", "paper", "selected"]

"""The decoder of vectors: what it draws, what it is trained on, its files, and its command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from diffusers import DDIMScheduler
from helpers.emu_parts import EMU, N, built
from helpers.lm_parts import processor_and_model
from helpers.lm_runs import CAPTIONS
from helpers.tensors import generator
from helpers.trainers import EachStep, quiet_trainer, recipes_of, trainer_of, two_steps
from safetensors.torch import load_file, save_file

from lavit_lm import MultimodalLM
from lavit_lm.checkpoints.native import save_model
from lavit_lm.cli import main
from lavit_lm.objectives.emu.image_decoder import VectorDecoder
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.objectives.records import ImageVectors
from lavit_lm.training.emu_decoder import EmuDecoderTraining, renew_keys
from lavit_lm.vision.vector_reader import VectorReader, VectorReaderConfig
from lavit_tok import ImageDataModule, VisualCodes, VisualTokenizer, WeightsError
from lavit_tok.training.denoising import vae_latents

RECIPES = recipes_of("lavit-lm fit-decoder")


@pytest.fixture
def decoder(tiny_decoder: Any) -> VectorDecoder:
    """For N vectors of width 16; 16 features of width 32, images of 16 pixels."""
    config = VectorReaderConfig(16, N, 32, 16, depth=1, heads=2, hidden_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return VectorDecoder(VectorReader(config), tiny_decoder)


@pytest.fixture
def parts(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any, tmp_path: Path) -> dict[str, str]:
    """Directories of a language model that predicts vectors, and of a pixel decoder."""
    processor, model = built(tiny_tokenizer)
    visual, fingerprint = tmp_path / "visual", tiny_tokenizer.fingerprint()
    tiny_tokenizer.save_pretrained(visual)
    save_model(tmp_path / "lm", model, processor, EMU, str(visual), fingerprint)
    tiny_decoder.save_pretrained(tmp_path / "pixels")
    return {"model": str(tmp_path / "lm"), "pixel_decoder": str(tmp_path / "pixels")}


def training(parts: dict[str, str], **settings: Any) -> EmuDecoderTraining:
    small = {"depth": 1, "heads": 2, "hidden_size": 32, "lr": 5e-3, "warmup_steps": 1}
    return trainer_of(EmuDecoderTraining, **parts, **{**small, "ema_decay": 0.6, **settings})


def generated(seed: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, N, 16, generator=generator(seed))


def test_vectors_replace_features(decoder: VectorDecoder):
    vectors = generated(0)
    tokens = decoder.conditioning(vectors).tokens
    of_codes = decoder.pixels.conditioner(VisualCodes.from_list([[1, 2], [3]], 16))
    assert tokens.shape == of_codes.tokens.shape
    other = vectors.clone()
    other[0, N - 1] += torch.linspace(-1, 1, 16)
    moved = decoder.conditioning(other).tokens
    assert torch.equal(moved[1], tokens[1]) and (moved[0] - tokens[0]).abs().max() > 1e-4
    swapped = decoder.conditioning(vectors.flip(1)).tokens
    assert (swapped - tokens).abs().max() > 1e-5, "the order of vectors matters"


def test_guidance(decoder: VectorDecoder):
    """At a scale of 1 the conditional prediction alone; at others that of the null vectors is
    subtracted.
    """
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    vectors, null, other = generated(0), generated(1, 1), generated(2, 1)

    def drawn(null: torch.Tensor, scale: float) -> torch.Tensor:
        both = ImageVectors(vectors, null)
        return decoder.decode(both, generator(), guidance_scale=scale, **options)

    given = decoder.conditioning(vectors)
    alone = decoder.pixels.decode_condition(given, given, 2, 1.0, generator(), output_type="pt")
    assert torch.equal(drawn(null, 1.0), alone) and torch.equal(drawn(other, 1.0), alone)
    assert not torch.equal(drawn(null, 3.0), drawn(other, 3.0))
    assert not torch.equal(drawn(null, 3.0), drawn(torch.zeros(1, N, 16), 3.0))
    outputs = ImageVectors(vectors, null)
    images = decoder.decode(outputs, [generator(1), generator(2)], num_inference_steps=2)
    assert [image.size for image in images] == [(16, 16)] * 2


def test_what_does_not_fit(decoder: VectorDecoder, tiny_decoder: Any):
    shape = rf"expected {N} vectors of width 16 per image, got shape \[2, 5, 16\]"
    with pytest.raises(ValueError, match=shape):
        decoder.decode(ImageVectors(torch.zeros(2, 5, 16), torch.zeros(1, 5, 16)))
    reader, count = VectorReader(VectorReaderConfig(16, N, 32, 9)), "the reader makes 9"
    with pytest.raises(ValueError, match=f"pixel decoder needs 16 features of width 32, {count}"):
        VectorDecoder(reader, tiny_decoder)
    with pytest.raises(ValueError, match="a hidden_size that is a multiple of heads"):
        VectorReaderConfig(16, N, 32, 9, heads=5)


def test_saved_and_loaded(decoder: VectorDecoder, tmp_path: Path):
    decoder.save_pretrained(tmp_path / "decoder")
    loaded = VectorDecoder.from_pretrained(tmp_path / "decoder")
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    outputs = ImageVectors(generated(0), generated(1, 1))
    images = [d.decode(outputs, generator(), **options) for d in (decoder, loaded)]
    assert torch.equal(*images)
    half = tmp_path / "half"
    decoder.save_pretrained(half, torch.float16)
    assert load_file(half / "reader.safetensors")["positions"].dtype == torch.float16
    VectorDecoder.from_pretrained(half)
    good = load_file(half / "reader.safetensors")
    for state, reason in (
        ({n: t for n, t in good.items() if n != "positions"}, "positions"),
        ({**good, "more": torch.zeros(1)}, "more"),
        ({**good, "positions": torch.zeros(1, 1)}, "positions"),
        ({**good, "positions": good["positions"] / 0}, r"positions holds NaN or infinity"),
    ):
        save_file(state, half / "reader.safetensors")
        with pytest.raises(WeightsError, match=reason):
            VectorDecoder.from_pretrained(half)
    config = half / "vector_decoder.json"
    values = json.loads(config.read_text())
    wrong = ({**values, "version": 2}, {"format": 1}, {**values, "reader": {"width": 3}}, [])
    for text in ("{", *map(json.dumps, wrong)):
        config.write_text(text)
        with pytest.raises(WeightsError, match="expected the directory of a decoder of vectors"):
            VectorDecoder.from_pretrained(half)
    with pytest.raises(WeightsError, match="is shipped with this version"):
        VectorDecoder.from_pretrained("default")
    with pytest.raises(WeightsError, match="expected an existing directory or a Hub id"):
        VectorDecoder.from_pretrained(tmp_path / "nothing")
    decoder.reader.positions.data[0] = float("nan")
    with pytest.raises(WeightsError, match="not saved"):
        decoder.save_pretrained(tmp_path / "broken")


def test_trained_on_generated_vectors(parts: dict[str, str]):
    module, keeps = training(parts), training(parts, cache_vectors=True)
    lm = MultimodalLM.from_pretrained(parts["model"], decoder=None)
    captions = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]]
    vectors, first = module.vectors(captions), keeps.vectors(captions)
    expected = lm.generate_vectors_batch(captions)
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-4)
    assert module.vectors.cached == {} and set(keeps.vectors.cached) == set(CAPTIONS[:2])
    assert keeps.vectors.cached[CAPTIONS[0]].dtype == torch.float16
    assert torch.equal(keeps.vectors(captions[:1])[0], first[0])
    assert (first - vectors).abs().max() < 1e-2
    images = torch.randint(256, (3, 3, 16, 16), generator=generator(), dtype=torch.uint8)

    def loss(captions: list[str], drop: float) -> torch.Tensor:
        with torch.no_grad():
            return module.diffusion_loss(images, captions, generator(), condition_drop=drop)

    dropped, whole = loss(captions, 1.0), loss(captions, 0.0)
    torch.testing.assert_close(dropped, loss([""] * 3, 0.0))
    assert abs(float(whole - dropped)) > 1e-7


def test_two_processes_measure_together(parts: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    one, two = training(parts), training(parts)
    one.measure(CAPTIONS)
    monkeypatch.setattr(EmuDecoderTraining, "num_processes", 2)
    two.all_gather = lambda own: torch.stack([own, two.vectors(CAPTIONS[2:])])  # type: ignore[method-assign]
    two.measure(CAPTIONS[:2])
    torch.testing.assert_close(two.reader.mean, one.reader.mean)
    torch.testing.assert_close(two.reader.deviation, one.reader.deviation)
    assert (one.reader.deviation < 0.5).all() and one.reader.mean.abs().max() > 0.1
    one.reader.measure(torch.ones(2, N, 16))
    assert (one.reader.deviation == 1).all(), "one prompt alone tells no deviation"


def test_what_is_trained(parts: dict[str, str], tmp_path: Path):
    whole, before = training(parts), training(parts, train_unet=False, fresh_keys=False)
    names = {name.split(".")[0] for name, p in whole.named_parameters() if p.requires_grad}
    assert names == {"reader", "projection", "unet"}
    assert {name.split(".")[0] for name in before.state_dict()} == {"reader", "projection"}
    unet = before.decoder.pixels.unet
    old = {name: p.clone() for name, p in unet.named_parameters()}
    renewed = {n for n, p in whole.unet.named_parameters() if not torch.equal(p, old[n])}
    assert renewed == {n for n in old if "attn2.to_k" in n or "attn2.to_v" in n} and renewed
    assert renew_keys(unet) == len(renewed)
    with pytest.raises(ValueError, match="new key and value projections must be trained"):
        training(parts, train_unet=False)
    with pytest.raises(ValueError, match=r"condition_drop: expected a number in 0\.\.1"):
        training(parts, condition_drop=1.5)
    with pytest.raises(ValueError, match=r"the data have none: set data\.caption_column"):
        whole.validation_step({"images": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, 0)
    processor, model = processor_and_model()
    out, visual = tmp_path / "codes", tmp_path / "visual"
    fingerprint = VisualTokenizer.from_pretrained(visual).fingerprint()
    save_model(out, model, processor, LaVIT(), str(visual), fingerprint)
    expected = r"one that generates vectors, got .*codes, which generates codes \(lavit\)"
    with pytest.raises(ValueError, match=expected):
        training({**parts, "model": str(out)})


def test_four_images_are_overfitted(parts: dict[str, str]):
    """The loss falls, by what the captions say and not only by what images have in common."""
    module = training(parts, lr=3e-3)
    pixels, vae = module.decoder.pixels, module.decoder.pixels.vae
    # Under this schedule the noisiest steps, where only the caption tells the color, weigh most.
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pixels.scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **schedule)
    colors = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 240]])
    images = colors.to(torch.uint8)[:, :, None, None].expand(-1, -1, 16, 16).repeat(4, 1, 1, 1)
    # Latents of a random VAE hardly depend on the color: that variance becomes 1.
    latents = vae_latents(vae, images[:4])
    vae.register_to_config(scaling_factor=vae.config.scaling_factor / float(latents.std(0).mean()))
    vae.register_to_config(shift_factor=float(latents.mean()) / 0.18215)
    captions = CAPTIONS * 4
    module.measure(captions)
    read = (module.vectors(CAPTIONS) - module.reader.mean) / module.reader.deviation
    assert abs(float(read.mean())) < 1e-5 and abs(float(read.square().mean()) - 1) < 1e-3

    @torch.no_grad()
    def loss(captions: list[str]) -> float:
        each = [module.diffusion_loss(images, captions, generator(s), 0.0) for s in range(4)]
        return float(torch.stack(each).mean())

    before = loss(captions)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for step in range(120):
        value = module.diffusion_loss(images, captions, generator(100 + step), 0.1)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    after, swapped = loss(captions), loss([*CAPTIONS[1:], CAPTIONS[0]] * 4)
    assert after < 0.5 * before and swapped > 1.3 * after, (before, after, swapped)
    module.unet.eval()
    noise = torch.randn(1, 4, 8, 8, generator=generator(1)).expand(4, -1, -1, -1)
    outputs = ImageVectors(module.vectors(CAPTIONS), module.vectors([""]))
    options: dict[str, Any] = {"num_inference_steps": 8, "output_type": "latent"}
    drawn = module.decoder.decode(outputs, latents=noise, guidance_scale=2.0, **options)
    distance = torch.cdist(drawn.flatten(1), drawn.flatten(1)) + torch.eye(4)
    assert distance.min() > 0.1, "from the same noise"


def fit(
    module: EmuDecoderTraining, images: Path, root: Path, steps: int, ckpt: str | None = None
) -> list[float]:
    """The loss of every step."""
    kept = {"every_n_train_steps": 1, "save_last": True, "save_top_k": -1}
    saved = pl.callbacks.ModelCheckpoint(root / "ckpt", **kept)
    losses = EachStep(lambda trainer, *_: float(trainer.callback_metrics["train/loss"]))
    options: dict[str, Any] = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = quiet_trainer(root, steps, losses, saved, enable_checkpointing=True, **options)
    data = ImageDataModule(str(images), 16, 8, caption_column="caption", cache=True)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False)
    return losses.values


def test_a_stopped_run_goes_on_exactly(parts: dict[str, str], folder: Path):
    out, images = folder / "out", folder / "pictures"
    whole, rest = training(parts), training(parts, out=str(out), prompts=("rain", ""), every=2)
    every = fit(whole, images, folder / "whole", 4)
    assert len(set(every)) == 4
    at = next((folder / "whole" / "ckpt").glob("*step=2*"))
    assert fit(rest, images, folder / "rest", 4, str(at)) == every[2:]
    other = rest.state_dict()
    for name, one in whole.state_dict().items():
        assert torch.equal(one, other[name]), name
    for one, two in zip(whole.ema.shadow_params, rest.ema.shadow_params, strict=True):
        assert torch.equal(one, two)
    saved = torch.load(at, weights_only=True)["state_dict"]
    names = {name.split(".")[0] for name in saved}
    assert names == {"reader", "projection", "unet"}, "no language model, no VAE"
    made = VectorDecoder.from_pretrained(out).reader.state_dict()
    with whole.averaged():
        for name, one in whole.reader.state_dict().items():
            assert torch.equal(one, made[name]), name
    sheets = [path.name for path in (folder / "rest" / "images").glob("*.png")]
    assert sheets == ["samples-0000004.png"]


def test_trained_and_used_by_command(parts: dict[str, str], folder: Path, capsys: Any):
    overrides = {
        "trainer.precision": 32,
        "trainer.accumulate_grad_batches": 1,
        "trainer.default_root_dir": folder / "run",
        "model.model": parts["model"],
        "model.pixel_decoder": parts["pixel_decoder"],
        "model.out": folder / "made",
        "model.schedule.warmup_steps": 1,
        "model.reader.hidden_size": 32,
        "model.reader.depth": 1,
        "model.reader.heads": 2,
        "data.data": folder / "pictures",
        "data.image_size": 16,
        "data.batch_size": 4,
    }
    for recipe in RECIPES:
        shutil.rmtree(folder / "made", ignore_errors=True)
        assert main(["fit-decoder", *two_steps(recipe, overrides)]) == 0
    assert len(RECIPES) == 2
    lm = MultimodalLM.from_pretrained(parts["model"], decoder=str(folder / "made"))
    options: dict[str, Any] = {"num_inference_steps": 2, "decoder_guidance_scale": 2.0}
    drawn = lm.generate_images("rain", 2, generator=generator(), **options)
    assert [image.size for image in drawn] == [(16, 16)] * 2
    command = ["generate", "rain", "--model", parts["model"], "--out"]
    decoder = ["--decoder", str(folder / "made"), "-n", "2", "--steps", "2"]
    assert main([*command, str(folder / "drawn"), *decoder]) == 0
    assert len(list((folder / "drawn").glob("*.png"))) == 2
    capsys.readouterr()
    assert main([*command, str(folder / "mode"), *decoder, "--mode", "mean"]) == 2
    expected = "--mode: expected a model that generates codes, this one makes vectors"
    assert expected in capsys.readouterr().err
    assert main([*command, str(folder / "none")]) == 2
    assert "no decoder of vectors is shipped with this version" in capsys.readouterr().err

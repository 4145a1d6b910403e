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
from helpers.trainers import trainer_of
from safetensors.torch import load_file, save_file

from lavit_lm import MultimodalLM
from lavit_lm.checkpoints.native import save_model
from lavit_lm.cli import main
from lavit_lm.objectives.emu.image_decoder import VectorDecoder, VectorReader, VectorReaderConfig
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.objectives.records import ImageVectors
from lavit_lm.training.emu_decoder import EmuDecoderTraining, renew_keys
from lavit_tok import ImageDataModule, VisualCodes, VisualTokenizer, WeightsError
from lavit_tok.training.denoising import vae_latents

FOLDER = Path(__file__).parents[3] / "recipes" / "lm"
RECIPES = sorted(
    path
    for path in FOLDER.glob("*.yaml")
    if "lavit-lm fit-decoder -c recipes/lm/" + path.name in path.read_text()
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def decoder(tiny_decoder: Any) -> VectorDecoder:
    """For N vectors of width 16; 16 features of width 32, images of 16 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return VectorDecoder(
            VectorReader(VectorReaderConfig(16, N, 32, 16, depth=1, heads=2, hidden_size=32)),
            tiny_decoder,
        )


@pytest.fixture
def parts(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any, tmp_path: Path) -> dict[str, str]:
    """Directories of a language model that predicts vectors, and of a pixel decoder."""
    processor, model = built(tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    save_model(
        tmp_path / "lm",
        model,
        processor,
        EMU,
        str(tmp_path / "visual"),
        tiny_tokenizer.fingerprint(),
    )
    tiny_decoder.save_pretrained(tmp_path / "pixels")
    return {"model": str(tmp_path / "lm"), "pixel_decoder": str(tmp_path / "pixels")}


def training(parts: dict[str, str], **settings: Any) -> EmuDecoderTraining:
    small = {
        "depth": 1,
        "heads": 2,
        "hidden_size": 32,
        "lr": 5e-3,
        "warmup_steps": 1,
        "ema_decay": 0.6,
    }
    return trainer_of(EmuDecoderTraining, **parts, **{**small, **settings})


def generated(seed: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, N, 16, generator=generator(seed))


def test_vectors_replace_features(decoder: VectorDecoder):
    vectors = generated(0)
    condition = decoder.conditioning(vectors)
    of_codes = decoder.pixels.conditioner(VisualCodes.from_list([[1, 2], [3]], 16))
    assert condition.tokens.shape == of_codes.tokens.shape
    other = vectors.clone()
    other[0, N - 1] += torch.linspace(-1, 1, 16)
    moved = decoder.conditioning(other).tokens
    assert (
        torch.equal(moved[1], condition.tokens[1])
        and (moved[0] - condition.tokens[0]).abs().max() > 1e-4
    )
    swapped = decoder.conditioning(vectors.flip(1)).tokens
    assert (swapped - condition.tokens).abs().max() > 1e-5, "which of the vectors it is matters"


def test_guidance(decoder: VectorDecoder):
    """At a scale of 1 the conditional prediction alone; at others what was said of nothing is
    subtracted.
    """
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    vectors, null = generated(0), generated(1, 1)

    def drawn(null: torch.Tensor, scale: float) -> torch.Tensor:
        return decoder.decode(
            ImageVectors(vectors, null), generator(), guidance_scale=scale, **options
        )

    given = decoder.conditioning(vectors)
    alone = decoder.pixels.decode_condition(given, given, 2, 1.0, generator(), output_type="pt")
    assert torch.equal(drawn(null, 1.0), alone) and torch.equal(drawn(generated(2, 1), 1.0), alone)
    assert not torch.equal(drawn(null, 3.0), drawn(generated(2, 1), 3.0))
    assert not torch.equal(drawn(null, 3.0), drawn(torch.zeros(1, N, 16), 3.0))
    outputs = ImageVectors(vectors, null)
    images = decoder.decode(outputs, [generator(1), generator(2)], num_inference_steps=2)
    assert [image.size for image in images] == [(16, 16)] * 2


def test_what_does_not_fit(decoder: VectorDecoder, tiny_decoder: Any):
    with pytest.raises(
        ValueError, match=rf"expected {N} vectors of width 16 per image, got shape \[2, 5, 16\]"
    ):
        decoder.decode(ImageVectors(torch.zeros(2, 5, 16), torch.zeros(1, 5, 16)))
    with pytest.raises(
        ValueError, match="the pixel decoder needs 16 features of width 32, the reader makes 9"
    ):
        VectorDecoder(VectorReader(VectorReaderConfig(16, N, 32, 9)), tiny_decoder)
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
    module = training(parts)
    lm = MultimodalLM.from_pretrained(parts["model"], decoder=None)
    captions = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]]
    torch.testing.assert_close(
        module.vectors(captions), lm.generate_vectors_batch(captions), atol=1e-5, rtol=1e-4
    )
    assert module.cached == {}
    keeps = training(parts, cache_vectors=True)
    first = keeps.vectors(captions)
    assert (
        set(keeps.cached) == set(CAPTIONS[:2]) and keeps.cached[CAPTIONS[0]].dtype == torch.float16
    )
    assert (
        torch.equal(keeps.vectors(captions[:1])[0], first[0])
        and (first - module.vectors(captions)).abs().max() < 1e-2
    )
    images = torch.randint(256, (3, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    with torch.no_grad():
        dropped = module.diffusion_loss(images, captions, generator(), condition_drop=1.0)
        of_nothing = module.diffusion_loss(images, [""] * 3, generator(), condition_drop=0.0)
        whole = module.diffusion_loss(images, captions, generator(), condition_drop=0.0)
    torch.testing.assert_close(dropped, of_nothing)
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
    lm = MultimodalLM.from_pretrained(parts["model"], decoder=None)
    out = tmp_path / "codes"
    save_model(
        out, model, processor, LaVIT(), str(tmp_path / "visual"), lm.visual_tokenizer.fingerprint()
    )
    with pytest.raises(
        ValueError,
        match=r"expected one that generates vectors, got .*codes, which generates codes \(lavit\)",
    ):
        training({**parts, "model": str(out)})


def test_four_images_are_overfitted(parts: dict[str, str]):
    """The loss falls, by what the words tell and not only by what images have in common."""
    module = training(parts, lr=3e-3)
    pixels, vae = module.decoder.pixels, module.decoder.pixels.vae
    pixels.scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )  # under which the noisiest steps, where nothing but words tells the color, weigh most
    colours = torch.tensor(
        [[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 240]], dtype=torch.uint8
    )
    images = colours[:, :, None, None].expand(-1, -1, 16, 16).repeat(4, 1, 1, 1)
    latents = vae_latents(
        vae, images[:4]
    )  # a random VAE's tell colors apart by little: make that unit variance
    vae.register_to_config(scaling_factor=vae.config.scaling_factor / float(latents.std(0).mean()))
    vae.register_to_config(shift_factor=float(latents.mean()) / 0.18215)
    captions = CAPTIONS * 4
    module.measure(captions)
    read = (module.vectors(CAPTIONS) - module.reader.mean) / module.reader.deviation
    assert abs(float(read.mean())) < 1e-5 and abs(float(read.square().mean()) - 1) < 1e-3

    def loss(captions: list[str]) -> float:
        with torch.no_grad():
            return (
                sum(
                    float(module.diffusion_loss(images, captions, generator(s), 0.0))
                    for s in range(4)
                )
                / 4
            )

    before = loss(captions)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for step in range(120):
        value = module.diffusion_loss(images, captions, generator(100 + step), 0.1)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    after, swapped = loss(captions), loss([*CAPTIONS[1:], CAPTIONS[0]] * 4)
    print(f"before {before:.3f}, after {after:.3f}, with other words {swapped:.3f}")
    assert after < 0.5 * before and swapped > 1.3 * after
    module.unet.eval()
    noise = torch.randn(1, 4, 8, 8, generator=generator(1)).expand(4, -1, -1, -1)
    options: dict[str, Any] = {
        "num_inference_steps": 8,
        "guidance_scale": 2.0,
        "output_type": "latent",
    }
    outputs = ImageVectors(module.vectors(CAPTIONS), module.vectors([""]))
    drawn = module.decoder.decode(outputs, latents=noise, **options)
    distance = torch.cdist(drawn.flatten(1), drawn.flatten(1)) + torch.eye(4)
    assert distance.min() > 0.1, "from the same noise"


def fit(
    module: EmuDecoderTraining, images: Path, root: Path, steps: int, ckpt: str | None = None
) -> Any:
    saved = pl.callbacks.ModelCheckpoint(
        root / "ckpt", every_n_train_steps=1, save_last=True, save_top_k=-1
    )
    output = Losses()
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"num_sanity_val_steps": 0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = pl.Trainer(
        max_steps=steps,
        default_root_dir=root,
        callbacks=[output, saved],
        enable_model_summary=False,
        **options,
    )
    data = ImageDataModule(str(images), 16, 8, caption_column="caption", cache=True)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False)
    return output


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def test_a_stopped_run_goes_on_exactly(parts: dict[str, str], folder: Path):
    whole, rest = (
        training(parts),
        training(parts, out=str(folder / "out"), prompts=("rain", ""), every=2),
    )
    every = fit(whole, folder / "pictures", folder / "whole", 4).values
    assert len(set(every)) == 4
    at = next((folder / "whole" / "ckpt").glob("*step=2*"))
    resumed = fit(rest, folder / "pictures", folder / "rest", 4, str(at)).values
    assert resumed == every[2:]
    for (name, one), other in zip(
        whole.state_dict().items(), rest.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    for one, other in zip(whole.ema.shadow_params, rest.ema.shadow_params, strict=True):
        assert torch.equal(one, other)
    saved = torch.load(at, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"reader", "projection", "unet"}, (
        "no language model, no VAE"
    )
    made = VectorDecoder.from_pretrained(folder / "out")
    with whole.averaged():
        for (name, one), other in zip(
            whole.reader.state_dict().items(), made.reader.state_dict().values(), strict=True
        ):
            assert torch.equal(one, other), name
    assert [path.name for path in (folder / "rest" / "images").glob("*.png")] == [
        "samples-0000004.png"
    ]


def test_trained_and_used_by_command(parts: dict[str, str], folder: Path, capsys: Any):
    for recipe in RECIPES:
        head = recipe.read_text()
        for word in ("command:", "hardware:", "time:", "expected:"):
            assert word in head
        words = [
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.num_nodes=1",
            "--trainer.strategy=auto",
        ]
        words += [
            "--trainer.max_steps=2",
            "--trainer.callbacks=[]",
            "--trainer.precision=32",
            "--trainer.logger=false",
        ]
        words += [
            "--trainer.limit_val_batches=1",
            "--trainer.enable_progress_bar=false",
            "--trainer.val_check_interval=2",
        ]
        words += ["--trainer.enable_checkpointing=false", "--trainer.accumulate_grad_batches=1"]
        words += [f"--trainer.default_root_dir={folder}/run", f"--model.model={parts['model']}"]
        words += [f"--model.pixel_decoder={parts['pixel_decoder']}", f"--model.out={folder}/made"]
        words += [
            "--model.schedule.warmup_steps=1",
            "--model.reader.hidden_size=32",
            "--model.reader.depth=1",
            "--model.reader.heads=2",
        ]
        words += [
            f"--data.data={folder}/pictures",
            "--data.image_size=16",
            "--data.batch_size=4",
            "--data.num_workers=0",
        ]
        shutil.rmtree(folder / "made", ignore_errors=True)
        assert main(["fit-decoder", "-c", str(recipe), *words]) == 0
    assert len(RECIPES) == 2
    lm = MultimodalLM.from_pretrained(parts["model"], decoder=str(folder / "made"))
    options: dict[str, Any] = {"num_inference_steps": 2, "decoder_guidance_scale": 2.0}
    assert [p.size for p in lm.generate_images("rain", 2, generator=generator(), **options)] == [
        (16, 16)
    ] * 2
    words = [
        "generate",
        "a red apple",
        "--model",
        parts["model"],
        "--decoder",
        str(folder / "made"),
    ]
    assert main([*words, "--out", str(folder / "drawn"), "-n", "2", "--steps", "2"]) == 0
    assert len(list((folder / "drawn").glob("*.png"))) == 2
    capsys.readouterr()
    assert main(["generate", "rain", "--model", parts["model"], "--out", str(folder / "none")]) == 2
    assert "no decoder of vectors is shipped with this version" in capsys.readouterr().err

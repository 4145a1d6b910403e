"""mode="sample" of nested codes: one pass from noise, and its training on an energy score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_nested import small_decoder, small_tokenizer
from helpers.trainers import fit_images
from PIL import Image
from torch.nn.functional import softplus

from lavit_tok import PixelDecoder, VisualCodes, VisualTokenizer
from lavit_tok.cli import main
from lavit_tok.decode.mean_decoder import MeanDecoder
from lavit_tok.decode.sample_decoder import SampleDecoder
from lavit_tok.encode.efficientnet import EfficientNetLite
from lavit_tok.training.discriminator import FeatureDiscriminator
from lavit_tok.training.energy_score import FeatureMaps, energy_score, neighborhoods
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig
from lavit_tok.training.sample_decoder_training import SampleDecoderTraining, random_view

ROWS = [[3, 1, 4], [9], list(range(16))]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def tokenizer() -> VisualTokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def decoder(tokenizer: VisualTokenizer) -> PixelDecoder:
    return small_decoder(tokenizer, sample=True)


@pytest.fixture(scope="module")
def codes() -> VisualCodes:
    return VisualCodes.from_list(ROWS, codebook_size=16)


@pytest.mark.parametrize("layers", [1, 2])
def test_begins_at_the_mean_decoder(decoder: PixelDecoder, layers: int) -> None:
    joined = torch.randn(2, 16, 72, generator=seeded(0))
    new = SampleDecoder.from_mean_decoder(decoder.mean_decoder, layers, 3).eval()
    assert new.noise_shape(2) == (2, 3, 16, 16)
    with torch.no_grad():
        drawn = new(joined, torch.zeros(2, 3, 16, 16))
        torch.testing.assert_close(drawn, decoder.mean_decoder(joined))


def test_every_grid_reads_noise_of_unit_variance(decoder: PixelDecoder) -> None:
    read: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        for layer in decoder.sample_decoder.noise
    ]
    noise = torch.randn(decoder.sample_decoder.noise_shape(64), generator=seeded(0))
    with torch.no_grad():
        decoder.sample_decoder(torch.zeros(64, 16, 72), noise)
    for hook in hooks:
        hook.remove()
    assert [x.shape[-1] for x in read] == [4, 8, 16]
    for x in read:
        assert float(x.std()) == pytest.approx(1, abs=0.05)


def test_noise_decides_and_steps_do_not(decoder: PixelDecoder, codes: VisualCodes) -> None:
    def draw(seed: int, steps: int = 4) -> torch.Tensor:
        options: Any = {"mode": "sample", "output_type": "pt", "generator": seeded(seed)}
        images: torch.Tensor = decoder(codes, num_inference_steps=steps, **options).images
        return images

    assert decoder.modes == ["mean", "sample"]
    assert torch.equal(draw(0), draw(0, 50)) and not torch.equal(draw(0), draw(1))
    assert not torch.equal(draw(0), decoder(codes, mode="mean", output_type="pt").images)
    default = decoder(codes, output_type="pt").images
    assert torch.equal(default, decoder(codes, mode="mean", output_type="pt").images)


def test_a_generator_for_each_image_makes_it_independent_of_the_batch(
    decoder: PixelDecoder, codes: VisualCodes
) -> None:
    options: Any = {"mode": "sample", "output_type": "pt"}
    together = decoder(codes, generator=[seeded(i) for i in range(3)], **options).images
    for i in range(3):
        alone = decoder(codes.take([i]), generator=[seeded(i)], **options).images
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    noise = torch.cat(
        [torch.randn(decoder.sample_decoder.noise_shape(1), generator=seeded(i)) for i in range(3)]
    )
    assert torch.equal(decoder(codes, latents=noise, **options).images, together)
    with pytest.raises(ValueError, match=r"latents: expected \[3, 8, 16, 16\]"):
        decoder(codes, latents=noise[:2], **options)
    with pytest.raises(ValueError, match="generator: expected"):
        decoder(codes, generator=[seeded(0)], **options)
    with pytest.raises(ValueError, match="mode 'sample': expected VisualCodes and pixels"):
        decoder(codes, mode="sample", output_type="latent")


def test_alone_it_is_the_default(decoder: PixelDecoder, codes: VisualCodes, tmp_path: Path) -> None:
    alone = PixelDecoder(decoder.conditioner, sample_decoder=decoder.sample_decoder)
    assert alone.modes == ["sample"]
    alone.save_pretrained(tmp_path / "d")
    loaded = PixelDecoder.from_pretrained(tmp_path / "d")
    expected = decoder(codes, mode="sample", generator=seeded(3), output_type="pt").images
    assert torch.equal(loaded(codes, generator=seeded(3), output_type="pt").images, expected)


def test_parts_that_do_not_fit(decoder: PixelDecoder, tiny_decoder: PixelDecoder) -> None:
    parts = tiny_decoder.conditioner, tiny_decoder.unet, tiny_decoder.vae, tiny_decoder.scheduler
    with pytest.raises(ValueError, match="expected unet or sample_decoder, got both"):
        PixelDecoder(*parts, sample_decoder=decoder.sample_decoder)
    with pytest.raises(ValueError, match="noise_channels: expected an integer of at least 1"):
        SampleDecoder(24, 16, 4, (16, 8, 8), groups=4, noise_channels=0)
    two = MeanDecoder(24, 16, 4, (16, 8, 8), 2, 4)
    with pytest.raises(ValueError, match="layers: expected at least 2, got 1"):
        SampleDecoder.from_mean_decoder(two)


def test_energy_score_is_least_for_draws_like_the_images() -> None:
    """Images are x + e. Draws of that kind score below their mean x and below too wide ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EfficientNetLite(stages=2).eval()
    shown = torch.rand(64, 3, 16, 16, generator=seeded(0)) - 0.5
    g = seeded(1)

    def draw(width: float) -> torch.Tensor:
        return shown + width * torch.randn(shown.shape, generator=g)

    images = draw(0.3)
    maps = FeatureMaps(network, (0, 1, 2), images)
    with torch.no_grad():
        right, blurred, wide, narrow = (
            float(
                energy_score(
                    *(maps(x) + neighborhoods(x) for x in (images, torch.cat([draw(w), draw(w)])))
                )
            )
            for w in (0.3, 0.0, 0.6, 0.1)
        )
    assert right < min(blurred, wide, narrow)


def test_views_are_inside_the_image_and_follow_the_generator() -> None:
    views = [random_view(100, seeded(i)) for i in range(50)]
    assert views == [random_view(100, seeded(i)) for i in range(50)]
    assert len(set(views)) > 40
    for top, left, side in views:
        assert 60 <= side <= 100 and min(top, left) >= 0 and max(top, left) + side <= 100


def test_the_two_losses_of_the_discriminator_have_separate_gradients() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminator = FeatureDiscriminator([3, 5], width=4)
    true = [torch.randn(2, c, 4, 4, generator=seeded(c)) for c in (3, 5)]
    decoded = [torch.randn(4, c, 4, 4, generator=seeded(9 + c)).requires_grad_() for c in (3, 5)]
    weights = list(discriminator.parameters())
    of_decoder, of_discriminator = discriminator.losses(true, decoded)
    of_decoder.backward()
    assert all(p.grad is None for p in weights) and all(x.grad is not None for x in decoded)
    before = [x.grad.clone() for x in decoded]  # type: ignore[union-attr]
    of_discriminator.backward()
    assert all(p.grad is not None for p in weights)
    assert all(torch.equal(x.grad, b) for x, b in zip(decoded, before, strict=True))  # type: ignore[arg-type]


def test_discriminator_learns_which_images_are_true_and_compares_those_of_the_same_codes() -> None:
    """Maps of decoded images have half the deviation of true ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminator = FeatureDiscriminator([4], width=16)
    optimizer, g = torch.optim.Adam(discriminator.parameters(), lr=1e-2), seeded(0)
    for _ in range(60):
        true = [torch.randn(8, 4, 8, 8, generator=g)]
        decoded = [0.5 * torch.randn(16, 4, 8, 8, generator=g)]
        of_decoder, of_discriminator = discriminator.losses(true, decoded)
        optimizer.zero_grad()
        of_discriminator.backward()
        optimizer.step()
    assert float(of_discriminator) < 0.6 < 0.7 < float(of_decoder)  # 0.69 without knowledge
    discriminator.eval()  # without an update of the spectral norms
    with torch.no_grad():
        of_decoder, of_discriminator = discriminator.losses(true, decoded)
        (t,), (d,) = discriminator(true), discriminator(decoded)
    # Decoded image i is one of the codes of true image i % 8
    higher = torch.stack([t[i % 8] - d[i] for i in range(16)])
    torch.testing.assert_close(of_decoder, softplus(higher).mean())
    torch.testing.assert_close(of_discriminator, softplus(-higher).mean())


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: VisualTokenizer, decoder: PixelDecoder
) -> Path:
    """16 images of noise on two colors, the tokenizer, and its decoder."""
    root, rng = tmp_path_factory.mktemp("sample"), np.random.default_rng(0)
    (root / "images" / "train").mkdir(parents=True)
    for i in range(16):
        image = np.full((32, 32, 3), rng.integers(60, 196, size=3), np.int64)
        image[:, 16:] = rng.integers(60, 196, size=3)
        image += rng.integers(-60, 60, size=image.shape)
        file = root / "images" / "train" / f"{i:02}.png"
        Image.fromarray(image.astype(np.uint8)).save(file)
    tokenizer.save_pretrained(root / "tokenizer")
    plain = MeanDecoder(24, 16, 4, (16, 8, 8), groups=4)  # the colors alone
    PixelDecoder(decoder.conditioner, mean_decoder=plain).save_pretrained(root / "decoder")
    return root


def fit(folder: Path, root: Path, steps: int, ckpt: Any = None, **arguments: Any) -> Any:
    module = SampleDecoderTraining(
        str(folder / "tokenizer"),
        str(folder / "decoder"),
        stages=(0, 1),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=10),
        **arguments,
    )
    return module, fit_images(module, folder, root, steps, ckpt)


def test_training_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    whole, _ = fit(folder, tmp_path, 4)
    _, trainer = fit(folder, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(folder, tmp_path, 4, str(tmp_path / "half.ckpt"))
    for name, value in whole.decoder.state_dict().items():
        assert torch.equal(value, resumed.decoder.state_dict()[name]), name


def test_training_lowers_the_score_and_learns_to_vary(folder: Path, tmp_path: Path) -> None:
    """The images have noise that one code cannot hold: draws learn to differ by some."""

    def measured(module: Any) -> tuple[float, float]:
        images = next(iter(module.trainer.datamodule.train_dataloader()))["images"]
        joined, pixels = module.condition(images, torch.full((8,), 1)), module.pixels(images)
        with torch.no_grad():
            first, second = module.draw(joined, seeded(0)).chunk(2)
            score = float(module.loss(joined, pixels, seeded(0))[1]["score"])
        return score, float((first - second).std())

    (score, spread), (new_score, new_spread) = (
        measured(fit(folder, tmp_path, steps)[0]) for steps in (1, 60)
    )
    assert new_score < 0.8 * score
    assert spread < 0.05 < new_spread


def test_reconstruct_by_the_command_line(
    folder: Path, decoder: PixelDecoder, tmp_path: Path
) -> None:
    decoder.save_pretrained(tmp_path / "d")
    args = ["reconstruct", str(folder / "images/train/00.png"), "--out", str(tmp_path / "out")]
    args += ["--tokenizer", str(folder / "tokenizer"), "--decoder", str(tmp_path / "d")]
    assert main([*args, "--mode", "sample", "--steps", "4", "--budget", "4"]) == 0
    narrow = Image.open(tmp_path / "out" / "sheet.png").width
    assert main([*args, "--budget", "4", "--overwrite"]) == 0
    # original, mean, sample and thumbnail; before without the mean
    assert Image.open(tmp_path / "out" / "sheet.png").width > 1.2 * narrow
    alone = ["--decoder", str(folder / "decoder"), "--budget", "4", "--overwrite"]
    assert main([*args, *alone, "--mode", "mean"]) == 0
    assert main([*args, *alone, "--mode", "sample"]) == 2


def test_what_it_cannot_train_on(
    folder: Path, tiny_tokenizer: VisualTokenizer, tiny_decoder: PixelDecoder, tmp_path: Path
) -> None:
    tokenizer, decoder = str(folder / "tokenizer"), str(folder / "decoder")
    with pytest.raises(ValueError, match=r"stages: expected some of 0\.\.3, got \(4,\)"):
        SampleDecoderTraining(tokenizer, decoder, stages=(4,))
    tiny_tokenizer.save_pretrained(tmp_path / "t")
    with pytest.raises(ValueError, match="expected nested codes and color_cells"):
        SampleDecoderTraining(str(tmp_path / "t"), decoder)
    tiny_decoder.save_pretrained(tmp_path / "d")
    with pytest.raises(ValueError, match="expected a pixel decoder with a mean decoder"):
        SampleDecoderTraining(tokenizer, str(tmp_path / "d"), stages=(0,))

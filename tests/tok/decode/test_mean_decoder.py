"""mode="mean": one deterministic forward pass, alone or beside diffusion; its training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_nested import SETTINGS, small_decoder, small_tokenizer
from helpers.trainers import fit_images
from PIL import Image
from torch.nn import functional as F

from lavit_tok import (
    PixelDecoder,
    TokenizerConfig,
    VisualCodes,
    VisualTokenizer,
    WeightsError,
)
from lavit_tok.decode.conditioner import Conditioner
from lavit_tok.decode.mean_decoder import MeanDecoder
from lavit_tok.training.mean_decoder_training import MeanDecoderTraining
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig

CONFIG = TokenizerConfig(**SETTINGS)
ROWS = [[3, 1, 4], [9], list(range(16))]


@pytest.fixture(scope="module")
def tokenizer() -> VisualTokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def decoder(tokenizer: VisualTokenizer) -> PixelDecoder:
    return small_decoder(tokenizer)


@pytest.fixture(scope="module")
def codes() -> VisualCodes:
    return VisualCodes.from_list(ROWS, codebook_size=16)


def test_new_decoder_gives_the_colors_of_the_cells(tokenizer: VisualTokenizer) -> None:
    """Colors of 4 x 4 cells of 8 x 8 pixels, arranged as in the image they were measured of."""
    from lavit_tok.encode.efficientnet import patch_colors

    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(image, (32, 32))
    joined = torch.cat([torch.zeros(1, 16, 24), 2 * patch_colors(image, 4) - 1], -1)
    decoder = MeanDecoder(24, 16, 4, (16, 8, 8))
    drawn = decoder(joined)
    assert drawn.shape == (1, 3, 32, 32)
    # Only the pixels themselves are computed with their neighbors
    assert [level[-1].kernel_size[0] for level in decoder.blocks] == [1, 1, 3]
    expected = F.interpolate(2 * image[..., ::2, ::2] - 1, (32, 32), mode="bilinear")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    torch.nn.init.constant_(decoder.blocks[-1][-1].bias, 0.25)  # the network's part is added
    torch.testing.assert_close(decoder(joined), expected + 0.25, rtol=0, atol=1e-5)


def test_deterministic_and_independent_of_the_batch(
    decoder: PixelDecoder, codes: VisualCodes
) -> None:
    together = decoder(codes, output_type="pt").images
    assert together.shape == (3, 3, 32, 32) and 0 <= together.min() <= together.max() <= 1
    assert torch.equal(together, decoder(codes, mode="mean", output_type="pt").images)
    for i in range(3):
        alone = decoder(codes.take([i]), output_type="pt").images
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    ((pil, *_),) = decoder(codes, height=20, width=40, return_dict=False)
    assert pil.size == (40, 20)


def test_modes_that_a_decoder_lacks(
    decoder: PixelDecoder, tiny_decoder: PixelDecoder, codes: VisualCodes
) -> None:
    assert decoder.modes == ["mean"] and tiny_decoder.modes == ["sample"]
    with pytest.raises(ValueError, match=r"mode: expected one of \['mean'\] .*'sample'"):
        decoder(codes, mode="sample")
    with pytest.raises(ValueError, match=r"mode: expected one of \['sample'\] .*'mean'"):
        tiny_decoder(codes, mode="mean")
    with pytest.raises(ValueError, match="expected VisualCodes and pixels, got output_type"):
        decoder(codes, output_type="latent")
    with pytest.raises(ValueError, match="height and width"):
        decoder(codes, height=0)


def test_both_modes_in_one_decoder(decoder: PixelDecoder, codes: VisualCodes) -> None:
    from diffusers import DDIMScheduler
    from helpers.small_diffusion import small_unet, small_vae

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        conditioner = Conditioner.for_tokenizer(
            CONFIG,
            decoder.conditioner.codebook,
            decoder.conditioner.reconstructor,
            cross_dims=(16,),
        )
        parts = conditioner, small_unet(16).eval(), small_vae().eval(), DDIMScheduler()
    both = PixelDecoder(*parts, mean_decoder=decoder.mean_decoder)
    both.set_progress_bar_config(disable=True)
    mean = both(codes, mode="mean", output_type="pt").images
    torch.testing.assert_close(mean, decoder(codes, output_type="pt").images)
    first, second = (
        both(codes, 2, generator=torch.Generator().manual_seed(0), **mode, output_type="pt").images
        for mode in ({}, {"mode": "sample"})
    )
    assert torch.equal(first, second) and first.shape != mean.shape


def test_parts_that_suffice_for_no_mode(decoder: PixelDecoder, tiny_decoder: PixelDecoder) -> None:
    with pytest.raises(ValueError, match="got no unet, no vae, no scheduler"):
        PixelDecoder(decoder.conditioner)
    with pytest.raises(ValueError, match="got no vae, no scheduler"):
        PixelDecoder(tiny_decoder.conditioner, tiny_decoder.unet)
    with pytest.raises(ValueError, match=r"mean_decoder\.width: expected 24 for this conditioner"):
        PixelDecoder(decoder.conditioner, mean_decoder=MeanDecoder(32, 16, 4, (8, 8, 8)))
    with pytest.raises(ValueError, match="expected cross_dims for a U-Net"):
        decoder.conditioner(VisualCodes.from_list([[1]], 16))


def test_saved_and_loaded(decoder: PixelDecoder, codes: VisualCodes, tmp_path: Path) -> None:
    expected = decoder(codes, output_type="pt").images
    decoder.save_pretrained(tmp_path / "d")
    assert not (tmp_path / "d" / "unet").exists()
    loaded = PixelDecoder.from_pretrained(tmp_path / "d")
    assert torch.equal(loaded(codes, output_type="pt").images, expected)
    decoder.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = PixelDecoder.from_pretrained(tmp_path / "half")
    torch.testing.assert_close(half(codes, output_type="pt").images, expected, rtol=0, atol=0.02)
    (tmp_path / "d" / "mean_decoder" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json"):
        PixelDecoder.from_pretrained(tmp_path / "d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: VisualTokenizer) -> Path:
    """16 images of two colors, and the tokenizer."""
    root, rng = tmp_path_factory.mktemp("mean"), np.random.default_rng(0)
    (root / "images" / "train").mkdir(parents=True)
    for i in range(16):
        image = np.full((32, 32, 3), rng.integers(256, size=3), np.uint8)
        image[:, 16:] = rng.integers(256, size=3)
        Image.fromarray(image).save(root / "images" / "train" / f"{i:02}.png")
    tokenizer.save_pretrained(root / "tokenizer")
    return root


def fit(folder: Path, root: Path, steps: int, ckpt: Any = None, **arguments: Any) -> Any:
    module = MeanDecoderTraining(
        str(folder / "tokenizer"),
        (16, 8, 8),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=1000),
        **arguments,
    )
    return module, fit_images(module, folder, root, steps, ckpt)


def test_training_lowers_the_error_and_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    whole, _ = fit(folder, tmp_path, 4, keep_features=True)
    _, trainer = fit(folder, tmp_path, 2, keep_features=True)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(folder, tmp_path, 4, str(tmp_path / "half.ckpt"), keep_features=True)
    for name, value in whole.decoder.state_dict().items():
        assert torch.equal(value, resumed.decoder.state_dict()[name]), name
    trained, trainer = fit(folder, tmp_path, 60)
    images = next(iter(trainer.datamodule.train_dataloader()))["images"]
    joined = trained.reconstruct(trained.features(images), torch.full((8,), 16))
    target = trained.pixels(images)
    with torch.no_grad():
        after = (trained.decoder(joined) - target).square().mean()
    before = (trained.decoder.enlarged(joined) - target).square().mean()
    assert after < 0.7 * before


def test_a_decoder_to_start_from(
    folder: Path, decoder: PixelDecoder, tiny_decoder: PixelDecoder, tmp_path: Path
) -> None:
    """Its weights are what is trained on; one of other codes or kind is refused."""
    first, _ = fit(folder, tmp_path, 1)
    first.export(tmp_path / "first")
    start = PixelDecoder.from_pretrained(tmp_path / "first")
    second = MeanDecoderTraining(str(folder / "tokenizer"), start_from=str(tmp_path / "first"))
    parts = {"decoder": start.mean_decoder, "conditioner": start.conditioner}
    for name, part in parts.items():
        state = getattr(second, name).state_dict()
        for key, value in part.state_dict().items():
            assert torch.equal(state[key], value), (name, key)
    assert all(p.requires_grad for p in second.decoder.parameters())
    tiny_decoder.save_pretrained(tmp_path / "diffusion")
    with pytest.raises(ValueError, match="diffusion: expected a pixel decoder with a mean decoder"):
        MeanDecoderTraining(str(folder / "tokenizer"), start_from=str(tmp_path / "diffusion"))
    changed = copy.deepcopy(decoder.conditioner)
    changed.codebook.embeddings.neg_()
    PixelDecoder(changed, mean_decoder=decoder.mean_decoder).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected a pixel decoder of this tokenizer's"):
        MeanDecoderTraining(str(folder / "tokenizer"), start_from=str(tmp_path / "other"))

"""Fixtures that several rooms' tests share: a tiny config, a tiny tokenizer, a few real photographs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network; huggingface_hub reads this at import

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from lavit_tok import TokenizerConfig, VisualTokenizer
from lavit_tok.selector import keep_scores


@pytest.fixture(scope="session")
def tiny_config() -> TokenizerConfig:
    """16 patches of 8 pixels, width 32, 16 codes of 4 numbers."""
    encoder: dict[str, Any] = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return TokenizerConfig(
        encoder=encoder, codebook_size=16, code_dim=4, merger_depth=2, reconstructor_depth=2, num_heads=2
    )


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Four photographs that scikit-image ships inside its package: three in colour, one grey."""
    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None, (
        "the photographs come with scikit-image: pip install -e '.[dev]'"
    )
    folder = Path(spec.origin).parent / "data"
    return [folder / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "camera.png")]


@pytest.fixture
def tiny_tokenizer(tiny_config: TokenizerConfig, photos: list[Path]) -> VisualTokenizer:
    """Seeded random weights; its selector keeps about a third of the photographs' patches, different numbers each.

    A fresh selector's scores differ by less than its bias, so that it keeps nearly all or nearly none: here they are
    spread out and shifted to their upper third. A new one for every test, so that a test may change it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = VisualTokenizer(tiny_config)
    with torch.no_grad():
        tokenizer.selector.judge[-1].weight *= 50
        scores = keep_scores(tokenizer.score(tokenizer.features(tokenizer.preprocess(photos))))
    tokenizer.selector.shift(-float(scores.flatten().quantile(2 / 3)))
    return tokenizer


@pytest.fixture
def tiny_decoder(tiny_tokenizer: VisualTokenizer) -> Any:
    """A PixelDecoder for tiny_tokenizer's codes with seeded random weights; draws 16 x 16 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from lavit_tok import PixelDecoder
    from lavit_tok.condition import Condition

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        condition = Condition.for_tokenizer(tiny_tokenizer, cross_dims=(16,))
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return PixelDecoder(condition, unet.eval(), vae.eval(), scheduler)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the run-time type checks, as users run it: what the library itself says to a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def folder(
    tiny_tokenizer: VisualTokenizer, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """For lavit_lm: a visual tokenizer, shards of 24 captioned crops of photographs, and a text tokenizer."""
    from lm_runs import CAPTIONS
    from PIL import Image as Picture
    from small_lms import small_tokenizer

    from lavit_tok.cli import main

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    for split, count in (("train", 24), ("validation", 6)):
        at = tmp_path / "pictures" / split
        at.mkdir(parents=True)
        lines = ["file_name,caption"]
        for i in range(count):
            photo = Picture.open(photos[i % 4]).convert("RGB")
            photo.crop((7 * i, 5 * i, 7 * i + 150, 5 * i + 120)).save(at / f"{i}.png")
            lines.append(f"{i}.png,{CAPTIONS[i % 4]}")
        (at / "metadata.csv").write_text("\n".join(lines))
    words = [str(tmp_path / "pictures"), "--tokenizer", str(tmp_path / "visual"), "--out", str(tmp_path / "shards")]
    assert main(["shards", *words]) == 0
    small_tokenizer("llama").save_pretrained(tmp_path / "text")
    return tmp_path

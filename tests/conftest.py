"""Environment of the tests, and the fixtures that many tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; read at import
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker: two workers of two threads each take longer on two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from lavit_tok import TokenizerConfig, VisualTokenizer
from lavit_tok.encode.selector import keep_scores


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
        encoder=encoder,
        codebook_size=16,
        code_dim=4,
        merger_depth=2,
        reconstructor_depth=2,
        num_heads=2,
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
    from diffusers import DDIMScheduler
    from helpers.small_diffusion import small_unet, small_vae

    from lavit_tok import PixelDecoder
    from lavit_tok.decode.conditioner import Conditioner

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        condition = Conditioner.for_tokenizer(
            tiny_tokenizer.config,
            tiny_tokenizer.quantizer.codebook,
            tiny_tokenizer.reconstructor,
            cross_dims=(16,),
        )
        unet, vae = small_unet(16), small_vae()
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return PixelDecoder(condition, unet.eval(), vae.eval(), scheduler)


@pytest.fixture(scope="module")
def scripts() -> Iterator[Callable[[str], Any]]:
    """Imports a benchmark by name: they are scripts beside each other, not a package."""
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield __import__
    sys.path.remove(folder)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the run-time type checks, as users run it: what the library itself says to a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def folder(
    tiny_tokenizer: VisualTokenizer,
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """For lavit_lm: a visual tokenizer, shards of 24 captioned crops of photographs, and a text tokenizer."""
    from helpers.lm_runs import CAPTIONS
    from helpers.small_lms import small_tokenizer
    from helpers.small_sets import captioned

    from lavit_tok.cli import main

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    for split, count in (("train", 24), ("validation", 6)):
        captioned(tmp_path / "pictures" / split, photos, [CAPTIONS[i % 4] for i in range(count)])
    words = [
        str(tmp_path / "pictures"),
        "--tokenizer",
        str(tmp_path / "visual"),
        "--out",
        str(tmp_path / "shards"),
    ]
    assert main(["shards", *words]) == 0
    small_tokenizer("llama").save_pretrained(tmp_path / "text")
    return tmp_path

"""Environment of the tests, and the fixtures that many tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; read at import
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker: two workers of two threads each take longer on two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import helpers.early_imports  # noqa: F401  before the two packages
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
    """Four photographs that scikit-image ships inside its package: three in color, one gray."""
    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None, (
        "the photographs come with scikit-image: pip install -e '.[dev]'"
    )
    folder = Path(spec.origin).parent / "data"
    return [folder / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "camera.png")]


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of `datasets` for this run; the user's is neither read nor written."""
    cache = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(cache)  # for processes that tests start
    if "datasets" in sys.modules:  # it read the variable when it was imported
        sys.modules["datasets"].config.HF_DATASETS_CACHE = cache
    return cache


@pytest.fixture(scope="session")
def shared_tokenizer(tiny_config: TokenizerConfig, photos: list[Path]) -> VisualTokenizer:
    """Seeded random weights. Keeps about a third of the patches of a photograph; not to be changed.

    The scores of a new selector differ by less than its bias, so that it keeps nearly all patches
    or nearly none. Here they are scaled, and shifted so that the upper third is positive.
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
def tiny_tokenizer(shared_tokenizer: VisualTokenizer) -> VisualTokenizer:
    """A copy of shared_tokenizer for each test, which may change it."""
    return copy.deepcopy(shared_tokenizer)


@pytest.fixture
def tiny_decoder(tiny_tokenizer: VisualTokenizer) -> Any:
    """A PixelDecoder for the codes of tiny_tokenizer: seeded random weights, 16 x 16 pixels."""
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


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without run-time type checks, as users run it: the library's own errors for wrong types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_folder(
    shared_tokenizer: VisualTokenizer, photos: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What training of a language model reads; not to be changed."""
    from helpers.lm_runs import CAPTIONS
    from helpers.small_lms import small_tokenizer
    from helpers.small_sets import captioned

    from lavit_tok.cli import main

    path = tmp_path_factory.mktemp("lm") / "folder"
    shared_tokenizer.save_pretrained(path / "visual")
    for split, count in (("train", 24), ("validation", 6)):
        captioned(path / "pictures" / split, photos, [CAPTIONS[i % 4] for i in range(count)])
    arguments = [str(path / "pictures"), "--tokenizer", str(path / "visual")]
    assert main(["shards", *arguments, "--out", str(path / "shards")]) == 0
    small_tokenizer("llama").save_pretrained(path / "text")
    return path


@pytest.fixture
def folder(shared_folder: Path, tmp_path: Path) -> Path:
    """For lavit_lm: visual/, pictures/ (24 + 6 captioned crops), their shards/, text/ tokenizer."""
    shutil.copytree(shared_folder, tmp_path, dirs_exist_ok=True)
    return tmp_path

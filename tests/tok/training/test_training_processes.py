"""Training in several processes: equal weights, statistics of all, each image in one of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.lm_runs import together
from helpers.small_diffusion import UNET, small_vae
from helpers.small_sets import captioned
from helpers.trainers import fit_decoder, fit_tokenizer

RECIPE = Path(__file__).parents[3] / "recipes" / "paper" / "tokenizer.yaml"
STRATEGY = yaml.safe_load(RECIPE.read_text())["trainer"]["strategy"]


def test_a_codebook_of_two_processes(tiny_config: Any, photos: list[Path], tmp_path: Path) -> None:
    """Through all stages of `lavit-tok fit`; counts and the mean feature are of both processes."""
    captioned(tmp_path / "images" / "train", photos, ["image"] * 40)
    first, second = together(
        2, fit_tokenizer, tmp_path, tiny_config, {"strategy": STRATEGY, "devices": 2}
    )
    for name, value in first[2].items():
        if not name.startswith(("recent_", "codebook.vq.zero")):
            np.testing.assert_array_equal(value, second[2][name], name)
    seen = [one + other for one, other in zip(first[0][:4], second[0][:4], strict=True)]
    images = [*itertools.chain(*seen)]
    assert sorted(images) == sorted({*images}) and len(images) == 32
    counts = float(first[2]["codebook.vq._codebook.cluster_size"].sum())
    expected = 2 * 4 * 16 / 3  # both batches, patches, the ratio of those that are kept
    for one, other in zip(first[1][3:], second[1][3:], strict=True):
        expected = 0.5 * expected + 0.5 * (one + other)
    assert counts == pytest.approx(expected, rel=1e-4)


def test_a_pixel_decoder_of_two_processes(
    tiny_tokenizer: Any, photos: list[Path], tmp_path: Path
) -> None:
    captioned(tmp_path / "images" / "train", photos, ["image"] * 40)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    small_vae(32).save_pretrained(tmp_path / "vae")
    options = {"strategy": "ddp", "devices": 2}
    first, second = together(2, fit_decoder, tmp_path, UNET, options)
    for name, value in first[1].items():
        np.testing.assert_array_equal(value, second[1][name], name)
    images = [*itertools.chain(*first[0], *second[0])]
    assert len({*images}) == len(images) == 24

"""Every training recipe of the library parses, and trains two steps at reduced width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.trainers import rectangles, two_steps

from lavit_tok import PixelDecoder, VisualTokenizer
from lavit_tok.cli import main

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/tokenizer.yaml"))
SELECTED = [recipe for recipe in RECIPES if recipe.parent.name != "default"]
CONFIG = {"codebook_size": 16, "code_dim": 4, "merger_depth": 1, "reconstructor_depth": 1}
CONFIG |= {"num_heads": 2}


def reduced(recipe: Path, data: Path, root: Path, encoder: dict[str, Any]) -> list[str]:
    """The recipe's arguments except width, devices, data and the steps of events."""
    overrides = {
        "data.data": data,
        "data.image_size": 32,
        "data.batch_size": 4,
        "data.streaming": "false",
        "trainer.default_root_dir": root,
        "model.encoder": "null",
        "model.config.encoder": json.dumps(encoder),
        **{f"model.config.{name}": value for name, value in CONFIG.items()},
        "model.selection.stop_sampling_step": 0,
        "model.codebook.start_step": 1,
        "model.schedule.warmup_steps": 1,
        "model.codebook.blend_steps": 1,
        "model.codebook.kmeans_samples": 64,
        "model.out": root / "tokenizer",
    }
    return two_steps(recipe, overrides)


def test_there_is_a_recipe_of_each_size() -> None:
    assert [r.parent.name for r in RECIPES] == ["base", "default", "paper", "selected"]


@pytest.mark.parametrize("recipe", SELECTED, ids=lambda r: r.parent.name)
def test_tokenizer_recipe_trains(recipe: Path, tmp_path: Path, tiny_config: Any) -> None:
    arguments = yaml.safe_load(recipe.read_text())
    frozen = arguments["model"]["selection"]["stop_sampling_step"]
    quantized = arguments["model"]["codebook"]["start_step"]
    assert 0 < frozen < quantized < arguments["trainer"]["max_steps"]
    (data := tmp_path / "data").mkdir()
    rectangles(data, train=24)
    threads = torch.get_num_threads()
    args = reduced(recipe, data, tmp_path / "run", dict(tiny_config.encoder))
    assert main(["fit", *args]) == 0
    torch.set_num_threads(threads)
    tokenizer = VisualTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert tokenizer.config.codebook_size == 16
    assert len(tokenizer.encode(data / "train" / "00.png")) == 1


def test_recipe_of_nested_codes_trains(tmp_path: Path) -> None:
    """`fit` reads from the recipe that codes are nested, and trains two steps at reduced width."""
    recipe = Path(__file__).parents[2] / "recipes/default/tokenizer.yaml"
    (data := tmp_path / "data").mkdir()
    rectangles(data, train=24)
    encoder = {"model_type": "efficientnet_lite", "image_size": 32, "patch_size": 8}
    encoder |= {"hidden_size": 24}
    args = [
        arg
        for arg in reduced(recipe, data, tmp_path / "run", encoder)
        if not any(n in arg for n in ("selection", "num_heads", "codebook.", "merger"))
    ]
    threads = torch.get_num_threads()
    sizes = ["--model.config.num_heads=3", "--model.config.patch_dim=8", "--model.error_steps=2"]
    assert main(["fit", *args, *sizes]) == 0
    torch.set_num_threads(threads)
    tokenizer = VisualTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert tokenizer.nested
    assert tokenizer.encode(data / "train" / "00.png").predicted_error is not None
    recipe = recipe.with_name("decoder.yaml")
    overrides = {
        "data.data": data,
        "data.image_size": 32,
        "data.batch_size": 4,
        "trainer.default_root_dir": tmp_path / "decoder-run",
        "model.tokenizer": tmp_path / "run" / "tokenizer",
        "model.channels": "[16, 8, 8]",
        "model.out": tmp_path / "decoder",
    }
    assert main(["fit-mean-decoder", *two_steps(recipe, overrides)]) == 0
    torch.set_num_threads(threads)
    del overrides["model.channels"]
    overrides |= {"model.decoder": tmp_path / "decoder", "model.stages": "[0, 1]"}
    overrides |= {"model.out": tmp_path / "both"}
    recipe = recipe.with_name("sample-decoder.yaml")
    assert main(["fit-sample-decoder", *two_steps(recipe, overrides)]) == 0
    torch.set_num_threads(threads)
    codes = tokenizer.encode(data / "train" / "00.png")
    decoder = PixelDecoder.from_pretrained(tmp_path / "both")
    for mode in ("mean", "sample"):
        assert decoder(codes, mode=mode).images[0].size == (32, 32)

"""Recipes of the model "selected": teacher and autoencoder parse, train a step, load again."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

RECIPES = Path(__file__).parents[2] / "recipes" / "selected"
COLORS = ("red", "green", "blue", "red")


@pytest.fixture
def recipes(monkeypatch):
    """The recipes' folder as `python recipes/selected/x.py` would have it on the path."""
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in ("command", "sentences", "teacher", "vae"):
        sys.modules.pop(name, None)


@pytest.fixture
def images(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = []
    for i in range(24):
        stream, color = io.BytesIO(), COLORS[i % 4]
        Image.new("RGB", (20, 20), color).save(stream, "PNG")
        image = {"bytes": stream.getvalue(), "path": None}
        records.append({"image": image, "caption": f"{color} square"})
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "images" / "train.parquet")
    return str(tmp_path / "images")


def run(module, monkeypatch, *arguments: str) -> None:
    name = Path(module.__file__).with_suffix(".yaml")
    tiny = ["--threads=0", "--trainer.precision=32-true", "--trainer.max_steps=2"]
    tiny += ["--data.batch_size=4", "--trainer.val_check_interval=1", "--trainer.logger=false"]
    tiny += ["--checkpoint.every_n_train_steps=1"]
    monkeypatch.setattr(sys, "argv", [module.__file__, "fit", "-c", str(name), *tiny, *arguments])
    module.main()


def test_the_teacher_recipe_leaves_a_plain_clip_vision_model(
    recipes, images, monkeypatch, tmp_path
):
    import sentences
    import teacher
    from safetensors.torch import load_file
    from transformers import CLIPVisionModel

    monkeypatch.setattr(
        sentences,
        "embed",
        lambda texts: torch.nn.functional.normalize(torch.randn(len(texts), 384)),
    )
    out = tmp_path / "teacher"
    run(teacher, monkeypatch, "--out", str(out), "--data.data", images, "--model.layers", "2")
    model = CLIPVisionModel.from_pretrained(out)
    assert model.config.num_hidden_layers == 2
    assert model(pixel_values=torch.zeros(1, 3, 64, 64)).last_hidden_state.shape == (1, 65, 192)
    assert load_file(out / "caption_projection.safetensors")["weight"].shape == (384, 192)
    assert (out / "numbers.json").exists()
    run(
        teacher,
        monkeypatch,
        "--out",
        str(out),
        "--data.data",
        images,
        "--model.layers",
        "2",
        "--ckpt_path",
        "last",
    )


def test_teacher_losses_ignore_duplicates_and_mask_the_given_ratio(recipes):
    import teacher

    model = teacher.Teacher(layers=1, mask_probability=1.0, mask_ratio=(0.3, 0.6))
    text = torch.eye(384)[[0, 1, 0, 2]]
    perfect, swapped = model.contrast(text, text), model.contrast(text[[2, 1, 0, 3]], text)
    assert torch.allclose(perfect, swapped)  # images 0 and 2 have the same caption
    assert perfect < model.contrast(text[[1, 0, 2, 3]], text)
    generator = torch.Generator().manual_seed(0)
    masked = model.draw_mask(2000, generator).float().mean(1)
    assert 0.44 < masked.mean() < 0.46
    assert not teacher.Teacher(layers=1, mask_probability=0.0).draw_mask(10, generator).any()
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[0, 1, 4:8, 8:12] = 1  # green, lower left quarter of the second patch
    # The mean, 1/4, and half of the difference from it
    details = model.low_pass(pixels)[0, 1].tolist()
    assert details == [0] * 4 + [0.125, 0.125, 0.625, 0.125] + [0] * 4


def test_the_autoencoder_recipe_leaves_a_plain_autoencoder_with_its_scaling_factor(
    recipes, images, monkeypatch, tmp_path
):
    import vae
    from diffusers import AutoencoderKL

    out = tmp_path / "vae"
    run(vae, monkeypatch, "--out", str(out), "--data.data", images, "--model.channels", "[8,8,8]")
    model = AutoencoderKL.from_pretrained(out)
    assert model.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 4, 16, 16)
    assert model.config.scaling_factor != 0.18215

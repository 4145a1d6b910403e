"""Any tokenizer can be measured: the adapters of the field's libraries, a user's own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_tokenizers
from PIL import Image

from lavit_tok import VisualCodes, VisualTokenizer

pytest.importorskip("scipy")
pytest.importorskip("torchmetrics")
pytestmark = pytest.mark.usefixtures("scripts")
SIDES = {
    "emu3": 4,
    "chameleon": 2,
    "janus": 2,
    "vqmodel": 8,
}  # cells a side at 32 pixels, of the small ones


@pytest.fixture
def folder(tmp_path: Path, photos: list[Path]) -> Path:
    """Five crops of photographs as the test split of an image folder."""
    target = tmp_path / "set" / "test"
    target.mkdir(parents=True)
    for i in range(5):
        image = Image.open(photos[i % len(photos)]).convert("RGB")
        image.crop((30 * i, 10 * i, 30 * i + 150, 10 * i + 120)).save(target / f"{i}.png")
    return tmp_path / "set"


def images(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", SIDES)
def test_grid_tokenizers_code_every_cell(name: str, scripts: Any) -> None:
    adapters = scripts("adapters")
    found = small_tokenizers.small(name)
    assert isinstance(found, adapters.ImageTokenizer)
    codes = found.encode(images())
    assert codes.lengths.tolist() == [SIDES[name] ** 2] * 3
    assert codes.codebook_size == 64
    assert codes.keep is not None and bool(codes.keep.all())
    assert (found.weights, found.decodes) == (adapters.RANDOM, name != "chameleon")
    for row, picture in zip(
        codes, images(), strict=True
    ):  # a picture's codes do not depend on its batch
        assert torch.equal(row, found.encode(picture[None])[0])
    assert (
        small_tokenizers.small(name).identity == found.identity
    )  # the same random weights each time
    with pytest.raises(ValueError, match="expected 32 pixels"):
        found.encode(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["emu3", "janus", "vqmodel"])
def test_grid_tokenizers_draw_what_their_own_forward_draws(name: str) -> None:
    """encode and then decode are the library's own forward pass, where it has one: no cell is in another place."""
    found = small_tokenizers.small(name)
    codes = found.encode(images(2))
    drawn = found.decode(codes)
    assert drawn.shape == (2, 3, 32, 32)
    assert drawn.dtype == torch.uint8
    pixels = images(2).float() / 127.5 - 1
    with torch.no_grad():
        if name == "vqmodel":
            expected = found.model(pixels).sample
        elif name == "janus":
            expected = found.model(pixels)[0]
        else:
            tokens = torch.stack(
                found.model.encode(pixels, torch.tensor([[32, 32]] * 2)).image_tokens
            )
            expected = found.model.decode(tokens)
    bytes_ = ((expected.clamp(-1, 1) + 1) * 127.5).round()
    assert int((drawn.float() - bytes_).abs().max()) <= 1
    moved = VisualCodes(codes.values.flip(0), codes.lengths, codebook_size=64)
    assert not torch.equal(found.decode(moved), drawn)


def test_weights_count_by_what_uses_them() -> None:
    found = small_tokenizers.small("vqmodel")
    whole = sum(p.numel() for p in found.model.parameters())
    shared = found.model.quantize.embedding.weight.numel()
    assert found.parameters["encode"] + found.parameters["decode"] - shared == whole
    assert small_tokenizers.small("chameleon").parameters["decode"] == 0


def test_chameleon_only_encodes(scripts: Any) -> None:
    found = small_tokenizers.small("chameleon")
    with pytest.raises(ValueError, match="carries no decoder"):
        found.decode(found.encode(images()))


def test_saved_weights_are_read_back(scripts: Any, tmp_path: Path) -> None:
    adapters = scripts("adapters")
    found = small_tokenizers.small("janus")
    with torch.no_grad():
        found.model.quantize.embedding.weight.mul_(2)
    found.model.save_pretrained(tmp_path / "janus")
    again = adapters.load(f"janus:{tmp_path / 'janus'}", image_size=32)
    assert again.weights == "janus"
    assert torch.equal(again.encode(images()).values, found.encode(images()).values)
    assert (
        again.identity.split()[-1]
        == found.identity.split()[-1]
        != small_tokenizers.small("janus").identity
    )


def test_tokenizers_by_name(scripts: Any, tmp_path: Path, tiny_tokenizer: VisualTokenizer) -> None:
    adapters = scripts("adapters")
    tiny_tokenizer.save_pretrained(tmp_path / "own")
    own = adapters.load(str(tmp_path / "own"))
    assert isinstance(own, adapters.Lavit)
    assert (own.image_size, own.codebook_size, own.most_codes, own.decodes) == (32, 16, 16, False)
    assert torch.equal(own.encode(images()).values, tiny_tokenizer.encode(images()).values)
    assert own.encode(images(), budget=3).lengths.tolist() == [3, 3, 3]
    assert adapters.load("helpers.small_tokenizers:emu3").name == "emu3"
    for name, message in (
        ("helpers.small_tokenizers:no_tokenizer", "without name, weights"),
        ("helpers.small_tokenizers:nothing", "PYTHONPATH"),
        ("no_such_module:anything", "PYTHONPATH"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.load(name)
    with pytest.raises(ValueError, match="draws its pictures itself"):
        adapters.load("helpers.small_tokenizers:emu3", decoder="default")
    with pytest.raises(ValueError, match="that 16 divides"):
        adapters.load("chameleon", image_size=40)


def test_tokens_of_another_tokenizer(scripts: Any, folder: Path, tmp_path: Path) -> None:
    script = scripts("tokens_per_image")
    words = [
        "--data",
        folder,
        "--tokenizer",
        "helpers.small_tokenizers:chameleon",
        "--out",
        tmp_path / "out",
    ]
    script.main(script.arguments().parse_args(list(map(str, words))))
    found = json.loads((tmp_path / "out" / "tokens_per_image.json").read_text())
    assert (found["tokenizer"], found["weights"], found["image_size"]) == (
        "chameleon",
        "random weights",
        32,
    )
    counts = found["codes_per_image"]
    assert (counts["min"], counts["max"], counts["std"]) == (4, 4, 0)
    assert found["spearman_with_jpeg_size"] is None  # a count that never varies follows nothing
    text = (tmp_path / "out" / "tokens_per_image.md").read_text()
    assert "**Random weights**" in text
    assert "keep ratio" not in text


def test_pictures_of_another_tokenizer(
    scripts: Any, folder: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Pixel measures for any tokenizer that decodes; those of our features for ours alone."""
    script = scripts("reconstruction")
    words = [
        "--data",
        folder,
        "--tokenizer",
        "helpers.small_tokenizers:vqmodel",
        "--seeds",
        1,
        "--out",
        tmp_path / "out",
    ]
    script.main(script.arguments().parse_args(list(map(str, words))))
    found = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert "features" not in found and "curve" not in found
    assert found["codes_per_image"] == 64
    (distance,) = found["pixels"]["distances"]
    assert distance["name"].startswith(
        "Frechet distance in the shipped encoder's space (not FID) [only 5 pictures"
    )
    assert "random weights" in distance["name"]
    pictures = scripts("picture_sets").load_pictures(str(folder), 32).pixels
    codec = small_tokenizers.small("vqmodel")
    drawn = codec.decode(codec.encode(pictures)).float() / 255
    expected = scripts("metrics").pixel_scores(drawn, pictures.float() / 255)
    assert {k: found["pixels"]["per_seed"][0][k] for k in expected} == pytest.approx(
        expected, rel=1e-5
    )


def test_a_tokenizer_that_only_encodes_is_refused_for_pictures(
    scripts: Any, folder: Path, capsys: Any
) -> None:
    script, common = scripts("reconstruction"), scripts("common")
    words = ["--data", str(folder), "--tokenizer", "helpers.small_tokenizers:chameleon"]
    assert common.run(script.main, script.arguments().parse_args(words)) == 2
    assert "nothing can be measured" in capsys.readouterr().err

"""The shipped model "default": its codes are fixed, follow the image, and decode to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_tok import PixelDecoder, Shards, VisualTokenizer, WeightsError, visualize
from lavit_tok.checkpoints.weights import PACKAGE, SHIPPED, find_directory
from lavit_tok.cli import main
from lavit_tok.cli.items import photographs
from lavit_tok.data.decode_batch import generators
from lavit_tok.data.shard_manifest import ShardError
from lavit_tok.encode.image_files import open_image

# fmt: off
GOLDEN = {
    "slow": [
        129, 213, 3575, 3328, 2048, 3896, 760, 1009, 709, 3702, 3132, 3112,
        1416, 637, 3939, 3558, 3240, 3739, 3466, 2728, 1857, 2883, 4025, 1136,
        1914, 3877, 2651, 1555, 971, 926, 2845, 2621,
    ],
    "fast": [
        564, 2236, 1531, 3942, 2476, 740, 3861, 1800, 1595, 2080, 3044, 805,
        476, 1792, 490, 1187, 143, 596, 3517, 3396, 486, 639, 3517, 1768,
        2745, 3415, 639, 1994, 3993, 3517, 665, 84,
    ],
    "disk": [
        3961, 15, 3437, 858, 1536, 155, 3726, 1294, 4019, 3238, 2366, 1183,
        322, 678, 3611, 2771, 3939, 585, 3879, 2504, 2165, 2985, 3482, 264,
        2774, 3328, 2309, 709, 223, 4094, 3193, 3708,
    ],
}
# fmt: on


@pytest.fixture(scope="module")
def tokenizer() -> VisualTokenizer:
    return VisualTokenizer.from_pretrained("default")


@pytest.fixture(scope="module")
def decoder() -> PixelDecoder:
    return PixelDecoder.from_pretrained("default")


def synthetic() -> dict[str, Image.Image]:
    """Images of smooth waves, so that rounding differences move no feature far."""
    y, x = np.mgrid[0:128, 0:128] / 128
    waves = {
        "slow": (np.sin(3 * x), np.cos(2 * y), np.sin(4 * (x + y))),
        "fast": (np.sin(20 * x), np.sin(25 * y), np.cos(17 * (x - y))),
        "disk": tuple(
            np.where((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.08, c, -c) for c in (0.9, 0, -0.6)
        ),
    }
    return {
        name: Image.fromarray(((np.stack(parts, -1) + 1) * 127.5).round().astype(np.uint8))
        for name, parts in waves.items()
    }


def test_codes_are_fixed(tokenizer: VisualTokenizer) -> None:
    """Stored codes stay readable; a few may differ with another CPU's rounding."""
    for name, image in synthetic().items():
        codes = tokenizer.encode(image, budget=32)[0].tolist()
        same = sum(a == b for a, b in zip(codes, GOLDEN[name], strict=True))
        assert same >= 30, (name, codes)


def test_a_plain_image_needs_fewer_codes(tokenizer: VisualTokenizer) -> None:
    lengths = tokenizer.encode(photographs()).lengths
    plain = int(tokenizer.encode(Image.new("RGB", (128, 128), "white")).lengths[0])
    assert plain < lengths.double().mean() / 4
    assert len(set(lengths.tolist())) > 4


def test_more_codes_are_closer(tokenizer: VisualTokenizer, decoder: PixelDecoder) -> None:
    """PSNR rises with every doubling, and codes for all budgets are prefixes of one encoding."""
    originals = torch.stack(
        [tokenizer.image_processor.resize(Image.open(p).convert("RGB")) for p in photographs()]
    )
    whole, last = tokenizer.encode(originals, budget=256), 0.0
    for budget in (1, 4, 16, 64, 256):
        codes = whole.truncate(torch.full((len(originals),), budget))
        assert codes.to_list() == tokenizer.encode(originals, budget=budget).to_list()
        drawn = decoder(codes, mode="mean", output_type="pt").images
        error = (drawn - originals.float() / 255).square().mean((1, 2, 3))
        psnr = float(-10 * error.log10().mean())
        assert psnr > last
        last = psnr
    assert last > 20


def test_requests(tokenizer: VisualTokenizer) -> None:
    images = photographs()
    low, high = (tokenizer.encode(images, rate=rate).lengths for rate in (0.01, 0.0005))
    assert bool((low <= high).all()) and low.sum() < high.sum()
    reached = tokenizer.encode(images, quality=("psnr", 15), verify=True)
    colors = tokenizer.reconstruct_patches(reached).colors.clamp(0, 1)
    from lavit_tok.encode.efficientnet import patch_colors

    pixels = torch.stack(
        [tokenizer.image_processor.resize(Image.open(p).convert("RGB")) for p in images]
    )
    error = (colors - patch_colors(pixels.float() / 255, 16)).square().mean((1, 2))
    assert float(-10 * error.log10().min()) > 14.99


def test_by_name(tmp_path: Path, capsys: Any) -> None:
    """The decoder follows the tokenizer, in `reconstruct` and in `decode`."""
    image = str(photographs()[0])
    args = ["--budget", "8", "--out"]
    assert main(["reconstruct", image, *args, str(tmp_path / "sheets")]) == 0
    assert "8 of 256 codes" in capsys.readouterr().out
    assert main(["encode", image, *args, str(tmp_path / "codes.jsonl")]) == 0
    assert main(["decode", str(tmp_path / "codes.jsonl"), "--out", str(tmp_path / "images")]) == 0
    (file,) = (tmp_path / "images").glob("*.png")
    assert Image.open(file).size == (128, 128)
    assert main(["reconstruct", image, *args, str(tmp_path / "no"), "--decoder", "selected"]) == 2
    assert find_directory("default", "tokenizer") == PACKAGE / "default" / "tokenizer"
    assert find_directory("selected", "tokenizer") == PACKAGE / "selected" / "tokenizer"
    with pytest.raises(WeightsError, match="nested: expected 'default', 'selected', an existing"):
        find_directory("nested", "tokenizer")
    with pytest.raises(WeightsError, match="expected 'default', an existing directory"):
        find_directory("selected", tmp_path)


def test_codes_of_the_other_shipped_model_are_refused_with_a_remedy(
    tmp_path: Path, capsys: Any
) -> None:
    """Files of the model "selected" name their tokenizer "default" if they are of older versions.

    So do shards and language models. The codebook's fingerprint distinguishes them.
    """
    for name, fingerprint in SHIPPED.items():
        assert VisualTokenizer.from_pretrained(name).fingerprint() == fingerprint, name
        assert PixelDecoder.from_pretrained(name).conditioner.fingerprint() == fingerprint, name
    image, file = str(photographs()[0]), tmp_path / "codes.jsonl"
    assert main(["encode", image, "--tokenizer", "selected", "--out", str(file)]) == 0
    file.write_text(file.read_text().replace('"tokenizer": "selected"', '"tokenizer": "default"'))
    decode = ["decode", str(file), "--out", str(tmp_path / "images")]
    capsys.readouterr()
    assert main(decode) == 2
    assert "(tokenizer 'selected'): they would decode" in (error := capsys.readouterr().err)
    assert "--decoder selected decodes them" in error
    assert main([*decode, "--decoder", "selected", "--steps", "1"]) == 0
    (folder := tmp_path / "album").mkdir()
    Image.open(image).save(folder / "a.png")
    shards = ["shards", str(folder), "--out", str(tmp_path / "shards")]
    assert main([*shards, "--tokenizer", "selected"]) == 0
    assert main(shards) == 2
    assert "use --tokenizer selected, of which they are, or" in capsys.readouterr().err
    opened = Shards.open(tmp_path / "shards", "train")
    with pytest.raises(ShardError, match="visual_tokenizer: selected has their codebook"):
        opened.require(fingerprint=SHIPPED["default"])


def test_reconstruct_as_in_the_readme(
    tokenizer: VisualTokenizer, decoder: PixelDecoder, tmp_path: Path, capsys: Any
) -> None:
    """Panels of 256 pixels: original, default length, 64 codes in both modes, thumbnail, 256."""

    def panels(*request: str) -> list[Any]:
        out = tmp_path / f"sheets{len(request)}"
        assert main(["reconstruct", *request, "--out", str(out)]) == 0
        sheet = np.asarray(Image.open(out / "000000-chelsea.png"))
        assert (out / "sheet.png").read_bytes() == (out / "000000-chelsea.png").read_bytes()
        return [sheet[20:276, x : x + 256] for x in range(4, sheet.shape[1], 260)]

    image = str(photographs()[1])
    assert Path(image).name == "chelsea.png"
    whole = tokenizer.encode(image, 256)
    lengths = [int(tokenizer.encode(image).lengths[0]), 64, 256]
    _, first, second, thumbnail, sample, last = panels(image)
    assert f"{lengths[0]:7d} of 256 codes  {image}" in capsys.readouterr().out
    for length, panel in zip(lengths, (first, second, last), strict=True):
        (drawn,) = decoder(whole.truncate(length)).images
        assert np.array_equal(panel, drawn.resize((256, 256), Image.Resampling.BICUBIC)), length
    noise = generators(0, [0])
    (drawn,) = decoder(whole.truncate(64), mode="sample", generator=noise).images
    assert np.array_equal(sample, drawn.resize((256, 256), Image.Resampling.BICUBIC))
    small = tokenizer.image_processor.resize(Image.open(image).convert("RGB"))
    enlarged = visualize.thumbnail(open_image(small), 64 * 12)
    assert np.array_equal(thumbnail, enlarged.resize((256, 256), Image.Resampling.BICUBIC))
    requested = panels(image, "--budget", "64")
    for panel, expected in zip(requested[1:], (second, thumbnail, sample), strict=True):
        assert np.array_equal(panel, expected)
    requested = panels(image, "--budget", "64", "--mode", "sample")
    for panel, expected in zip(requested[1:], (sample, thumbnail), strict=True):
        assert np.array_equal(panel, expected)


def test_size_of_the_weights() -> None:
    files = (PACKAGE / "default").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) < 40e6

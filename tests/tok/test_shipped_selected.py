"""The shipped model "selected": few codes, which identify images and decode to similar ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lavit_tok import PixelDecoder, VisualCodes, VisualTokenizer
from lavit_tok.cli import main
from lavit_tok.cli.items import photographs


@pytest.fixture(scope="module")
def tokenizer() -> VisualTokenizer:
    return VisualTokenizer.from_pretrained("selected")


@pytest.fixture(scope="module")
def codes(tokenizer: VisualTokenizer) -> VisualCodes:
    return tokenizer.encode(photographs())


def test_encodes_in_different_numbers_of_codes(
    tokenizer: VisualTokenizer, codes: VisualCodes
) -> None:
    patches = tokenizer.config.num_patches
    assert int(codes.lengths.min()) >= 1
    assert 0.1 * patches < codes.lengths.double().mean() < 0.7 * patches
    assert len(set(codes.lengths.tolist())) > 3
    assert (
        len(codes.values.unique()) > len(codes.values) / 4
    )  # a collapsed codebook gives a handful
    assert tokenizer.encode(photographs()).to_list() == codes.to_list()


def test_a_flat_picture_needs_fewer_codes(tokenizer: VisualTokenizer, codes: VisualCodes) -> None:
    flat = tokenizer.encode(Image.new("RGB", (64, 64), (90, 120, 160)))
    assert int(flat.lengths[0]) < codes.lengths.double().mean()


def test_codes_tell_the_features(tokenizer: VisualTokenizer, codes: VisualCodes) -> None:
    """Reconstructed features are most similar to those of their own image."""
    features = tokenizer.features(tokenizer.preprocess(photographs()))
    drawn = tokenizer.reconstruct_features(codes)
    center = features.mean((0, 1))
    similar = F.cosine_similarity(
        (drawn - center)[:, None], (features - center)[None], dim=-1
    ).mean(-1)
    assert torch.equal(similar.argmax(1), torch.arange(len(codes)))


def test_pixels_resemble_the_picture(tokenizer: VisualTokenizer, codes: VisualCodes) -> None:
    """At 8 x 8 pixels, a decoded image correlates with its original, far more than with others."""
    decoder = PixelDecoder.from_pretrained("selected")
    decoder.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(codes))]
    drawn = decoder(codes, 20, generator=generators, output_type="pt").images
    size = tokenizer.config.image_size
    assert drawn.shape == (len(codes), 3, size, size)
    originals = [
        np.asarray(Image.open(p).convert("RGB").resize((size, size), 3)) for p in photographs()
    ]
    target = torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2).float() / 255
    small = [F.adaptive_avg_pool2d(x, 8).flatten(1) for x in (drawn, target)]
    a, b = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in small)
    correlation = a @ b.T / a.shape[1]
    own = correlation.diagonal().mean()
    others = (correlation.sum() - correlation.trace()) / (len(codes) * (len(codes) - 1))
    assert own > 0.5
    assert own > others + 0.3


def test_reconstruct_without_images_takes_photographs(tmp_path: Path, capsys: Any) -> None:
    assert main(["reconstruct", "--tokenizer", "selected", "--out", str(tmp_path / "out")]) == 0
    assert "8 images" in capsys.readouterr().out
    assert (tmp_path / "out/sheet.png").stat().st_size > 10_000
    assert len(list((tmp_path / "out").glob("0*.png"))) == 8

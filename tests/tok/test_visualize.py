"""visualize.py: the figures are those of its docstring, pixel for pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_tok.visualize import TEXT_HEIGHT, _shortened, kept_overlay, sheet

DRAWING = """
aabb
aabb
ccdd
ccdd
"""
OVERLAY = """
aa..
aa..
,,dd
,,dd
"""
COLOURS = {
    "a": (200, 0, 0),
    "b": (0, 100, 40),
    "c": (255, 255, 255),
    "d": (1, 2, 3),
    ".": (0, 25, 10),
    ",": (63, 63, 63),
}


def drawn(text: str) -> np.ndarray:
    """Every letter is a square of 2 x 2 pixels."""
    pixels = np.array(
        [[COLOURS[letter] for letter in line] for line in text.split()], dtype=np.uint8
    )
    return pixels.repeat(2, axis=0).repeat(2, axis=1)


@pytest.mark.parametrize("form", ["pil", "array", "tensor"])
def test_dropped_patches_are_dimmed_and_kept_ones_untouched(form: str) -> None:
    pixels = drawn(DRAWING)
    image = {
        "pil": Image.fromarray(pixels),
        "array": pixels,
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
    }[form]
    overlay = kept_overlay(image, torch.tensor([True, False, False, True]), (2, 2))
    assert np.array_equal(np.asarray(overlay), drawn(OVERLAY))


def test_all_or_none_kept() -> None:
    pixels = drawn(DRAWING)
    assert np.array_equal(np.asarray(kept_overlay(pixels, [True] * 4, (2, 2))), pixels)
    assert np.array_equal(
        np.asarray(kept_overlay(pixels, [False] * 4, (2, 2), dim=0.0)), np.zeros_like(pixels)
    )


def test_a_picture_that_the_grid_does_not_divide() -> None:
    grey = np.full((5, 7, 3), 100, dtype=np.uint8)
    dimmed = np.asarray(kept_overlay(grey, [False, True], (1, 2)))[..., 0]
    assert (dimmed == 25).sum(1).tolist() == [
        4
    ] * 5  # 7 columns: 4 belong to the first patch, 3 to the second


def test_as_many_decisions_as_patches() -> None:
    with pytest.raises(ValueError, match="expected 2 x 2 decisions, got 3"):
        kept_overlay(drawn(DRAWING), [True, False, True], (2, 2))


def test_sheet_places_every_picture() -> None:
    colours = ["red", "green", "blue"]
    red, green, blue = (Image.new("RGB", (6, 5), colour) for colour in colours)
    pixels = np.asarray(sheet([[red, green], [], [blue]], gap=2))
    expected = np.full((2 + 5 + 2 + 5 + 2, 2 + 6 + 2 + 6 + 2, 3), 255, dtype=np.uint8)
    expected[2:7, 2:8] = np.asarray(red)[0, 0]
    expected[2:7, 10:16] = np.asarray(green)[0, 0]
    expected[9:14, 2:8] = np.asarray(blue)[0, 0]
    assert np.array_equal(pixels, expected)


def test_titles_and_labels_are_written_outside_the_pictures() -> None:
    image = Image.new("RGB", (80, 20), "red")
    plain = sheet([[image, image]], gap=4)
    named = np.asarray(
        sheet([[image, image]], titles=["first", "second"], labels=[["one", "two"]], gap=4)
    )
    assert named.shape == (plain.height + 2 * TEXT_HEIGHT, plain.width, 3)
    top = 4 + TEXT_HEIGHT
    assert np.array_equal(named[top : top + 20], np.asarray(plain)[4:24])
    for band in (
        named[4:top],
        named[top + 20 :],
    ):  # black on white under the left and the right column
        assert band[:, 4:84].min() < 100
        assert band[:, 88:168].min() < 100


def test_a_label_never_reaches_into_the_next_column() -> None:
    from PIL import ImageFont

    font = ImageFont.load_default()
    text = _shortened("a/very/long/folder/chelsea.png", 80, font)
    assert font.getlength(text) <= 80
    assert text.startswith("..") and text.endswith("chelsea.png")
    assert _shortened("x.png", 80, font) == "x.png"


def test_nothing_to_lay_out() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        sheet([[], []])


def test_real_photograph(photos: list[Path]) -> None:
    with Image.open(photos[0]) as opened:
        image = opened.convert("RGB")
    keep = np.zeros(64, dtype=bool)
    keep[27] = True
    overlay = np.asarray(kept_overlay(image, keep, (8, 8)))
    patch = np.s_[3 * 64 : 4 * 64, 3 * 64 : 4 * 64]
    assert np.array_equal(overlay[patch], np.asarray(image)[patch])
    assert overlay.mean() < 0.3 * np.asarray(image).mean()

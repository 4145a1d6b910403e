"""Colors of objects by one rule: for the captions of recolored images and for the benchmark.

    image of one object on a plain ground -> named_color -> "red"
    cutout (RGBA), "red"                  -> recolor     -> the cutout, its hue moved

Hues are in degrees, saturation and value in 0..1, as PIL's HSV (steps of 1.4 degrees).
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
from PIL import Image

BOUNDS = (
    (14, "red"),
    (44, "orange"),
    (70, "yellow"),
    (165, "green"),
    (255, "blue"),
    (290, "purple"),
    (346, "pink"),
    (360, "red"),
)
"""The upper bound of every color's hues."""
DARK_BELOW, PALE_BELOW = 0.62, 0.55
"""Orange below this value is brown; red below this saturation, if bright, is pink."""
SATURATED, VISIBLE = 0.22, 0.2
"""A pixel of lower saturation or value has no hue."""
MOSTLY = 0.35
"""An object with a smaller fraction of pixels with a hue is black, gray or white."""
NEAR = 0.12
"""Pixels nearer than this to the ground's color, in every channel, are ground."""
NEIGHBORHOOD = 40
"""Degrees around the median hue that count as one color."""


class Target(NamedTuple):
    """A target color: its hue, the spread of that hue, its saturation and its value."""

    hue: float
    spread: float
    saturation: float
    value: float


HUES = {
    "red": Target(0, 7, 0.85, 0.85),
    "orange": Target(28, 5, 0.9, 0.97),
    "yellow": Target(55, 4, 0.85, 0.97),
    "green": Target(120, 25, 0.75, 0.7),
    "blue": Target(222, 16, 0.8, 0.85),
    "purple": Target(274, 7, 0.7, 0.75),
    "pink": Target(325, 10, 0.5, 0.98),
    "brown": Target(25, 5, 0.65, 0.45),
}
GRAYS = {"black": (0.0, 0.22), "gray": (0.4, 0.7), "white": (0.86, 1.0)}
"""Values of the darkest and of the lightest pixels of an object of this color."""
COLORS = (*HUES, *GRAYS)


class Measured(NamedTuple):
    """The color of an object."""

    name: str
    hue: float
    """Median, in degrees; nan if the object has no hue."""
    purity: float
    """Fraction of its pixels within NEIGHBORHOOD of the median hue (without hue: without any)."""


def hsv(rgb: np.ndarray) -> np.ndarray:
    """uint8 [... 3] -> float [... 3]: degrees, 0..1, 0..1."""
    flat = Image.fromarray(np.ascontiguousarray(rgb).reshape(1, -1, 3))
    values = np.asarray(flat.convert("HSV"), np.float32) / 255
    return values.reshape(rgb.shape) * np.array([360, 1, 1], np.float32)


def rgb(values: np.ndarray) -> np.ndarray:
    """The inverse of `hsv`; hues may exceed 360 degrees."""
    scaled = np.stack([values[..., 0] % 360 / 360, values[..., 1], values[..., 2]], -1)
    flat = (scaled.clip(0, 1) * 255).round().astype(np.uint8).reshape(1, -1, 3)
    return np.asarray(Image.fromarray(flat, "HSV").convert("RGB")).reshape(values.shape)


def apart(hues: np.ndarray, hue: float) -> np.ndarray:
    """Degrees from `hue`, -180 to 180."""
    return (hues - hue + 180) % 360 - 180


def median_hue(hues: np.ndarray) -> float:
    """The median on the circle: around the direction of the mean."""
    angles = np.radians(hues)
    center = math.degrees(math.atan2(np.sin(angles).mean(), np.cos(angles).mean()))
    return float((center + np.median(apart(hues, center))) % 360)


def measure(pixels: np.ndarray) -> Measured:
    """The color of an object's pixels, uint8 [n 3], n >= 1."""
    hues, saturation, value = hsv(pixels).T
    chromatic = (saturation >= SATURATED) & (value >= VISIBLE)
    if chromatic.mean() < MOSTLY:
        bright = float(np.median(value))
        name = "black" if bright < 0.3 else "white" if bright > 0.8 else "gray"
        return Measured(name, math.nan, float(1 - chromatic.mean()))
    hue = median_hue(hues[chromatic])
    near = chromatic & (np.abs(apart(hues, hue)) <= NEIGHBORHOOD)
    some = near if near.any() else chromatic
    pale, bright = float(np.median(saturation[some])), float(np.median(value[some]))
    name = next(name for bound, name in BOUNDS if hue <= bound)
    if name in ("red", "pink") and (hue < 14 or hue > 340):
        name = "pink" if pale < PALE_BELOW and bright > 0.75 else "red"
    if bright < DARK_BELOW and 10 <= hue <= 50:
        name = "brown"
    return Measured(name, hue, float(near.mean()))


def foreground(image: np.ndarray) -> np.ndarray:
    """Where uint8 [h w 3] differs from its ground, the median of the border: bool [h w].

    Pixels beside the ground are left out, since they mix both colors.
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(border, axis=0)
    far = np.abs(image.astype(np.int16) - ground.astype(np.int16)) > NEAR * 255
    inside = far[..., 0] | far[..., 1] | far[..., 2]
    padded = np.pad(inside, 1)
    beside = padded[1:-1, :-2] & padded[1:-1, 2:] & padded[:-2, 1:-1] & padded[2:, 1:-1]
    eroded = inside & beside
    return eroded if eroded.any() else inside


def named_color(image: np.ndarray) -> str | None:
    """The color of the one object in uint8 [h w 3] on a plain ground; None if nothing is there."""
    inside = foreground(image)
    return measure(image[inside]).name if inside.mean() >= 0.005 else None


def recolor(cutout: Image.Image, color: str, draw: random.Random) -> Image.Image:
    """The cutout (RGBA) in one of COLORS.

    Pixels with a hue get that of the color, up to 15 degrees apart where theirs differ from the
    median. Saturation and value are scaled so that their medians are the color's. An object without
    hue gets the color's hue and saturation everywhere, and its own shades.
    """
    array = np.array(cutout)
    solid = array[..., 3] >= 128
    values = hsv(array[..., :3])
    hues, saturation, value = np.moveaxis(values, -1, 0)
    shade = 255 * value if color in HUES else np.asarray(cutout.convert("L"), np.float32)
    low, high = np.percentile(shade[solid], (3, 97))
    shade = ((shade - low) / max(high - low, 1)).clip(0, 1)
    if color in GRAYS:
        dark, light = GRAYS[color]
        values = np.stack([0 * hues, 0 * saturation, dark + (light - dark) * shade], -1)
    else:
        target = HUES[color]
        hue = target.hue + draw.uniform(-target.spread, target.spread)
        chromatic = (saturation >= SATURATED) & (value >= VISIBLE)
        if (chromatic & solid).sum() >= 0.5 * solid.sum():
            own = chromatic & solid
            around = apart(hues, median_hue(hues[own])).clip(-15, 15) * (target.spread / 15)
            tint = target.saturation / np.median(saturation[own])
            light = target.value / np.median(value[own])
            moved = np.stack([hue + around, saturation * tint, value * light], -1)
            values = np.where(chromatic[..., None], moved.clip([0, 0.25, 0.2], [720, 1, 1]), values)
        else:
            light = target.value * (0.55 + 0.55 * shade)
            pale = target.saturation * (1 - 0.3 * shade**4)
            values = np.stack([np.full_like(hues, hue), pale, light.clip(0, 1)], -1)
    return Image.fromarray(np.dstack([rgb(values), array[..., 3]]), "RGBA")

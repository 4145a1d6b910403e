"""One picture beside a benchmark's numbers: bars on top, examples with what was said of them below."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import common
from PIL import Image

ACROSS, SHOWN = 4, 12


def figure(
    path: Path,
    bars: dict[str, float],
    unit: str,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
) -> None:
    """Write a PNG.

    Args:
        bars: label -> value; none draws no bars.
        unit: of the values.
        pictures: the first SHOWN are shown, a text under each.
    """
    plt = common.pyplot()
    lines = math.ceil(min(len(pictures), SHOWN) / ACROSS)
    tallest = max((min(1.2, p.height / p.width) for p in pictures[:SHOWN]), default=0.0)
    heights = ([1.6] if bars else []) + [0.4 + 1.5 * tallest] * lines
    plot = plt.figure(figsize=(12, 0.6 + 1.5 * sum(heights)), layout="constrained")
    grid = plot.add_gridspec(len(heights), ACROSS, height_ratios=heights)
    if bars:
        axes = plot.add_subplot(grid[0, :])
        labels = [textwrap.fill(label, 60) for label in bars]
        drawn = axes.barh(labels, list(bars.values()), color="#4477aa")
        axes.bar_label(drawn, fmt="%.4g", padding=3)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    for i, (picture, text) in enumerate(zip(pictures[:SHOWN], texts, strict=False)):
        axes = plot.add_subplot(grid[i // ACROSS + bool(bars), i % ACROSS])
        axes.imshow(picture)
        axes.set_axis_off()
        safe = "\n".join(textwrap.shorten(line, 90, placeholder=" …") for line in text.splitlines())
        said = "\n".join(textwrap.fill(line, 34) for line in safe.splitlines())
        axes.set_title(said, fontsize=7, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # what a model says may have no letters in the font
        warnings.filterwarnings("ignore", "Glyph")
        plot.savefig(path, dpi=100)
    plt.close(plot)

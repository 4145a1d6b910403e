"""Plots of results, and sheets of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lavit_tok.encode.image_files import open_image
from lavit_tok.visualize import sheet


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def curves(path: Path, panels: dict[str, dict[str, Any]], xlabel: str) -> None:
    """Curves with error bars: panel -> name -> [(x, {"mean", "std"}), ...]."""
    options = {"figsize": (4.2 * len(panels), 3.6), "layout": "constrained", "squeeze": False}
    figure, grid = pyplot().subplots(1, len(panels), **options)
    for axis, (ylabel, lines) in zip(grid[0], panels.items(), strict=True):
        for name, points in lines.items():
            y, error = ([value[key] for _, value in points] for key in ("mean", "std"))
            marker = "o" if len(points) > 1 else "*"
            axis.errorbar([x for x, _ in points], y, error, label=name, marker=marker, markersize=8)
        axis.set(xlabel=xlabel, ylabel=ylabel)
    grid[0][0].legend(fontsize=8)
    save(figure, path)


def pairs(
    path: Path, left: Any, right: Any, titles: tuple[str, str], labels: Sequence[str] = ()
) -> None:
    """Images side by side, four pairs per line, with a label under each pair."""
    flat = [open_image(x) for pair in zip(left, right, strict=True) for x in pair]
    side = max(96, flat[0].width)
    flat = [image.resize((side, side), Image.Resampling.NEAREST) for image in flat]
    texts = [text for label in labels for text in (label, "")]
    starts = range(0, len(flat), 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [texts[i : i + 8] for i in starts] if texts else ()
    sheet([flat[i : i + 8] for i in starts], titles * 4, lines).save(path)

"""Image folders of crops of a few photographs, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def crop(photos: Sequence[Path], i: int) -> Image.Image:
    """150 x 120 pixels, different for each i."""
    return Image.open(photos[i % 4]).convert("RGB").crop((7 * i, 5 * i, 7 * i + 150, 5 * i + 120))


def captioned(
    at: Path, photos: Sequence[Path], captions: Sequence[str], sources: Sequence[str] | None = None
) -> None:
    """0.png, 1.png, ... below `at`, with metadata.csv: captions, and a column `source`."""
    at.mkdir(parents=True)
    lines = ["file_name,caption" + (",source" if sources else "")]
    for i, caption in enumerate(captions):
        crop(photos, i).save(at / f"{i}.png")
        lines.append(f"{i}.png,{caption}" + (f",{sources[i % len(sources)]}" if sources else ""))
    (at / "metadata.csv").write_text("\n".join(lines))

"""A folder of drawn shapes with captions: small data of any size for the other examples.

python examples/shapes.py shapes --count 300
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SIZE = 64


def draw(shape: str, color: str, background: str, rng: random.Random) -> Image.Image:
    """One shape of a random size and position."""
    image = Image.new("RGB", (SIZE, SIZE), background)
    side = rng.randint(SIZE // 3, SIZE // 2)
    left, top = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
    box = (left, top, left + side, top + side)
    canvas = ImageDraw.Draw(image)
    if shape == "circle":
        canvas.ellipse(box, color)
    elif shape == "square":
        canvas.rectangle(box, color)
    else:
        canvas.polygon(
            [(left + side / 2, top), (left + side, top + side), (left, top + side)], color
        )
    return image


def write_shapes(folder: str | Path, count: int, seed: int = 0) -> Path:
    """Write 00000.png, 00001.png, ... and metadata.csv (file_name, caption)."""
    folder, rng = Path(folder), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        for number in range(count):
            shape = rng.choice(("circle", "square", "triangle"))
            color, background = rng.sample(COLORS, 2)
            name = f"{number:05d}.png"
            draw(shape, color, background, rng).save(folder / name)
            table.writerow([name, f"a {color} {shape} on {background}"])
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=300)
    arguments = parser.parse_args()
    print(write_shapes(arguments.folder, arguments.count))

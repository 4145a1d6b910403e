"""A folder of 192 images of other origin than the training data, for measuring only.

    python recipes/data/held_out.py --raw RAW --out data/held-out

| images | from |
|---|---|
| 8 | photographs of scikit-image (installed with it) |
| 59 | OpenCV's samples: photographs, boards, test patterns (Debian opencv-doc) |
| 5 | photographs of puzzles (Debian palapeli-data) |
| 60 | Twitter's emoji, 64 pixels, on white (npm emoji-datasource-twitter) |
| 60 | painted portraits of the game Wesnoth (Debian wesnoth-1.16-data) |

Emoji and portraits are taken evenly from all, in the order of their names. Nothing is trained on
any of them. Licenses are those of the packages; no image is part of this project.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from fetch import fetch_package

from lavit_tok.cli.items import photographs

EMOJI = "emoji-datasource-twitter"
SOURCES = (
    ("opencv-doc", "usr/share/doc/opencv-doc/examples/data/*.jpg", 59),
    ("palapeli-data", "usr/share/palapeli/collection/*.jpg", 5),
    (EMOJI, "package/img/twitter/64/*.png", 60),
    ("wesnoth-1.16-data", "usr/share/games/wesnoth/1.16/data/core/images/portraits/**/*.png", 60),
)


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """Up to `count` of them, evenly spaced."""
    count = min(count, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a folder of images for measuring only.")
    parser.add_argument("--raw", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    arguments = parser.parse_args(argv)
    found = photographs()
    for name, pattern, count in SOURCES:
        npm = name == EMOJI
        command = ["npm", "pack", "--silent", f"{name}@16.0.0"] if npm else ["apt-get", "download"]
        archives = f"{name}-*.tgz" if npm else f"{name}_*.deb"
        fetch_package(name, [*command, *([] if npm else [name])], archives, arguments.raw)
        found += spread(sorted((arguments.raw / name).glob(pattern)), count)
    folder = arguments.out / "test"  # else `datasets` finds splits in names of images
    folder.mkdir(parents=True)
    for number, path in enumerate(found):
        shutil.copyfile(path, folder / f"{number:03}-{path.name}")
    print(f"wrote {len(found)} images to {arguments.out}")


if __name__ == "__main__":
    main()

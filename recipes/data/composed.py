"""Compose images of real objects, with captions written from what was done.

    python recipes/data/composed.py --raw RAW --data OUT --out COMPOSED

| kind | example |
|---|---|
| color | a red bag |
| place | a small red heart in the upper left on white |
| pair | a cat beside a green tree |
| count | three blue apples |
| view | the left half of a guitar; a cup upside down; a close-up of a fish |
| plain | the images of OUT, their captions cleaned, and flipped or cropped views of some |

Objects are cut out by their transparency (emoji, clip arts, stamps) or from their black ground
(Fashion-MNIST). A color is moved and then named by measuring it (colors.py).

The test split holds what never occurs in training: every composed image of it shows a held-out
combination of color and object, or of two objects. Which ones they are depends on the hash of
their names; a combination that an unchanged image shows (a yellow banana) is not held out.
combinations.json lists them, records.jsonl what every composed image shows.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from build import SPLITS, write_split
from captions import NOTHING, clean
from colors import COLORS, HUES, Measured, measure, named_color, recolor
from objects import JUDGED, NOT_COUNTED, NOT_MIRRORED, mentioned, object_of, plural, with_article
from PIL import Image
from views import crop, encoded

SIZE = 128
SHARES = {"color": 0.42, "place": 0.2, "pair": 0.18, "count": 0.13, "view": 0.07}
"""Of the composed training images."""
TEST_IMAGES = {"place": 300, "pair": 500, "count": 200, "view": 100}
TEST_OF_COLOR = {True: 12, False: 2}
"""Test images of a held-out color and object, by whether the object is one of JUDGED."""
HELD_COLOR, HELD_PAIR = 20, 10
"""Percent of the combinations held out."""
PURE = 0.7
"""A natural color is named if this fraction of the object has it."""
PER_CAPTION = 40
"""Crops of one photograph or painting that are kept."""
PER_CLASS = 150
"""Images of a class of clothes that are kept unchanged, and that are cut out."""
WORDS = "wamerican/usr/share/dict/american-english"
GROUNDS = {
    "white": (255, 255, 255), "black": (20, 20, 20), "gray": (150, 150, 150),
    "blue": (90, 130, 220), "yellow": (250, 225, 90), "green": (110, 190, 110),
    "pink": (250, 175, 210), "red": (200, 60, 60), "purple": (150, 110, 200),
}  # fmt: skip
WHITE_GROUND = 0.6
SIDES = {"color": 118, "place": 77, "pair": 60, "count": 54, "view": 128}
"""The longest side of an object in each kind of scene, in pixels."""
PLACES = {
    "in the upper left": (-1, -1), "at the top": (0, -1), "in the upper right": (1, -1),
    "on the left": (-1, 0), "in the middle": (0, 0), "on the right": (1, 0),
    "in the lower left": (-1, 1), "at the bottom": (0, 1), "in the lower right": (1, 1),
}  # fmt: skip
SIZES = {"small": (0.28, 0.36), "large": (0.5, 0.6)}
RELATIONS = {
    "beside": (1, 0), "next to": (1, 0), "to the left of": (1, 0), "to the right of": (-1, 0),
    "above": (0, 1), "below": (0, -1),
}  # fmt: skip
"""Where the second object is, from the first."""
NUMBERS = ("one", "two", "three", "four")
VIEWS = {
    "{} upside down": None, "the left half of {}": (0, 0, 0.5, 1), "a close-up of {}": None,
    "the right half of {}": (0.5, 0, 1, 1), "the upper half of {}": (0, 0, 1, 0.5),
    "the lower half of {}": (0, 0.5, 1, 1),
}  # fmt: skip
WRITING = re.compile(
    r"letter|number|sign|flag|text|key|squared|symbol|button|clock|map|spades|hearts|clubs|"
    r"diamonds|book|logo|icon|coin|button|led|calendar|arrow"
)
"""Captions of images that are not flipped."""
SWAPPED = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Cutout:
    """An object of an image, with transparency around it."""

    name: str
    image: Image.Image
    natural: Measured
    key: str
    split: str
    license: str


@dataclass(frozen=True)
class Part:
    """An object of a scene: named in the caption by its color if it was measured there."""

    cutout: Cutout
    image: Image.Image
    shown: str
    """Its color, as measured."""
    named: bool

    @property
    def phrase(self) -> str:
        return f"{self.shown} {self.cutout.name}" if self.named else self.cutout.name

    @property
    def noun(self) -> str:
        return with_article(self.phrase, self.cutout.name)


@dataclass(frozen=True)
class Combinations:
    """Held-out combinations."""

    colors: frozenset[tuple[str, str]]
    """(color, object)."""
    pairs: frozenset[tuple[str, str]]
    """Two objects in alphabetical order."""

    def shown(self, parts: Sequence[Part]) -> set[tuple[str, str]]:
        """The held-out combinations that a scene of these parts shows."""
        colors = {(part.shown, part.cutout.name) for part in parts}
        names = sorted({part.cutout.name for part in parts})
        return (colors & self.colors) | (set(itertools.combinations(names, 2)) & self.pairs)

    def described(self, caption: str) -> set[tuple[str, str]]:
        """Those whose two names are words of a caption."""
        colors, names = mentioned(caption)
        found = set(itertools.product(colors, names)) & self.colors
        return found | (set(itertools.combinations(sorted(names), 2)) & self.pairs)


def draw_of(*seed: Any) -> random.Random:
    """A generator that depends on these values alone."""
    digest = hashlib.sha256(":".join(map(str, seed)).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def percent(*names: str) -> int:
    """0 to 99, by the hash of a combination."""
    return int.from_bytes(hashlib.sha256(" ".join(names).encode()).digest()[:8], "big") % 100


def held_out(cutouts: Sequence[Cutout]) -> Combinations:
    """The combinations that training must not show."""
    names = sorted({cutout.name for cutout in cutouts})
    natural = {(cutout.natural.name, cutout.name) for cutout in cutouts}
    colors = {pair for pair in itertools.product(HUES, names) if percent(*pair) < HELD_COLOR}
    pairs = {pair for pair in itertools.combinations(names, 2) if percent(*pair) < HELD_PAIR}
    return Combinations(frozenset(colors - natural), frozenset(pairs))


def cut_out(image: Image.Image) -> Image.Image | None:
    """The object of an image with transparency, at most SIZE on a side; None if it fills it."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    solid = np.asarray(image.getchannel("A")) >= 128
    thin = min(image.size) < 14 or min(image.size) * 5 < max(image.size)
    return None if thin or not 0.06 < solid.mean() < 0.97 else image


def cut_from_black(image: Image.Image) -> Image.Image | None:
    """A garment from its black ground: everything that black at the border does not reach."""
    from scipy.ndimage import binary_fill_holes, distance_transform_edt

    gray = np.asarray(image.convert("L"))
    inside = binary_fill_holes(gray > 20)
    rows, columns = distance_transform_edt(~inside, return_distances=False, return_indices=True)
    shades, alpha = (
        np.asarray(Image.fromarray(part).resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
        for part in (gray[rows, columns], inside.astype(np.uint8) * 255)
    )
    smooth = ((alpha / 255 - 0.3) / 0.4).clip(0, 1) * 255
    large = np.dstack([shades] * 3 + [smooth]).astype(np.uint8)
    return cut_out(Image.fromarray(large, "RGBA"))


def cutouts_of(rows: dict[str, Any], raw: Path) -> Iterator[Cutout]:
    """All objects with a name that can be cut out of the captioned images."""
    for split, examples in rows.items():
        clothes: collections.Counter[str] = collections.Counter()
        for row in examples:
            name, fashion = object_of(row["caption"]), row["source"] == "fashion-mnist"
            if name is None or ("#" in row["key"] and not fashion):
                continue
            clothes[name] += fashion
            if fashion and clothes[name] > PER_CLASS:
                continue
            if fashion:
                cut = cut_from_black(Image.open(io.BytesIO(row["image"]["bytes"])))
            else:
                with Image.open(raw / row["key"]) as opened:
                    alpha = "A" in opened.getbands() or "transparency" in opened.info
                    cut = cut_out(opened) if alpha else None
            if cut is not None:
                yield Cutout(name, cut, color_of(cut), row["key"], split, row["license"])


def color_of(cutout: Image.Image) -> Measured:
    """The color of a cutout's opaque pixels."""
    array = np.asarray(cutout)
    return measure(array[..., :3][array[..., 3] >= 128])


class Composer:
    """Makes scenes of cutouts.

    Args:
        cutouts: of one split, and of another one for objects that the split has not.
        combinations: held out.
    """

    def __init__(self, cutouts: Sequence[Cutout], combinations: Combinations) -> None:
        self.by_name: dict[str, list[Cutout]] = collections.defaultdict(list)
        for cutout in cutouts:
            self.by_name[cutout.name].append(cutout)
        self.names = sorted(self.by_name)
        self.combinations = combinations
        weights = [min(len(self.by_name[n]), 25) ** 0.5 for n in self.names]
        self.weights = [
            weight * (3 if name in JUDGED else 1)
            for name, weight in zip(self.names, weights, strict=True)
        ]

    def name(self, draw: random.Random) -> str:
        """An object, more often one of many images."""
        return draw.choices(self.names, self.weights)[0]

    def part(self, draw: random.Random, name: str, color: str | None, side: int) -> Part:
        """An object in this color; in its natural one if None, often named if it is pure.

        Args:
            side: pixels that are enough for its longer side.
        """
        cutout = draw.choice(self.by_name[name])
        image = cutout.image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        if name not in NOT_MIRRORED and draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if color is None:
            pure = cutout.natural.purity >= PURE and draw.random() < 0.5
            return Part(cutout, image, cutout.natural.name, pure)
        image = recolor(image, color, draw)
        return Part(cutout, image, color_of(image).name, True)

    def scene(
        self, kind: str, draw: random.Random, names: Sequence[str] = (), color: str | None = None
    ) -> dict[str, Any] | None:
        """The image, its caption and its record; None if a color came out as another one.

        Args:
            names: the objects; by default drawn, without a held-out combination.
            color: of the first object; drawn by default.
        """
        wanted = list(names) or [self.name(draw) for _ in range(2 if kind == "pair" else 1)]
        if len(set(wanted)) < len(wanted) or (kind == "count" and wanted[0] in NOT_COUNTED):
            return None
        chance = {"color": 0.9, "pair": 0.5}.get(kind, 0.65)
        parts = []
        for index, name in enumerate(wanted):
            drawn = draw.choice(COLORS) if draw.random() < chance else None
            target = color if color and index == 0 else drawn
            if not names and (target, name) in self.combinations.colors:
                return None
            parts.append(self.part(draw, name, target, SIDES[kind]))
            if target and parts[-1].shown != target:
                return None
        first = parts[0]
        if kind == "color" and not first.named:
            return None
        shown = {part.shown for part in parts}
        free = [name for name in GROUNDS if name not in shown and name != "white"]
        white = "white" not in shown and draw.random() < WHITE_GROUND
        ground = "white" if white else draw.choice(free)
        placed, caption, details = getattr(self, kind)(draw, parts)
        if ground != "white" or kind == "place":
            caption += " on white" if ground == "white" else f" on a {ground} background"
        image = on_ground(ground, placed)
        if kind in ("color", "place") and first.named and named_color(image) != first.shown:
            return None
        objects = [
            {"object": part.cutout.name, "color": part.shown, "named": part.named} for part in parts
        ]
        record = {"kind": kind, "objects": objects, "ground": ground, **details}
        return {
            "image": image,
            "caption": caption,
            "parts": parts,
            "record": record,
            "license": "; ".join(sorted({part.cutout.license for part in parts})),
        }

    def color(self, draw: random.Random, parts: list[Part]) -> tuple[list[Any], str, Any]:
        """One object, large."""
        side = draw.uniform(0.7, 0.92)
        x, y = (0.5 + draw.uniform(-1, 1) * (1 - side) / 3 for _ in "xy")
        caption = parts[0].noun
        if draw.random() < 0.15 and parts[0].cutout.name not in NOT_COUNTED:
            bare = parts[0].cutout.name
            caption = f"{with_article(bare, bare)} that is {parts[0].shown}"
        return [(parts[0].image, side, x, y)], caption, {}

    def place(self, draw: random.Random, parts: list[Part]) -> tuple[list[Any], str, Any]:
        """One object of one of two sizes in one of nine places."""
        size, place = draw.choice(list(SIZES)), draw.choice(list(PLACES))
        side = draw.uniform(*SIZES[size])
        x, y = (0.5 + step * (0.47 - side / 2) for step in PLACES[place])
        x, y = (value + draw.uniform(-0.02, 0.02) for value in (x, y))
        part = parts[0]
        caption = f"{with_article(f'{size} {part.phrase}', part.cutout.name)} {place}"
        return [(part.image, side, x, y)], caption, {"size": size, "place": place}

    def pair(self, draw: random.Random, parts: list[Part]) -> tuple[list[Any], str, Any]:
        """Two objects, beside or above each other."""
        relation = draw.choice(list(RELATIONS))
        dx, dy = RELATIONS[relation]
        placed = []
        for part, sign in zip(parts, (-1, 1), strict=True):
            x, y = (
                0.5 + sign * step * 0.26 + draw.uniform(-0.02, 0.02) * (3 - 2 * abs(step))
                for step in (dx, dy)
            )
            placed.append((part.image, draw.uniform(0.4, 0.45), x, y))
        caption = f"{parts[0].noun} {relation} {parts[1].noun}"
        return placed, caption, {"relation": relation}

    def count(self, draw: random.Random, parts: list[Part]) -> tuple[list[Any], str, Any]:
        """One to four of an object."""
        number = draw.randint(1, 4)
        corners = draw.sample(list(itertools.product((0.27, 0.73), repeat=2)), number)
        side, part = draw.uniform(0.3, 0.38), parts[0]
        placed = [
            (part.image, side, *(value + draw.uniform(-0.03, 0.03) for value in corner))
            for corner in corners
        ]
        phrase = part.phrase if number == 1 else f"{part.phrase}".removesuffix(part.cutout.name)
        noun = phrase if number == 1 else phrase + plural(part.cutout.name)
        return placed, f"{NUMBERS[number - 1]} {noun}", {"count": number}

    def view(self, draw: random.Random, parts: list[Part]) -> tuple[list[Any], str, Any]:
        """A half of an object, a part of it, or all of it upside down."""
        view = draw.choice(list(VIEWS))
        image, side = parts[0].image, draw.uniform(0.75, 0.9)
        box = VIEWS[view]
        if "upside" in view:
            image = image.transpose(Image.Transpose.ROTATE_180)
        elif box is None:
            side = draw.uniform(1.5, 1.9)
        else:
            width, height = image.size
            scaled = [round(v * length) for v, length in zip(box, (width, height) * 2, strict=True)]
            left, top, right, bottom = scaled
            image = image.crop((left, top, right, bottom))
        x, y = (0.5 + draw.uniform(-0.1, 0.1) * (side > 1) for _ in "xy")
        return [(image, side, x, y)], view.format(parts[0].noun), {"view": view.format("").strip()}


def on_ground(ground: str, placed: Sequence[tuple[Image.Image, float, float, float]]) -> np.ndarray:
    """Put cutouts on a plain ground: uint8 [SIZE SIZE 3].

    Args:
        placed: cutout, its longer side and its center, as ratios of SIZE.
    """
    canvas = Image.new("RGBA", (SIZE, SIZE), (*GROUNDS[ground], 255))
    for image, side, x, y in placed:
        scale = side * SIZE / max(image.size)
        width, height = (max(1, round(length * scale)) for length in image.size)
        scaled = image.resize((width, height), Image.Resampling.LANCZOS)
        layer = Image.new("RGBA", canvas.size)
        layer.paste(scaled, (round(x * SIZE - width / 2), round(y * SIZE - height / 2)))
        canvas = Image.alpha_composite(canvas, layer)
    return np.asarray(canvas.convert("RGB"))


def webp(image: np.ndarray) -> dict[str, Any]:
    """The image as an example's column."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=90, method=0)
    return {"bytes": buffer.getvalue(), "path": None}


def compose(
    composer: Composer, split: str, counts: dict[str, int], seed: int
) -> Iterator[dict[str, Any]]:
    """Composed examples without a held-out combination."""
    for kind, count in counts.items():
        for index in range(count):
            for attempt in itertools.count():
                scene = composer.scene(kind, draw_of(seed, split, kind, index, attempt))
                if scene and not composer.combinations.shown(scene["parts"]):
                    yield as_example(scene, kind, split, index)
                    break


def compose_test(composer: Composer, counts: dict[str, int], seed: int) -> Iterator[dict[str, Any]]:
    """Composed examples that all show a held-out combination."""
    known, combinations = set(composer.names), composer.combinations
    colors = sorted(pair for pair in combinations.colors if pair[1] in known)
    pairs = sorted(pair for pair in combinations.pairs if known.issuperset(pair))
    repeated = [pair for pair in colors for _ in range(TEST_OF_COLOR[pair[1] in JUDGED])]
    draw = draw_of(seed, "test")
    plans: dict[str, list[Any]] = {"color": repeated}
    for kind, count in counts.items():
        plans[kind] = draw.choices(pairs if kind == "pair" else colors, k=count)
    for kind, plan in plans.items():
        for index, combination in enumerate(plan):
            names = list(combination) if kind == "pair" else [combination[1]]
            color = None if kind == "pair" else combination[0]
            for attempt in range(20):
                own = draw_of(seed, "test", kind, index, attempt)
                own.shuffle(names)
                scene = composer.scene(kind, own, names, color)
                if scene and combinations.shown(scene["parts"]):
                    yield as_example(scene, kind, "test", index)
                    break


def as_example(scene: dict[str, Any], kind: str, split: str, index: int) -> dict[str, Any]:
    """The columns of the data set, and the record."""
    key = f"composed/{split}/{kind}/{index:05}"
    bases = [part.cutout.key for part in scene["parts"]]
    return {
        "image": webp(scene["image"]),
        "caption": scene["caption"],
        "source": f"composed-{kind}",
        "key": key,
        "license": scene["license"],
        "record": {"key": key, "split": split, **scene["record"], "bases": bases},
    }


def plain(
    split: str, examples: Any, cleaned: Any, combinations: Combinations
) -> Iterator[dict[str, Any]]:
    """The captioned images; in training, fewer crops of the same photograph, and some views."""
    seen: collections.Counter[str] = collections.Counter()
    train = split == "train"
    for row in examples:
        caption = cleaned(row["caption"], row["source"], row["key"])
        if split != "test" and combinations.described(caption):
            continue
        fashion = row["source"] == "fashion-mnist"
        cropped = "#" in row["key"] and not fashion
        limit = PER_CLASS if fashion else PER_CAPTION
        seen[row["caption"]] += fashion or cropped
        if train and (seen[row["caption"]] > limit or caption in NOTHING):
            continue
        example = {**row, "caption": caption}
        yield example
        draw = draw_of("view", row["key"])
        if not train or fashion or cropped or draw.random() < 0.75:
            continue
        mirrored = not WRITING.search(caption) and draw.random() < 0.6
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            key = f"{row['key']}@{'mirrored' if mirrored else 'cut'}"
            view = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else None
            view = crop(image, key) if view is None else view
            data = encoded(view, image.format or "PNG")
        swapped = re.sub(r"\b(left|right)\b", lambda found: SWAPPED[found[0]], caption)
        yield {
            **example,
            "image": {"bytes": data, "path": None},
            "caption": swapped if mirrored else caption,
            "key": key,
        }


def english(path: Path, rows: dict[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Words of the dictionary and of the names of emoji; and proper names, all in lower case."""
    lines = path.read_text(encoding="utf-8").split()
    words = {word for word in lines if word.islower()}
    for examples in rows.values():
        emoji = [row["caption"] for row in examples if row["source"] in ("emoji", "fluent")]
        words |= set(re.findall(r"[a-z]+", " ".join(emoji)))
    return frozenset(words), frozenset(word.lower() for word in lines if not word.islower())


def build(raw: Path, data: Path, out: Path, images: int, seed: int) -> dict[str, Any]:
    """Write the data set; return its manifest."""
    import datasets

    files = {split: str(data / "data" / f"{split}-*.parquet") for split in SPLITS}
    loaded = datasets.load_dataset("parquet", data_files=files)
    rows = {
        split: examples.cast_column("image", datasets.Image(decode=False))
        for split, examples in loaded.items()
    }
    words, names = english(raw / WORDS, rows)
    cutouts = list(cutouts_of(rows, raw))
    combinations = held_out(cutouts)
    (out / "data").mkdir(parents=True, exist_ok=True)
    by_split = {s: [cutout for cutout in cutouts if cutout.split == s] for s in SPLITS}
    manifest: dict[str, Any] = {"seed": seed, "objects": {}, "counts": {}}
    records = []
    for split in SPLITS:
        own = by_split[split]
        known = {cutout.name for cutout in own}
        own = own + [cutout for cutout in by_split["train"] if cutout.name not in known]
        composer = Composer(own, combinations)
        if split == "test":
            made = compose_test(composer, TEST_IMAGES, seed)
        else:
            total = images if split == "train" else images // 40
            counts = {kind: round(total * share) for kind, share in SHARES.items()}
            made = compose(composer, split, counts, seed)
        examples = []
        for example in made:
            records.append(example.pop("record"))
            examples.append(example)
        cleaned = lambda *about: clean(*about, words, names)  # noqa: E731
        examples += plain(split, rows[split], cleaned, combinations)
        examples.sort(key=lambda example: hashlib.sha256(example["key"].encode()).digest())
        write_split(examples, split, out)
        manifest["counts"][split] = dict(
            sorted(collections.Counter(example["source"] for example in examples).items())
        )
        print(split, len(examples), flush=True)
    manifest["objects"] = dict(collections.Counter(cutout.name for cutout in cutouts).most_common())
    held = {name: sorted(map(list, getattr(combinations, name))) for name in ("colors", "pairs")}
    (out / "combinations.json").write_text(json.dumps(held, indent=0) + "\n")
    with open(out / "records.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw", type=Path, required=True, help="folder that fetch.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder that build.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data set")
    parser.add_argument("--images", type=int, default=18000, help="composed training images")
    parser.add_argument("--seed", type=int, default=0, help="of the compositions")
    args = parser.parse_args(argv)
    print(json.dumps(build(args.raw, args.data, args.out, args.images, args.seed), indent=2))


if __name__ == "__main__":
    main()

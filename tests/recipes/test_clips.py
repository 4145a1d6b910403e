"""Clips: what moves in made ones, their splits and documents, training on them, and the numbers."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.emu_parts import EMU, built
from PIL import Image, ImageDraw

from benchmarks.shared.provenance import recipe
from lavit_lm import MultimodalLM
from lavit_lm.sequences.documents import Documents
from lavit_tok import VisualTokenizer

pytestmark = pytest.mark.usefixtures("data_recipe")


def part(fill: tuple[int, int, int] = (200, 40, 40), color: str = "red") -> Any:
    """A key: a bar with a wider end, so that its turning can be seen."""
    from composed import Cutout, Part, color_of

    image = Image.new("RGBA", (90, 40))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 15, 89, 24), fill=(*fill, 255))
    draw.rectangle((0, 0, 30, 39), fill=(*fill, 255))
    cutout = Cutout("key", image, color_of(image), "keys/1.png", "train", "MIT")
    return Part(cutout, image, color, True)


def track(frames: list[np.ndarray]) -> np.ndarray:
    """(x, y, area, darkness) of what is not white, for each frame."""
    found = []
    for frame in frames:
        weight = 255.0 - frame.min(2)
        y, x = np.mgrid[: len(frame), : frame.shape[1]]
        total = weight.sum()
        found.append((*((weight * v).sum() / total for v in (x, y)), (weight > 8).sum(), total))
    return np.array(found)


def test_made_clips_show_what_they_say():
    import clips

    def change(motion: str) -> np.ndarray:
        return np.diff(track(clips.moved(motion, part(), None, "white", random.Random(1))), axis=0)

    x, y, area, dark = range(4)
    for motion, column, sign in (
        ("moving to the right", x, 1), ("moving to the left", x, -1), ("moving up", y, -1),
        ("moving down", y, 1), ("growing", area, 1), ("shrinking", area, -1),
        ("fading away", dark, -1), ("appearing", dark, 1),
    ):  # fmt: skip
        found = change(motion)
        assert (sign * found[:, column] > 0).all(), motion
        if motion.startswith("moving"):
            other = y if column == x else x
            assert (abs(found[:, other]) < 0.1 * abs(found[:, column])).all(), motion
    for motion, sign in (("turning clockwise", 1), ("turning counterclockwise", -1)):
        frames = clips.moved(motion, part(), None, "white", random.Random(1))
        turns = [sign * (axis(b) - axis(a)) % 180 for a, b in itertools.pairwise(frames)]
        assert turns == pytest.approx([clips.TURN] * 3, abs=2), "degrees, y points down"
    blue = part((40, 40, 220), "blue").image
    changed = clips.moved(clips.CHANGING, part(), blue, "white", random.Random(1))
    shades = [frame[frame.min(2) < 100].mean(0) for frame in changed]
    assert all(a[0] > b[0] and a[2] < b[2] for a, b in itertools.pairwise(shades))


def axis(frame: np.ndarray) -> float:
    """The direction of the longest axis of what is not white, in degrees."""
    y, x = np.nonzero(frame.min(2) < 128)
    (xx, xy), (_, yy) = np.cov(x, y)
    return float(np.degrees(np.arctan2(2 * xy, xx - yy) / 2))


WORKERS = "tribes/workers/frisians"
SHEETS = """descname = pgettext("worker", "{}"),
   spritesheets = {{
      idle = {{ fps = 1, frames = 1, rows = 1, columns = 1, hotspot = {{ 1, 1 }} }},
      walk = {{ fps = 1, frames = 5, rows = 3, columns = 2, directional = true }},
      eating = {{ basename = "idle", frames = 5, rows = 3, columns = 2 }},
   }}"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of four clip arts, two animated emoji, a still one, and the workers of a game."""
    import clips
    import composed
    from build import build
    from sources import CLIPART, EMOJI, FLUENT

    root = tmp_path_factory.mktemp("clips")
    raw = root / "raw"
    (raw / CLIPART / "things").mkdir(parents=True)
    for copy in range(60):
        image = part(((60, 60, 200), (200, 40, 40))[copy % 2]).image
        image.putpixel((copy, 0), (0, 0, 0, 255))
        image.save(raw / CLIPART / f"things/{('key', 'fish')[copy // 30]}_{copy:02}.png")
    (raw / composed.WORDS).parent.mkdir(parents=True)
    (raw / composed.WORDS).write_text("things")
    (raw / EMOJI).mkdir(parents=True)
    (raw / FLUENT).mkdir(parents=True)
    still = {"has_img_google": False, "image": "none.png"}
    names = [{"unified": f"1F40{i}", "name": f"ANIMAL {i}", **still} for i in "123"]
    (raw / EMOJI / "emoji.json").write_text(json.dumps(names))
    animated = raw / clips.package_name(clips.ANIMATED[0]) / "package/assets"
    animated.mkdir(parents=True)
    first, *others = [part((200, 20 * i, 40)).image for i in range(12)]
    for code in ("1f401", "1f402"):
        first.save(raw / FLUENT / f"{code}.webp", quality=int(code[-1]))
        first.save(animated / f"{code}.webp", save_all=True, append_images=others)
    first.save(animated / "1f403.webp")
    for name in ("brewer", "baker", "fisher"):
        worker = raw / clips.WORLD / WORKERS / name
        worker.mkdir(parents=True)
        (worker / "init.lua").write_text(SHEETS.format(name.title()))
        first.save(worker / "idle_1.png")
        for direction in ("e", "nw"):
            sheet = Image.new("RGBA", (40, 60))
            for i in range(5):
                sheet.paste(
                    (200, 40 * i, 0, 255),
                    (i % 2 * 20 + 3, i // 2 * 20 + 2 + i, i % 2 * 20 + 12, i // 2 * 20 + 12),
                )
            sheet.save(worker / f"walk_{direction}_1.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(root / "cache"))
        build(raw, root / "data", workers=0)
        counts = {"train": 12, "validation": 2, "test": 6}
        for out in ("out", "again"):
            clips.build(raw, root / "data", root / out, counts, seed=0)
    return root


def lines_of(root: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"out/{split}.jsonl").read_text().splitlines()]


def test_no_image_and_no_worker_is_in_two_splits(made: Path) -> None:
    by_split = {split: lines_of(made, split) for split in ("train", "validation", "test")}
    groups: dict[str, set[str]] = {}
    for split, lines in by_split.items():
        for line in lines:
            for name in line.get("bases", [line.get("group") or line.get("code")]):
                groups.setdefault(name, set()).add(split)
    assert all(len(splits) == 1 for splits in groups.values())
    split_of_image = {}
    for split in by_split:
        for path in (made / "data/data").glob(f"{split}-*.parquet"):
            from datasets import Dataset

            keys = Dataset.from_parquet(str(path), cache_dir=str(made / "cache"))["key"]
            split_of_image |= dict.fromkeys(keys, split)
    for split, lines in by_split.items():
        bases = [name for line in lines for name in line.get("bases", [])]
        assert bases and all(split_of_image[name] == split for name in bases)
    captions = [line["segments"][-1].get("text") for lines in by_split.values() for line in lines]
    assert {"a frisian brewer walking to the right", "animal 1", "animal 2"} <= {*captions}
    assert "animal 3" not in captions, "a still emoji"
    assert sum("frisian" in str(text) for text in captions) == 3 * 2, "neither idle nor eating"
    manifest = json.loads((made / "out/manifest.json").read_text())
    assert manifest["counts"]["test"]["made"] == 6 and manifest["still"] == {
        "emoji": 1,
        "widelands": 3,
    }


def test_clips_are_the_same_when_built_again(made: Path) -> None:
    files = sorted(p.relative_to(made / "out") for p in (made / "out").rglob("*") if p.is_file())
    assert len(files) > 80
    for file in files:
        assert (made / "out" / file).read_bytes() == (made / "again" / file).read_bytes(), file


def test_documents_of_a_clip(made: Path, tiny_tokenizer: VisualTokenizer) -> None:
    found = Documents(made / "out/train.jsonl", tiny_tokenizer.image_processor)
    lines = lines_of(made, "train")
    for i in (0, 1):
        segments, key = found[i]
        kinds = "".join(["t", "i"][segment.is_image] for segment in segments)
        assert kinds == ["iiiit", "iiiti"][i] and key == lines[i]["key"]
    whole, parted = found[0][0], found[1][0]
    shown: Any = [segment for segment in parted if segment.is_image]
    for one, other in zip(whole, shown, strict=False):
        assert torch.equal(one.image(), other.image())  # type: ignore[union-attr, operator]
    assert all("next" not in line["key"] for line in lines_of(made, "test"))


def test_numbers_of_clips(made: Path, tiny_tokenizer: VisualTokenizer) -> None:
    """Every number of the page is there and within its range."""
    page = recipe("lm/clips.py")
    processor, model = built(tiny_tokenizer)
    lm = MultimodalLM(model, processor, tiny_tokenizer, objective=EMU)
    lines = lines_of(made, "test")
    assert page.hits(torch.tensor([[1.0, 3.0, 2.0], [0.0, 4.0, 5.0]]), [1, 1])["top-1"] == 0.5
    found = page.measure(lm, made / "out", [x for x in lines if x["source"] == "made"], 4, seed=0)
    assert found["clips"] == 4 and found["captions"]["chance"] == {"top-1": 0.25, "top-5": 1.0}
    repeated = found["next"]["repeated"]
    assert repeated["nearer than repeated"] == 0 and -1 <= repeated["cosine"] <= 1
    last = torch.cat([page.vectors_of(lm, page.frames_of(x, made / "out")[-1:]) for x in lines[:2]])
    assert last.shape == (2, 3, 16) and not last[0].equal(last[1])
    assert page.spread([{"a": 1.0}, {"a": 3.0}]) == {"a": [2.0, 1.0]}


def test_the_recipe_trains_on_clips(made: Path, folder: Path) -> None:
    """Two steps of a small model on the documents that clips.py wrote."""
    from helpers.lm_runs import SMALL
    from helpers.trainers import two_steps

    from lavit_lm.cli import main

    sources = [
        {"documents": str(made / "out/train.jsonl"), "weight": 3},
        {"shards": str(folder / "shards"), "images": str(folder / "pictures"), "weight": 1},
    ]
    small = {
        "trainer.precision": 32,
        "model.lm": json.dumps({**SMALL, "tie_word_embeddings": True}),
        "model.text_tokenizer": folder / "text",
        "model.visual_tokenizer": folder / "visual",
        "model.out": folder / "made",
        "model.schedule.warmup_steps": 1,
        "model.objective.init_args.queries": 4,
        "model.objective.init_args.depth": 1,
        "model.objective.init_args.heads": 2,
        "trainer.default_root_dir": folder / "run",
        "data.sources": json.dumps(sources),
        "data.block": 128,
        "data.batch_size": 2,
    }
    recipe_file = Path(__file__).parents[2] / "recipes/lm/emu-clips.yaml"
    assert main(["fit", *two_steps(recipe_file, small)]) == 0
    lm = MultimodalLM.from_pretrained(folder / "made", decoder=None)
    frames = [made / "out" / file for file in lines_of(made, "test")[0]["segments"][0]["frames"]]
    assert lm.generate_vectors_batch([[*frames, "then"]]).shape == (1, 4, 32)

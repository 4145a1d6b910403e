"""Composed images: their colors and captions, and that no test combination occurs in training."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

MONUMENTS = "explore_monuments/resource"
SHAPES = ("star", "heart", "apple", "pear", "book", "fish", "key", "car", "cat", "tree")


pytestmark = pytest.mark.usefixtures("data_recipe")


def shape(number: int, fill: tuple[int, int, int]) -> Image.Image:
    """An ellipse with a darker spot on transparent ground."""
    image = Image.new("RGBA", (60, 50))
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 4, 55 - number % 20, 45), fill=(*fill, 255))
    draw.ellipse((15, 15, 25, 25), fill=(*(value // 2 for value in fill), 255))
    return image


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """A tiny data set composed of ten objects of six images each."""
    import composed
    import instruct
    from build import build
    from sources import CLIPART

    root = tmp_path_factory.mktemp("composed")
    raw, fills = root / "raw", [(200, 40, 40), (60, 60, 200), (120, 120, 120)]
    (raw / CLIPART / "things").mkdir(parents=True)
    for number, (name, copy) in enumerate(itertools.product(SHAPES, range(6))):
        shape(number, fills[copy % 3]).save(raw / CLIPART / f"things/{name}_{copy:02}.png")
    words = raw / composed.WORDS
    words.parent.mkdir(parents=True)
    words.write_text("\n".join(["things", "Rome", *SHAPES]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(root / "cache"))
        patch.setattr(composed, "TEST_IMAGES", {"place": 8, "pair": 8, "count": 6, "view": 4})
        patch.setattr(composed, "TEST_OF_COLOR", {True: 1, False: 1})
        build(raw, root / "data", workers=0)
        composed.build(raw, root / "data", root / "out", 80, seed=0)
        instruct.build(root / "out", root / "instruct", 40, seed=0)
        from datasets import load_dataset

        files = {s: str(root / f"out/data/{s}-*.parquet") for s in ("train", "validation", "test")}
        splits = load_dataset("parquet", data_files=files)
    lines = (root / "out/records.jsonl").read_text().splitlines()
    held = json.loads((root / "out/combinations.json").read_text())
    return splits, [json.loads(line) for line in lines], held, root / "instruct"


def combinations(record: dict) -> set[tuple[str, str]]:
    """What a composed image shows, from its record alone."""
    names = sorted({item["object"] for item in record["objects"]})
    colors = {(item["color"], item["object"]) for item in record["objects"]}
    return colors | set(itertools.combinations(names, 2))


def test_no_combination_of_the_test_split_occurs_in_training(made):
    from colors import COLORS

    splits, records, held, _ = made
    held_out = {tuple(pair) for pair in held["colors"] + held["pairs"]}
    seen = {split: set() for split in splits}
    for record in records:
        shown = combinations(record)
        seen[record["split"]] |= shown
        assert bool(shown & held_out) == (record["split"] == "test"), record["key"]
    tested = seen["test"] & held_out
    assert len(tested) > 10 and not tested & (seen["train"] | seen["validation"])
    for caption in [*splits["train"]["caption"], *splits["validation"]["caption"]]:
        scene = caption.split(" on a ")[0]  # a color of the background is no color of the object
        for first, second in tested:
            assert f"{first} {second}" not in scene, caption
            assert not {first, second} <= set(scene.split()) - set(COLORS)


def test_images_of_different_splits_have_different_sources(made):
    _, records, *_ = made
    bases = {split: set() for split in ("train", "validation")}
    for record in records:
        if record["split"] != "test":
            bases[record["split"]] |= set(record["bases"])
    both = bases["train"] & bases["validation"]
    objects = {Path(key).name.split("_")[0] for key in bases["validation"] - both}
    assert not any(Path(key).name.split("_")[0] in objects for key in both), (
        "training images only for an object that the split does not have"
    )


def test_captions_say_what_was_composed(made):
    from colors import named_color
    from objects import plural

    splits, records, *_ = made
    examples = {example["key"]: example for split in splits.values() for example in split}
    assert splits["train"].column_names == ["image", "caption", "source", "key", "license"]
    kinds = {record["kind"] for record in records}
    assert kinds == {"color", "place", "pair", "count", "view"}
    for record in records:
        example = examples[record["key"]]
        caption, first = example["caption"], record["objects"][0]
        assert example["image"].size == (128, 128)
        assert example["source"] == f"composed-{record['kind']}"
        several = record.get("count", 1) > 1
        assert (plural(first["object"]) if several else first["object"]) in caption
        for item in record["objects"]:
            assert not item["named"] or item["color"] in caption
        for word in ("place", "size", "relation"):
            assert record.get(word, "") in caption
        if record["kind"] == "color":
            assert named_color(np.asarray(example["image"].convert("RGB"))) == first["color"]
        if record["ground"] != "white":
            assert caption.endswith(f"on a {record['ground']} background")


def test_positions_and_counts_are_those_of_the_caption(made):
    from scipy.ndimage import label

    splits, records, *_ = made
    examples = {example["key"]: example for split in splits.values() for example in split}
    for record in records:
        image = np.asarray(examples[record["key"]]["image"].convert("RGB")).astype(int)
        far = np.abs(image - image[64, -1] if record["kind"] == "count" else image - image[0, 64])
        inside = far.max(-1) > 60
        if record["kind"] == "count":
            _, parts = label(inside, np.ones((3, 3)))
            assert parts == record["count"], record["key"]
        if record.get("place") in ("on the left", "on the right"):
            assert (np.nonzero(inside)[1].mean() < 64) == (record["place"] == "on the left")


@pytest.mark.parametrize("fill", [(200, 40, 40), (60, 60, 200), (150, 150, 150), (20, 20, 20)])
def test_a_recolored_object_is_named_by_its_color(fill):
    from colors import COLORS, named_color, recolor
    from composed import on_ground

    cutout = shape(3, fill)
    for color in COLORS:
        draw = random.Random(color)
        ground = "blue" if color == "white" else "white"
        image = on_ground(ground, [(recolor(cutout, color, draw), 0.7, 0.5, 0.5)])
        assert named_color(image) == color


def test_named_color_ignores_the_ground():
    from colors import named_color

    image = np.full((40, 40, 3), (90, 130, 220), np.uint8)
    assert named_color(image) is None
    image[10:30, 10:30] = (230, 30, 20)
    assert named_color(image) == "red"
    image[10:30, 10:16] = 255  # a highlight
    assert named_color(image) == "red"


def test_garments_are_cut_from_black():
    from composed import cut_from_black

    gray = np.zeros((28, 28), np.uint8)
    gray[4:24, 8:20] = 160
    gray[12:15, 12:15] = 0  # a dark emblem is part of it
    cut = cut_from_black(Image.fromarray(gray))
    alpha = np.asarray(cut)[..., 3]
    assert alpha[alpha.shape[0] // 2, alpha.shape[1] // 2] == 255
    assert 0.55 < cut.width / cut.height < 0.7
    whole = Image.new("RGBA", (40, 40), "red")
    from composed import cut_out

    assert cut_out(whole) is None and cut_out(Image.new("RGBA", (40, 40))) is None


def test_scenes_depend_on_the_seed_alone():
    import composed
    from colors import measure

    cut = shape(1, (200, 40, 40))
    pixels = np.asarray(cut)
    color = measure(pixels[..., :3][pixels[..., 3] > 127])
    cutouts = [composed.Cutout(n, cut, color, n, "train", "MIT") for n in ("apple", "fish")]
    composer = composed.Composer(cutouts, composed.held_out(cutouts))
    counts = {"color": 3, "place": 2, "pair": 2, "count": 2, "view": 2}

    def content(seed: int) -> list[tuple[str, str]]:
        examples = composed.compose(composer, "train", counts, seed)
        return [(e["caption"], hashlib.sha256(e["image"]["bytes"]).hexdigest()) for e in examples]

    combinations = composed.Combinations(frozenset(), frozenset())
    composer = composed.Composer(cutouts, combinations)
    assert content(0) == content(0) != content(1)


@pytest.mark.parametrize(
    ("caption", "source", "key", "clean_caption"),
    [
        ("bullet hole linda kim, weapons", "openclipart", "a.png", "bullet hole, weapons"),
        ("rana, animals", "openclipart", "a.png", "animals"),
        ("rana", "openclipart", "a.png", "clip art"),
        ("dog with strai, animals", "openclipart", "a.png", "dog, animals"),
        ("A penny (2008).", "tuxpaint", "a.png", "a penny"),
        ("A star. It is far away.", "tuxpaint", "a.png", "a star"),
        ("pala di pesaro", "gcompris", "x/paintings/y.webp", "a painting"),
        ("the star", "gcompris", "x/paintings/y.webp", "painting: the star"),
        ("chenonceau", "gcompris", f"{MONUMENTS}/france/c.webp", "a monument in france"),
        ("rome", "gcompris", f"{MONUMENTS}/italy/c.webp", "rome"),
        ("photograph: 2014-05-06 a lake", "wallpapers", "a.jpg", "photograph: a lake"),
        ("f", "gcompris", "a.webp", "image"),
    ],
)  # fmt: skip
def test_captions_are_cleaned(caption, source, key, clean_caption):
    from captions import clean

    words = frozenset(["bullet", "hole", "weapons", "animals", "dog", "with", "the", "star"])
    assert clean(caption, source, key, words, frozenset({"rome"})) == clean_caption


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("another apple, fruit, food", "apple"),
        ("a photo of a t-shirt or top", "t-shirt"),
        ("A blue truck.", "truck"),
        ("large red circle", "circle"),
        ("apple core, fruit", None),
        ("", None),
    ],
)
def test_objects_are_found_in_captions(caption, name):
    from objects import object_of

    assert object_of(caption) == name


def test_numbers_and_articles():
    from objects import plural, with_article

    assert [plural(n) for n in ("bus", "butterfly", "mouse", "key", "wine glass", "leaf")] == [
        "buses", "butterflies", "mice", "keys", "wine glasses", "leaves",
    ]  # fmt: skip
    assert with_article("apple", "apple") == "an apple"
    assert with_article("red apple", "apple") == "a red apple"
    assert with_article("unicorn", "unicorn") == "a unicorn"
    assert with_article("blue trousers", "trousers") == "blue trousers"


def test_left_and_right_are_swapped_in_mirrored_views():
    import io

    from composed import Combinations, plain

    buffer = io.BytesIO()
    shape(1, (200, 40, 40)).convert("RGB").save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    caption = "a fish on the left, above a cup"
    rows = [
        {"image": image, "caption": caption, "source": "emoji", "key": f"k{n}", "license": "MIT"}
        for n in range(12)
    ]
    none = Combinations(frozenset(), frozenset())
    examples = list(plain("train", rows, lambda *about: about[0], none))
    mirrored = [e for e in examples if e["key"].endswith("@mirrored")]
    assert mirrored and all("on the right" in e["caption"] for e in mirrored)
    original, view = (np.asarray(Image.open(io.BytesIO(e["image"]["bytes"])))
                      for e in (examples[0], mirrored[0]))  # fmt: skip
    assert np.array_equal(original[:, ::-1], view)
    assert len(list(plain("test", rows, lambda *about: about[0], none))) == 12


def test_questions_are_documents_whose_answers_are_right(made):
    from instruct import UNSEEN

    from lavit_lm.sequences.documents import Documents
    from lavit_tok import VisualImageProcessor

    _, records, _, folder = made
    by_key = {record["key"]: record for record in records}
    images = VisualImageProcessor(32)
    starts = {"what is this": "object", "what color": "color", "how many": "count"}
    starts |= {"where": "place", "is there": "presence", "are there": "presence"}
    starts |= {"do both": "compare", "have both": "compare", "which": "which"}
    starts |= {"which image shows something": "which_color"}
    starts |= {"what is in the": "side", "what color is the object in the": "side"}
    starts |= {"what color is the background": "ground", "is the": "size", "are the": "size"}
    kinds, of_documents = {"train": set(), "test": set()}, set()
    for name in ("train", "which", "test"):
        split, file = "test" if name == "test" else "train", folder / f"{name}.jsonl"
        documents = Documents(file, images)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for (segments, key), line in zip(documents, lines, strict=True):
            names = [segment["image"] for segment in line["segments"] if "image" in segment]
            if is_series(line):
                assert split == "train"
                continue
            shown = [by_key[Path(name).stem.replace("-", "/")] for name in names]
            assert all(record["split"] == split for record in shown)
            objects = [[item["object"] for item in record["objects"]] for record in shown]
            texts = segments[len(names) :]
            targets = [s.is_target for s in segments]
            assert targets == [False] * len(names) + [False, True] * (len(texts) // 2)
            asked = []
            for question, answer in zip(texts[::2], [s.text for s in texts[1::2]], strict=True):
                text = question.text.removeprefix("Question: ").removesuffix(" Answer:")
                begun = [start for start in starts if text.startswith(start)]
                side = text.startswith(("is there", "are there")) and text.endswith(" image?")
                asked.append("side_presence" if side else starts[max(begun, key=len)])
                check(asked[-1], text, answer, shown, objects)
            kinds[split] |= set(asked)
            if split == "train":
                assert (set(asked) <= {"which", "which_color"}) == (name == "which")
                of_documents.add(tuple(asked))
                assert len(set(texts[::2])) == len(texts[::2])
                naming = {"color", "count", "place", "which", "which_color"}
                named = [kind in naming for kind in asked]
                assert named == sorted(named), "questions that name the object come last"
            else:
                assert asked == [key.split("/")[1]]
    expected = {"object", "color", "count", "place", "presence", "compare", "which", "which_color"}
    expected |= {"side", "side_presence"}
    assert kinds == {"train": expected, "test": expected | set(UNSEEN)}
    assert {len(asked) for asked in of_documents} >= {1, 2, 3, 4, 5}


def is_series(line: dict[str, Any]) -> bool:
    """Whether an image comes after an answer."""
    images = ["image" in segment for segment in line["segments"]]
    return images != sorted(images, reverse=True)


def test_series_of_questions_of_one_type(made):
    from instruct import SERIES, UNNAMED

    lines = [json.loads(line) for line in (made[3] / "train.jsonl").read_text().splitlines()]
    pairs: dict[str, set[tuple[str, str]]] = {}  # image -> its questions and answers
    for line in lines:
        if not is_series(line):
            image, *texts = (next(iter(segment.values())) for segment in line["segments"])
            pairs.setdefault(image, set()).update(zip(texts[::2], texts[1::2], strict=False))
    found = [line["segments"] for line in lines if is_series(line)]
    assert len(found) == 40 // 2
    for segments in found:
        images, questions, answers = segments[::3], segments[1::3], segments[2::3]
        assert len(images) in SERIES and len({s["image"] for s in images}) == len(images)
        assert not any(s["target"] for s in images + questions)
        unnamed = any(UNNAMED in s["text"] for s in questions)
        targets = [s.get("target", True) for s in answers]
        assert targets == [not unnamed] + [True] * (len(answers) - 1)
        if unnamed:
            assert len({s["text"] for s in questions}) == 1
        for image, question, answer in zip(images, questions, answers, strict=True):
            right = pairs[image["image"]]
            asked = {(question["text"], answer["text"])}
            assert asked <= right or (unnamed and answer["text"] in {a for _, a in right})
    assert any(UNNAMED in s[1]["text"] for s in found)
    assert any(UNNAMED not in s[1]["text"] for s in found)


def check(kind: str, question: str, answer: str, shown: Any, objects: list[list[str]]) -> None:
    """Whether an answer is that of the records of the images."""
    from objects import plural, with_article

    if kind == "object":
        assert answer == with_article(objects[0][0], objects[0][0])
    elif kind == "color":
        item = next(i for i in shown[0]["objects"] if f" {i['object']}?" in question)
        assert answer == item["color"]
    elif kind == "side":
        item = shown[0 if "first image" in question else 1]["objects"][0]
        right = (
            item["color"] if "color" in question else with_article(item["object"], item["object"])
        )
        assert answer == right
    elif kind == "side_presence":
        (name,) = objects[0 if "first image" in question else 1]
        assert (answer == "yes") == (f" {name} in the " in question)
        assert any(f" {names[0]} in the " in question for names in objects)
    elif kind == "count":
        assert plural(objects[0][0]) in question
        assert answer == ("one", "two", "three", "four")[shown[0]["count"] - 1]
    elif kind == "place":
        assert answer == shown[0]["place"]
    elif kind == "ground":
        assert answer == shown[0]["ground"] != "white"
    elif kind == "size":
        assert answer == shown[0]["size"] and f" {objects[0][0]} " in question
    elif kind == "presence":
        assert (answer == "yes") == any(f" {name}?" in question for name in objects[0])
    elif "same object" in question:
        assert (answer == "yes") == (objects[0] == objects[1])
    elif "same color" in question:
        first, second = (record["objects"][0]["color"] for record in shown)
        assert (answer == "yes") == (first == second)
    elif kind == "which_color":
        index = ("the first", "the second").index(answer)
        colors = [record["objects"][0]["color"] for record in shown]
        assert f" {colors[index]}?" in question and colors[0] != colors[1]
    else:
        index = ("the first", "the second").index(answer)
        assert f" {objects[index][0]}?" in question and objects[0] != objects[1]


def test_single_questions_of_train(made, tmp_path: Path):
    import instruct

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        out = tmp_path / "single"
        instruct.main(["--data", str(made[3].parent / "out"), "--out", str(out), "--single"])
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert {sum("text" in s for s in line["segments"]) for line in lines} == {2}
    kinds = {line["key"].split("/")[1] for line in lines}
    expected = {"object", "color", "count", "place", "presence", "compare", "which"}
    assert kinds == expected | {"which_color", "side", "side_presence"}
    assert (out / "test.jsonl").read_text().count("instruct/train") == 0


def test_questions_about_emoji_and_clothes(tmp_path: Path):
    from instruct import file_of, plain_questions
    from sources import EMOJI

    entries = [("2764-FE0F", "2764", "heart"), ("1F697", None, "transport-ground")]
    names = ("unified", "non_qualified", "subcategory")
    file = tmp_path / EMOJI / "emoji.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([dict(zip(names, entry, strict=True)) for entry in entries]))
    keys = ["e/img/2764-fe0f.png", "f/assets/1f697.webp@mirrored", "c/apple.png", "m/t10k/7"]
    sources = ("emoji", "fluent", "openclipart", "fashion-mnist")
    rows = [
        {"key": key, "source": source, "caption": "a photo of an ankle boot"}
        for key, source in zip(keys, sources, strict=True)
    ]
    assert [(kind, key, answer) for kind, (key,), _, answer in plain_questions(rows, tmp_path)] == [
        ("emoji", keys[0], "heart"),
        ("emoji", keys[1], "transport ground"),
        ("clothes", keys[3], "an ankle boot"),
    ]
    assert file_of(keys[1]) == "f-assets-1f697.webp@mirrored.webp"
    assert file_of("composed/test/color/00001") == "composed-test-color-00001.webp"


def test_questions_with_yes_and_no_are_balanced():
    from instruct import questions

    records = []
    for number in range(1600):
        item = {"object": ("apple", "fish", "key")[number % 3], "named": True, "color": "red"}
        item["color"] = ("red", "blue")[number // 3 % 2]
        records.append(
            {"key": f"composed/train/color/{number}", "kind": "color", "split": "train",
             "objects": [item], "ground": "white"}
        )  # fmt: skip
    for together in (False, True):
        documents = list(questions(records, 0, together))
        asked = [one for document in documents for one in document]
        for start, expected in (
            ("is there", "yes"),
            ("do both", "yes"),
            ("have both", "yes"),
            ("which", "the first"),
        ):
            answers = [answer for _, _, question, answer in asked if question.startswith(start)]
            assert len(answers) > 50
            assert 0.4 < answers.count(expected) / len(answers) < 0.6, start
        for document in documents:
            presence = [answer for kind, _, _, answer in document if kind == "presence"]
            assert "yes" not in presence[:-1], "the others would follow from it"


def test_the_instruct_recipe_learns_answers_only(made, folder: Path) -> None:
    """A few steps of a small model on the questions that instruct.py wrote."""
    from helpers.lm_runs import small_run
    from helpers.trainers import two_steps

    from lavit_lm import MultimodalLM
    from lavit_lm.cli import main
    from lavit_lm.objectives.lavit import LaVIT
    from lavit_lm.sequences.documents import Documents
    from lavit_tok import VisualTokenizer

    questions = made[3] / "train.jsonl"
    recipe = Path(__file__).parents[2] / "recipes/lm/instruct.yaml"
    sources = [
        {"documents": str(questions), "weight": 4},
        {"shards": str(folder / "shards"), "images": str(folder / "pictures"), "weight": 1},
    ]
    more = {"model.objective.init_args.nested_vectors": 4, "data.block": 512}
    small = small_run(folder, sources, **more)
    assert main(["fit", *two_steps(recipe, small)]) == 0
    lm = MultimodalLM.from_pretrained(folder / "made", decoder=None)
    visual = VisualTokenizer.from_pretrained(folder / "visual")
    documents = Documents(questions, visual.image_processor, visual.encode, pixels=True)
    assert len(documents) > 40
    assert isinstance(lm.objective, LaVIT)
    objective = replace(lm.objective, vector_ratio=1.0)
    for i in range(0, len(documents), 7):
        segments, key = documents[i]
        sequence = objective.layout(segments, lm.processor, torch.Generator().manual_seed(i), key)
        answers = [s.text for s in segments if not s.is_image and s.is_target]
        answer = [*lm.processor.text(answers[-1]), lm.processor.stop]
        predicted = [id for text in answers[:-1] for id in lm.processor.text(text)] + answer
        assert sequence.ids[sequence.predict].tolist() == predicted, key
        assert sequence.is_embedding.sum() == 4 * sum(s.is_image for s in segments)
        prompt = objective.prompt(segments[:-1], lm.processor, "text").ids.tolist()
        assert sequence.ids.tolist() == [*prompt, *answer], "what `answer` asks"


@pytest.mark.parametrize("name", ["emu", "vlgpt", "davinci"])
def test_models_of_vectors_learn_answers(made, folder: Path, tiny_decoder: Any, name: str) -> None:
    """Two steps at reduced width on the questions and on captioned images."""
    from helpers.lm_runs import SMALL, shards_of_all_patches, small_run
    from helpers.trainers import two_steps
    from helpers.vlgpt_parts import stage_one_directory

    from lavit_lm import MultimodalLM
    from lavit_lm.cli import main

    sources = [
        {"documents": str(made[3] / "train.jsonl"), "weight": 4},
        {"shards": str(folder / "shards"), "images": str(folder / "pictures"), "weight": 1},
    ]
    small = small_run(folder, sources, **{"data.block": 512})
    own: dict[str, Any] = {"depth": 1, "heads": 2, "queries": 4, "hidden_size": 32}
    if name == "vlgpt":
        tiny_decoder.save_pretrained(folder / "decoder")
        own = {"tokenizer": stage_one_directory(folder, SMALL["hidden_size"])}
    if name == "davinci":  # of codes in raster order, which need all patches
        own = {"nested_vectors": "null"}
        shards_of_all_patches(folder, folder / "visual")
    small |= {f"model.objective.init_args.{key}": value for key, value in own.items()}
    recipe = Path(__file__).parents[2] / f"recipes/lm/instruct-{name}.yaml"
    assert main(["fit", *two_steps(recipe, small)]) == 0
    lm = MultimodalLM.from_pretrained(folder / "made", decoder=None)
    photo = folder / "pictures" / "train" / "0.png"
    assert lm.answer(photo, "what is this?", max_new_tokens=4) is not None
    assert lm.objective.prompt_templates.answer == "Question: {} Answer:", "as in the documents"

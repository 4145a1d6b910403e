"""Questions with answers about composed images, as documents for training on the answers alone.

    python recipes/data/instruct.py --data COMPOSED --raw RAW --out INSTRUCT

| type | question | answers |
|---|---|---|
| object | what is this? | a bag |
| color | what color is the bag? | red |
| count | how many apples are there? | one to four |
| place | where is the heart? | in the upper left |
| presence | is there a tree? | yes or no, as often |
| compare | do both images show the same object? have both objects the same color? | yes or no |
| which | which image shows a cat? | the first or the second, as often |
| which_color | which image shows something red? | likewise |
| side | what is in the second image? what color is the object in the first image? | a bag, red |
| side_presence | is there a cat in the first image? | yes or no, as often |
| clothes | what is this? (gray clothes of Fashion-MNIST) | a sneaker |
| emoji | what kind of emoji is this? | its Unicode subgroup, such as country flag |
| ground | what color is the background? never asked in train | one that is not white |
| size | is the heart small or large? never asked in train | small or large |

INSTRUCT holds train.jsonl, validation.jsonl and test.jsonl, which lavit_lm's `documents` reads, and
the images beside them. Only answers are targets:

    {"key": "instruct/color/1", "segments": [{"image": "test/1.webp", "target": false},
        {"text": "Question: what color is the bag? Answer:", "target": false}, {"text": "red"}]}

Lines of train hold all questions about one image or two, in any order, each with its answer; or
questions of one type, each after an image of its own, as few-shot prompts do: in half of these
lines every question reads "what about this image?", so that the first answer, which is no target,
tells what is asked. Their key is instruct/train/... Those that ask which of two images shows
something, and nothing else, are in which.jsonl, a source with a weight of its own: the shipped
model learned them from some 23,000 such lines (docs/log.md). Lines of the other splits hold one
question, whose type their key names; with --single, those of train too, for an objective that
predicts the last text only (DaVinci). Images of the test split show combinations that never occur
in training (composed.py), or are clothes and emoji that do not; these two types need RAW.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from build import SPLITS
from composed import NUMBERS, draw_of
from objects import NOT_COUNTED, plural, with_article
from sources import emoji_entries

TEMPLATE = "Question: {} Answer:"
"""That of lavit_lm's MultimodalLM.answer."""
SINGLE = ("color", "place", "view")
"""Kinds of images that show one object."""
Asked = tuple[str, list[str], str, str]
"""(type, names of images, question, answer)."""
UNSEEN = ("ground", "size")
"""Types that are asked in test and validation only: tasks that a model has not been trained on."""
WHICH = {"which": "object", "which_color": "color"}
"""Types of questions for one of two images, and in what these differ."""
ORDINALS = ("first", "second")
SERIES = range(2, 6)
"""Questions of one type in a line of train, each about an image of its own."""
UNNAMED = "what about this image?"
"""A question whose type earlier answers tell."""
PRESENCE = 4
"""Questions for the presence of an object at most, of an image in train."""
REPEATS = 5
"""Of each question about clothes and emoji in train: they are few beside the composed images."""


def name_of(record: dict[str, Any]) -> str:
    """The first object of an image."""
    return str(record["objects"][0]["object"])


def verb_of(name: str) -> str:
    """is a bag, are trousers."""
    return "are" if name in NOT_COUNTED else "is"


def ask(
    record: dict[str, Any], names: Sequence[str], draw: Any, presence: int = 1
) -> Iterator[Asked]:
    """All questions about one image.

    Args:
        record: of the image, as composed.py wrote it.
        names: of all objects, for questions whose answer is no.
        draw: random.Random.
        presence: at most so many questions for the presence of an object. The first answer yes is
            the last one: after it all others would be no, and each is as often yes as no.
    """
    image, shown = [record["key"]], [item["object"] for item in record["objects"]]
    first = name_of(record)
    if record["kind"] in SINGLE:
        yield "object", image, "what is this?", with_article(first, first)
    for item in record["objects"]:
        if item["named"] and record.get("count", 1) == 1:
            name = item["object"]
            yield "color", image, f"what color {verb_of(name)} the {name}?", item["color"]
    if record["kind"] == "count":
        question = f"how many {plural(first)} are there?"
        yield "count", image, question, NUMBERS[record["count"] - 1]
    if "place" in record:
        yield "place", image, f"where {verb_of(first)} the {first}?", record["place"]
    if record["ground"] != "white":
        yield "ground", image, "what color is the background?", record["ground"]
    if "size" in record:
        yield "size", image, f"{verb_of(first)} the {first} small or large?", record["size"]
    absent = [name for name in names if name not in shown]
    for _ in range(min(presence, len(absent))):
        there = draw.random() < 0.5
        name = draw.choice(shown if there else absent)
        question = f"{verb_of(name)} there {with_article(name, name)}?"
        yield "presence", image, question, "yes" if there else "no"
        if there:
            break
        absent.remove(name)


def compare(
    records: Sequence[dict[str, Any]], by: dict[str, dict[str, list[Any]]], draw: Any
) -> list[Asked]:
    """All questions about two images of single objects; none if there are no two as drawn.

    Args:
        by: "object" and "color" -> name -> records.
    """
    record = draw.choice(records)
    item = record["objects"][0]
    alike = {what: draw.random() < 0.5 for what in by}
    shared = next((what for what in by if alike[what]), None)
    if shared is None:
        among = draw.sample(records, min(32, len(records)))
    else:
        among = by[shared][item[shared]]
    others = [
        other
        for other in among
        if other is not record
        and all((other["objects"][0][what] == item[what]) == alike[what] for what in by)
    ]
    if not others:
        return []
    pair = [record, draw.choice(others)]
    keys = [one["key"] for one in pair]
    texts = {
        "object": "do both images show the same object?",
        "color": "have both objects the same color?",
    }
    asked: list[Asked] = [
        ("compare", keys, texts[what], "yes" if alike[what] else "no") for what in by
    ]
    return asked + [one for one in which_of(pair, draw) if not alike[WHICH[one[0]]]]


def which_of(pair: Sequence[dict[str, Any]], draw: Any) -> list[Asked]:
    """Which of two images shows an object, and a color; of either one that the draw chooses."""
    keys, asked = [record["key"] for record in pair], []
    for kind, what in WHICH.items():
        answer, sought = draw.choice(list(zip(ORDINALS, pair, strict=True)))
        value = sought["objects"][0][what]
        phrase = with_article(value, value) if what == "object" else f"something {value}"
        asked.append((kind, keys, f"which image shows {phrase}?", f"the {answer}"))
    return asked


def of_sides(pair: Sequence[dict[str, Any]], draw: Any) -> list[Asked]:
    """What either image shows, and its color; and of one, is there what either shows?"""
    keys, names = [record["key"] for record in pair], [name_of(record) for record in pair]
    asked: list[Asked] = []
    for side, name, record in zip(ORDINALS, names, pair, strict=True):
        color = record["objects"][0]["color"]
        asked += [
            ("side", keys, f"what is in the {side} image?", with_article(name, name)),
            ("side", keys, f"what color is the object in the {side} image?", color),
        ]
    if names[0] != names[1]:
        side, name = draw.choice(list(zip(ORDINALS, names, strict=True)))
        other = draw.choice(names)
        question = f"{verb_of(other)} there {with_article(other, other)} in the {side} image?"
        asked.append(("side_presence", keys, question, "yes" if other == name else "no"))
    return asked


def arranged(asked: Sequence[Asked], draw: Any) -> list[Asked]:
    """Questions of one document in an order in which none tells the answer of a later one.

    A question for color, count or place names the object, and which of two implies that they
    differ: questions for presence, object and sameness come before these. Half of the
    documents begin with any question instead, and lack those that it has answered.
    """
    ranks = {"presence": 0, "side_presence": 0, "compare": 0, "object": 1} | dict.fromkeys(WHICH, 1)
    first = ranks.get(draw.choice(asked)[0], 2) if draw.random() < 0.5 else 0
    kept = [one for one in asked if ranks.get(one[0], 2) >= first]

    def place(one: Asked) -> tuple[int, float]:
        # Presence keeps its order, no before yes
        return ranks.get(one[0], 2), 0 if one[0] == "presence" else draw.random()

    return sorted(kept, key=place)


def questions(
    records: Sequence[dict[str, Any]], seed: int, together: bool = False, unseen: bool = False
) -> Iterator[list[Asked]]:
    """Up to two questions about every image, and comparisons for up to half of the images.

    Args:
        together: all questions about an image, or about two, in one document; and for each image
            two comparisons, two more images of which the sides are asked for, and two that differ,
            of which only this is asked.
        unseen: and all questions of the types that train does not ask.
    """
    names = sorted({item["object"] for record in records for item in record["objects"]})
    by: dict[str, dict[str, list[Any]]] = {"object": {}, "color": {}}
    single = [r for r in records if r["kind"] in ("color", "place") and r["objects"][0]["named"]]
    for record in single:
        for what, groups in by.items():
            groups.setdefault(record["objects"][0][what], []).append(record)
    for record in records:
        draw = draw_of(seed, "ask", record["key"])
        every = list(ask(record, names, draw, PRESENCE if together else 1))
        found = [one for one in every if one[0] not in UNSEEN]
        if together:
            yield arranged(found, draw)
        else:
            yield from ([one] for one in draw.sample(found, min(2, len(found))))
        if unseen:
            yield from ([one] for one in every if one[0] in UNSEEN)
    pairs = 0 if len(single) < 2 else 2 * len(records) if together else len(records) // 2
    for index in range(pairs):
        draw = draw_of(seed, "compare", records[0]["split"], index)
        asked = compare(single, by, draw)
        if together and asked:
            yield arranged(asked, draw)
        # One of four, so that no question is likelier where another is not asked
        elif not together and (number := draw.randrange(4)) < len(asked):
            yield [asked[number]]
    # In documents of their own: after the others, which image shows what is known
    for index in range(pairs // 2):
        draw = draw_of(seed, "side", records[0]["split"], index)
        pair = draw.sample(single, 2)
        asked = of_sides(pair, draw_of(seed, "side presence", records[0]["split"], index))
        if together:
            yield arranged(asked, draw)
            if all(pair[0]["objects"][0][what] != pair[1]["objects"][0][what] for what in by):
                which = which_of(pair, draw)
                yield draw.sample(which, len(which))
        else:
            yield [draw.choice([one for one in asked if one[0] == "side"])]
            yield from ([one] for one in asked if one[0] == "side_presence" and not index % 2)


def series(asked: Iterable[Asked], count: int, draw: Any) -> Iterator[list[Asked]]:
    """Documents of questions of one type, each about an image of its own.

    Args:
        asked: questions to draw from; those about two images are left out.
        count: documents.
        draw: random.Random.
    """
    by: dict[str, list[Asked]] = {}
    for one in asked:
        if len(one[1]) == 1:
            by.setdefault(one[0], []).append(one)
    for _ in range(count if by else 0):
        kind = draw.choice(list(by))
        shown = draw.sample(by[kind], min(draw.choice(SERIES), len(by[kind])))
        # Answers yes and no do not show which object's presence is asked for
        if kind != "presence" and len(shown) > 1 and draw.random() < 0.5:
            shown = [(kind, names, UNNAMED, answer) for _, names, _, answer in shown]
        yield shown


def plain_questions(images: Iterable[dict[str, str]], raw: Path) -> Iterator[Asked]:
    """A question about each emoji and each of the gray clothes.

    Args:
        images: key, source and caption of all images of a split.
        raw: folder that fetch.py wrote.
    """
    kinds = {
        entry[name].lower(): re.sub(r"\W+", " ", entry["subcategory"])
        for entry in emoji_entries(raw)
        for name in ("unified", "non_qualified")
        if entry[name]
    }
    for image in images:
        key, source = [image["key"]], image["source"]
        if source == "fashion-mnist":
            yield "clothes", key, "what is this?", image["caption"].removeprefix("a photo of ")
        if source in ("emoji", "fluent"):
            code = Path(key[0].partition("@")[0]).stem
            yield "emoji", key, "what kind of emoji is this?", kinds[code]


def document(asked: Sequence[Asked], number: int, split: str, together: bool) -> dict[str, Any]:
    """A line of a file of documents; images are files named after their keys.

    Args:
        asked: one or more questions. Images are shown again only if they differ from those of the
            question before.
        together: see questions.
    """
    segments: list[dict[str, Any]] = []
    shown: list[str] = []
    for _, images, question, answer in asked:
        if images != shown:
            segments += [{"image": f"{split}/{file_of(key)}", "target": False} for key in images]
            shown = images
        segments += [{"text": TEMPLATE.format(question), "target": False}, {"text": answer}]
    if asked[0][2] == UNNAMED:
        segments[2]["target"] = False
    kind = "train" if together else asked[0][0]
    return {"key": f"instruct/{kind}/{number:05}", "segments": segments}


def file_of(key: str) -> str:
    """composed/train/color/00001 -> composed-train-color-00001.webp, the name of its file."""
    return re.sub(r"[^\w.@-]", "-", key) + ".webp"


def build(
    data: Path, out: Path, images: int, seed: int, raw: Path | None = None, single: bool = False
) -> dict[str, dict[str, int]]:
    """Write documents and images; return how many questions of each type every split has."""
    import datasets

    files = {split: str(data / "data" / f"{split}-*.parquet") for split in SPLITS}
    loaded = datasets.load_dataset("parquet", data_files=files)
    by_split = collections.defaultdict(list)
    for line in (data / "records.jsonl").read_text().splitlines():
        by_split[json.loads(line)["split"]].append(json.loads(line))
    counts = {}
    for split, records in by_split.items():
        records = draw_of(seed, split).sample(records, min(images, len(records)))
        together = split == "train" and not single
        asked = list(questions(records, seed, together, unseen=split != "train"))
        if raw is not None:
            plain = loaded[split].select_columns(["key", "source", "caption"])
            once = [[one] for one in plain_questions(plain, raw)]
            asked += once * (REPEATS if split == "train" else 1)
        if together:
            every = [question for document in asked for question in document]
            asked += series(every, len(records) // 2, draw_of(seed, "series"))
        (out / split).mkdir(parents=True, exist_ok=True)
        wanted = {key for one in asked for _, keys, _, _ in one for key in keys}
        for row in loaded[split].cast_column("image", datasets.Image(decode=False)):
            if row["key"] in wanted:
                (out / split / file_of(row["key"])).write_bytes(row["image"]["bytes"])
        names = [split, *(["which"] if together else [])]
        lines: dict[str, list[str]] = {name: [] for name in names}
        for number, one in enumerate(asked):
            name = "which" if together and all(kind in WHICH for kind, *_ in one) else split
            lines[name].append(json.dumps(document(one, number, split, together)) + "\n")
        for name, own in lines.items():
            (out / f"{name}.jsonl").write_text("".join(own), encoding="utf-8")
        kinds = collections.Counter(kind for one in asked for kind, *_ in one)
        counts[split] = dict(sorted(kinds.items()))
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that composed.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the documents")
    parser.add_argument("--images", type=int, default=6000, help="images of each split, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument(
        "--raw", type=Path, help="folder that fetch.py wrote: asks about clothes and emoji"
    )
    parser.add_argument("--single", action="store_true", help="one question to a document of train")
    args = parser.parse_args(argv)
    counts = build(args.data, args.out, args.images, args.seed, args.raw, args.single)
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()

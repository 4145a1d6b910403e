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
| clothes | what is this? (gray clothes of Fashion-MNIST) | a sneaker |
| emoji | what kind of emoji is this? | its Unicode subgroup, such as country flag |

INSTRUCT holds train.jsonl, validation.jsonl and test.jsonl, which lavit_lm's `documents` reads, and
the images beside them. The key of a line is instruct/TYPE/..., and only its last text is a target:

    {"key": "instruct/color/1", "segments": [{"image": "train/1.webp", "target": false},
        {"text": "Question: what color is the bag? Answer:", "target": false}, {"text": "red"}]}

Images of the test split show combinations that never occur in training (composed.py), or are
clothes and emoji that do not; the last two types need RAW.
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
from sources import EMOJI

TEMPLATE = "Question: {} Answer:"
"""That of lavit_lm's MultimodalLM.answer."""
SINGLE = ("color", "place", "view")
"""Kinds of images that show one object."""
Asked = tuple[str, list[str], str, str]
"""(type, names of images, question, answer)."""


def name_of(record: dict[str, Any]) -> str:
    """The first object of an image."""
    return str(record["objects"][0]["object"])


def ask(record: dict[str, Any], names: Sequence[str], draw: Any) -> Iterator[Asked]:
    """All questions about one image.

    Args:
        record: of the image, as composed.py wrote it.
        names: of all objects, for questions whose answer is no.
        draw: random.Random.
    """
    image, shown = [record["key"]], [item["object"] for item in record["objects"]]
    first = name_of(record)
    if record["kind"] in SINGLE:
        yield "object", image, "what is this?", with_article(first, first)
    for item in record["objects"]:
        if item["named"] and record.get("count", 1) == 1:
            verb = "are" if item["object"] in NOT_COUNTED else "is"
            yield "color", image, f"what color {verb} the {item['object']}?", item["color"]
    if record["kind"] == "count":
        question = f"how many {plural(first)} are there?"
        yield "count", image, question, NUMBERS[record["count"] - 1]
    if "place" in record:
        verb = "are" if first in NOT_COUNTED else "is"
        yield "place", image, f"where {verb} the {first}?", record["place"]
    there = draw.random() < 0.5
    name = draw.choice(shown if there else [name for name in names if name not in shown])
    verb = "are there" if name in NOT_COUNTED else "is there"
    answer = "yes" if there else "no"
    yield "presence", image, f"{verb} {with_article(name, name)}?", answer


def compare(
    records: Sequence[dict[str, Any]], by: dict[str, dict[str, list[Any]]], draw: Any
) -> Asked | None:
    """A question about two images of single objects; None if there are no two as drawn.

    Args:
        by: "object" and "color" -> name -> records.
    """
    record, kind = draw.choice(records), draw.choice(("same object", "same color", "which"))
    what = "color" if kind == "same color" else "object"
    value = record["objects"][0][what]
    alike = kind != "which" and draw.random() < 0.5
    if alike:
        others = by[what][value]
    else:
        others = by[what][draw.choice(sorted(set(by[what]) - {value}) or [value])]
    other = draw.choice(others)
    if other is record or (not alike and other["objects"][0][what] == value):
        return None
    pair = [record["key"], other["key"]]
    if kind == "same object":
        return "compare", pair, "do both images show the same object?", "yes" if alike else "no"
    if kind == "same color":
        return "compare", pair, "have both objects the same color?", "yes" if alike else "no"
    answer = draw.choice(("the first", "the second"))
    name = name_of(record)
    question = f"which image shows {with_article(name, name)}?"
    return "which", pair if answer == "the first" else pair[::-1], question, answer


def questions(records: Sequence[dict[str, Any]], seed: int) -> Iterator[Asked]:
    """Up to two questions about every image, and half as many comparisons as images."""
    names = sorted({item["object"] for record in records for item in record["objects"]})
    by: dict[str, dict[str, list[Any]]] = {"object": {}, "color": {}}
    single = [r for r in records if r["kind"] in ("color", "place") and r["objects"][0]["named"]]
    for record in single:
        for what, groups in by.items():
            groups.setdefault(record["objects"][0][what], []).append(record)
    for record in records:
        draw = draw_of(seed, "ask", record["key"])
        found = list(ask(record, names, draw))
        yield from draw.sample(found, min(2, len(found)))
    for index in range(len(records) // 2 if len(single) > 1 else 0):
        if asked := compare(single, by, draw_of(seed, "compare", records[0]["split"], index)):
            yield asked


def plain_questions(images: Iterable[dict[str, str]], raw: Path) -> Iterator[Asked]:
    """A question about each emoji and each of the gray clothes.

    Args:
        images: key, source and caption of all images of a split.
        raw: folder that fetch.py wrote.
    """
    names = json.loads((raw / EMOJI / "emoji.json").read_text(encoding="utf-8"))
    kinds = {
        entry[name].lower(): re.sub(r"\W+", " ", entry["subcategory"])
        for entry in names
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


def document(asked: Asked, number: int, split: str) -> dict[str, Any]:
    """A line of a file of documents; images are files named after their keys."""
    kind, images, question, answer = asked
    shown = [{"image": f"{split}/{file_of(key)}", "target": False} for key in images]
    text = {"text": TEMPLATE.format(question), "target": False}
    return {"key": f"instruct/{kind}/{number:05}", "segments": [*shown, text, {"text": answer}]}


def file_of(key: str) -> str:
    """composed/train/color/00001 -> composed-train-color-00001.webp, the name of its file."""
    return re.sub(r"[^\w.@-]", "-", key) + ".webp"


def build(
    data: Path, out: Path, images: int, seed: int, raw: Path | None = None
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
        asked = list(questions(records, seed))
        if raw is not None:
            plain = loaded[split].select_columns(["key", "source", "caption"])
            asked += plain_questions(plain, raw)
        (out / split).mkdir(parents=True, exist_ok=True)
        wanted = {key for _, keys, _, _ in asked for key in keys}
        for row in loaded[split].cast_column("image", datasets.Image(decode=False)):
            if row["key"] in wanted:
                (out / split / file_of(row["key"])).write_bytes(row["image"]["bytes"])
        with open(out / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for number, one in enumerate(asked):
                file.write(json.dumps(document(one, number, split)) + "\n")
        counts[split] = dict(sorted(collections.Counter(kind for kind, *_ in asked).items()))
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
    args = parser.parse_args(argv)
    counts = build(args.data, args.out, args.images, args.seed, args.raw)
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()

"""Questions about pictures as their makers publish them, with human answers, and data sets of our own.

    ..._questions.json     {"data_subtype", "questions": [{question_id, image_id, question}]}         VQAv2, OK-VQA
    ..._annotations.json   {"annotations": [{question_id, answer_type, answers: [{answer}] x 10}]}    VQAv2, OK-VQA
    val.json               [{image, question, answer_type, answers: [{answer}] x 10}]                 VizWiz
    what lavit_tok reads   rows of image, question and answers, or of image and caption

Pictures are opened, missed and counted as caption_sets.py does it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caption_sets import Format, OpenedImages, id_of, open_picture, read_json, rows_of

from lavit_tok.data.image_sources import row_key

QUESTION_KEYS = ("question_id", "key", "__key__", "id")
VQA_SETS = {
    ("vqa", 214_354): "VQAv2 val2014",
    ("vqa", 107_394): "VQAv2 test-dev2015",
    ("vqa", 447_793): "VQAv2 test2015",
    ("vqa", 5046): "OK-VQA val2014",
    ("vizwiz", 4319): "VizWiz-VQA val",
    ("vizwiz", 3173): "VizWiz-VQA val of 2018",
}
"""Whole sets, by format and number of questions."""


@dataclass(frozen=True)
class QuestionSet:
    """Pictures with a question each, and what humans answered."""

    ids: list[Any]
    """Of the questions, as the results file names them."""
    pictures: list[Any]
    questions: list[str]
    answers: list[list[str]]
    """Of ten people; none where they are kept secret."""
    types: list[str]
    """yes/no, number, other, unanswerable; "all" where none are given."""
    name: str
    standard: str | None
    total: int
    id_name: str = "question_id"
    """What the official results file calls an id: VizWiz's goes by the picture."""
    made_up: str | None = None
    """What is made up where the set has no questions of its own."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, places: Sequence[int]) -> QuestionSet:
        names = ("ids", "pictures", "questions", "answers", "types")
        picked: dict[str, list[Any]] = {
            name: [getattr(self, name)[i] for i in places] for name in names
        }
        return replace(
            self, standard=self.standard if len(places) == self.total else None, **picked
        )

    def open(self, i: int) -> OpenedImages:
        return open_picture(self.images[i], self.ids[i])

    def describe(self) -> str:
        return f"{len(self)} of the {self.total} questions of {self.name}"


# Arguments


def add_questions(found: Any) -> None:
    """The arguments that `questions_of` reads."""
    found.add_argument(
        "--questions", type=Path, help="questions of VQAv2 or OK-VQA, or VizWiz's single file"
    )
    found.add_argument(
        "--annotations",
        type=Path,
        help="answers to --questions; without them answers are only written",
    )
    found.add_argument("--images", type=Path, help="folder of the pictures that --questions names")
    found.add_argument(
        "--data", help="in their place: any data set with questions and answers, or with captions"
    )
    found.add_argument(
        "--split", help="of --data: test, else validation, else the first, if not given"
    )
    found.add_argument(
        "--question",
        default="what is this?",
        help="what is asked of a --data that has captions and no questions",
    )


def questions_of(a: Namespace) -> QuestionSet:
    """The set that the arguments name. Raises ValueError for neither, both, or one of another format."""
    if (a.data is None) == (a.questions is None):
        raise ValueError("expected either --questions with --images, or --data")
    if a.data is not None:
        return question_rows(a.data, a.split, a.question)
    if a.images is None:
        raise ValueError(
            f"--questions {a.questions.name}: expected --images, the folder of its pictures"
        )
    return read_questions(a.questions, a.annotations, a.images)


# Formats


def read_questions(path: Path, annotations: Path | None, images: Path) -> QuestionSet:
    """VQAv2, OK-VQA or VizWiz. Raises ValueError for any other format, or answers to other questions."""
    expected = "VQAv2's questions {questions: [{question_id, image_id, question}]} or VizWiz's [{image, question}]"
    with Format(path, expected):
        found = read_json(path)
        if isinstance(found, list):
            return _vizwiz(path, annotations, images, found)
        asked, subtype = found["questions"], found.get("data_subtype", "")
        ids = [one["question_id"] for one in asked]
        questions = [str(one["question"]) for one in asked]
        pictures = [_coco_file(images, subtype, int(one["image_id"])) for one in asked]
    answers: list[list[str]] = [[] for _ in ids]
    types = ["all"] * len(ids)
    if annotations is not None:
        with Format(
            annotations,
            "VQAv2's answers {annotations: [{question_id, answers: [{answer}], answer_type}]}",
        ):
            by_id = {one["question_id"]: one for one in read_json(annotations)["annotations"]}
            missing = [i for i in ids if i not in by_id]
            if missing:
                raise ValueError(
                    f"{annotations.name}: {len(missing)} of {len(ids)} questions of {path.name} have no answers there, "
                    f"the first {missing[0]}: are they of one split?"
                )
            answers = [_answers(by_id[i]["answers"]) for i in ids]
            types = [str(by_id[i].get("answer_type", "all")) for i in ids]
    standard = VQA_SETS.get(("vqa", len(ids)))
    return QuestionSet(ids, pictures, questions, answers, types, path.name, standard, len(ids))


def _vizwiz(path: Path, annotations: Path | None, images: Path, found: list[Any]) -> QuestionSet:
    if annotations is not None:
        raise ValueError(
            f"{path.name}: VizWiz's file holds its answers, got --annotations {annotations.name} as well"
        )
    return QuestionSet(
        ids=[str(one["image"]) for one in found],
        pictures=[images / one["image"] for one in found],
        questions=[str(one["question"]) for one in found],
        answers=[_answers(one.get("answers", [])) for one in found],
        types=[str(one.get("answer_type", "all")) for one in found],
        name=path.name,
        standard=VQA_SETS.get(("vizwiz", len(found))),
        total=len(found),
        id_name="image",
    )


def _coco_file(images: Path, subtype: str, number: int) -> Path:
    """COCO_val2014_000000000042.jpg, or as of 2017 000000000042.jpg; test-dev2015 has test2015's pictures."""
    old = images / f"COCO_{subtype.replace('test-dev', 'test')}_{number:012d}.jpg"
    new = images / f"{number:012d}.jpg"
    return new if not old.exists() and new.exists() else old


def _answers(found: Any) -> list[str]:
    return [str(one["answer"]) if isinstance(one, dict) else str(one) for one in found]


def answers_in(path: Path) -> list[str]:
    """All human answers of an annotation file, VQAv2's or VizWiz's. Raises ValueError for any other format."""
    with Format(path, "answers {annotations: [{answers: [{answer}]}]} or [{answers: [{answer}]}]"):
        found = read_json(path)
        entries = found if isinstance(found, list) else found["annotations"]
        return [answer for one in entries for answer in _answers(one["answers"])]


def question_rows(data: str, split: str | None, question: str) -> QuestionSet:
    """Rows with question and answer(s); of rows with captions only, one question is asked of all.

    Raises:
        ValueError: a data set with neither.
    """
    rows, column, name = rows_of(data, split)
    columns = rows.column_names
    answered = next((c for c in ("answers", "answer", "caption") if c in columns), None)
    if answered is None or ("question" not in columns and "caption" not in columns):
        raise ValueError(
            f"{data}: expected columns question and answers, or caption, got {', '.join(columns)}"
        )
    made_up = None
    if "question" not in columns:
        made_up, answered = (
            f"no questions: {question!r} is asked of all, the caption is the only answer",
            "caption",
        )
    given = [_answers(x) if isinstance(x, list) else [str(x)] if x else [] for x in rows[answered]]
    places = [i for i, answers in enumerate(given) if any(answer.strip() for answer in answers)]
    return QuestionSet(
        ids=[id_of(row_key(rows[i], column, f"row {i}", QUESTION_KEYS), data) for i in places],
        pictures=[(rows, column, i) for i in places],
        questions=[question] * len(places)
        if made_up
        else [str(rows[i]["question"]) for i in places],
        answers=[given[i] for i in places],
        types=[str(rows[i]["answer_type"]) for i in places]
        if "answer_type" in columns
        else ["all"] * len(places),
        name=f"split {name!r} of {Path(data).name}",
        standard=None,
        total=len(places),
        made_up=made_up,
    )

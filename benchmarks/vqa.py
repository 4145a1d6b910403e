"""Answers to questions about pictures, in the official results formats, with the official accuracy.

    picture, question  -the model goes on, or ranks candidates, after k examples or none->  answer
    answers  ->  NAME.results.json  [{question_id, answer}], or VizWiz's [{image, answer}]
    answers, ten human answers each  -vqa_accuracy.py->  accuracy, of all and of each answer type

Formats: VQAv2, OK-VQA (--questions, --annotations), VizWiz (--questions), and any data set with questions and answers.
--data with captions only: one question is asked of every picture and its caption is the answer; that is no VQA, and is
labelled so. --candidates ranks answers by their likelihood, as DaVinci does, in place of open generation. A run that
was killed goes on where it was, with the same result. Writes vqa.md, .json, .results.json and vqa.png.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import caption_sets
import common
import question_sets
import talking
import torch
from figures import SHOWN, figure
from parts import Parts, digest, write_whole
from PIL import Image
from vqa_accuracy import accuracy, normalize

from lavit_lm import MultimodalLM

PUBLISHED = (
    ("LaVIT (7B)", "66.0", "54.6", "38.5", "zero-shot"),
    ("LaVIT-v2 (7B)", "68.3", "55.9", "41.0", "zero-shot"),
    ("Emu", "52.0", "38.2", "34.2", "zero-shot"),
    ("VL-GPT", "51.7", "-", "-", "zero-shot"),
    ("VL-GPT", "67.2", "-", "-", "after instruction tuning"),
)
"""VQAv2, OK-VQA, VizWiz accuracy as their authors give it; VQAv2 by the evaluation server."""
HUMANS = 10


class Answerer:
    """Answers questions.

    Args:
        lm: the model.
        shots: pictures, questions and answers that stand before each question.
        candidates: what may be answered; none lets the model say what it likes.
        a: template, max_tokens, temperature, top_p, seed, per_token, batch_size.
    """

    def __init__(
        self,
        lm: MultimodalLM,
        shots: Sequence[tuple[Image.Image, str, str]],
        candidates: Sequence[str],
        a: Namespace,
    ) -> None:
        self.lm, self.candidates, self.a = lm, list(candidates), a
        self.template = lm.objective.prompt_templates.answer if a.template is None else a.template
        self.before: list[Any] = []
        for picture, question, answer in shots:
            self.before += [picture, f"{self.asked(question)} {answer}".strip()]

    def asked(self, question: str) -> str:
        return self.template.replace("{}", question)

    def __call__(
        self, pictures: Sequence[Image.Image], questions: Sequence[str], items: Sequence[int]
    ) -> list[str]:
        """One answer for each."""
        prompts = []
        for picture, question in zip(pictures, questions, strict=True):
            asked = self.asked(question)
            prompts.append([*self.before, picture, *([asked] if asked else [])])
        if not self.candidates:
            return talking.said(self.lm, prompts, items, self.a)
        return [self.ranked(prompt) for prompt in prompts]

    def ranked(self, prompt: list[Any]) -> str:
        """The likeliest candidate."""
        size = self.a.batch_size
        parts = [self.candidates[i : i + size] for i in range(0, len(self.candidates), size)]
        found = torch.cat(
            [self.lm.rank(prompt, part, per_token=self.a.per_token).cpu() for part in parts]
        )
        return self.candidates[int(found.argmax())]


def main(a: Namespace) -> dict[str, Any]:
    found = caption_sets.limited(question_sets.questions_of(a), a.limit)
    shots = examples(a)
    offered = candidates_of(a, found)
    how = decoding(offered, a)
    lm = talking.load(a)
    answerer = Answerer(lm, shots, offered, a)
    settings = talking.settings_of(lm, a, "vqa") | {
        "questions": digest(found.ids, found.questions, found.name),
        "examples": digest([texts for _, *texts in shots], [p.tobytes().hex() for p, *_ in shots]),
        "candidates": digest(offered),
        "template": answerer.template,
        "decoding": [how, a.seed],
    }
    parts = Parts(a.out, a.name, settings)

    def say(pictures: list[Any], items: list[int]) -> list[str]:
        return answerer(pictures, [found.questions[i] for i in items], items)

    lines = talking.lines_of(found, parts, a.batch_size, say)
    good = [i for i, line in enumerate(lines) if "said" in line]
    values: dict[str, Any] = {
        "set": found.describe(),
        "made_up": found.made_up,
        "model": Path(a.model).name,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "template": answerer.template,
        "shots": a.shots,
        "examples": [texts for _, *texts in shots],
        "decoding": how,
        "candidates": len(offered) or None,
        "answers": len(good),
        "rejects": [line["reject"] for line in lines if "reject" in line],
    }
    results = [{found.id_name: found.ids[i], "answer": lines[i]["said"]} for i in good]
    write_whole(a.out / f"{a.name}.results.json", json.dumps(results).encode())
    values |= scores(found, [i for i in good if found.answers[i]], lines, len(offered))
    show(found, good, lines, values, a)
    common.write(a.name, a.out, "Visual question answering", text(values, a), values)
    parts.done()
    return values


def decoding(offered: Sequence[str], a: Namespace) -> str:
    if offered:
        form = "likelihood per token" if a.per_token else "likelihood"
        return f"the answer of greatest {form} among {len(offered)} candidates"
    return f"open generation, {talking.decoding(a)}, the first line of them"


def candidates_of(a: Namespace, found: question_sets.QuestionSet) -> list[str]:
    """Answers to choose from: a text file's lines, the most frequent of an annotation file, or those of the set.

    Raises:
        ValueError: no answers there.
    """
    if a.candidates is None:
        return []
    if a.candidates == "own":
        given = [answer for answers in found.answers for answer in answers]
    else:
        path = Path(a.candidates)
        if path.suffix != ".json":
            offered = [
                line.strip()
                for line in path.read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
            if not offered:
                raise ValueError(f"{path}: expected an answer a line, got none")
            return list(dict.fromkeys(offered))[: a.candidates_top]
        given = question_sets.answers_in(path)
    counts = Counter(normalize(answer) for answer in given if answer.strip())
    if not counts:
        raise ValueError(f"--candidates {Path(a.candidates).name}: it holds no answers")
    spelt: dict[str, str] = {}
    for answer in given:
        spelt.setdefault(normalize(answer), answer)
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return [spelt[answer] for answer in ordered[: a.candidates_top]]


def examples(a: Namespace) -> list[tuple[Image.Image, str, str]]:
    """Pictures, questions and answers that stand before each question, of another split than the one asked about.

    Raises:
        ValueError: asked for without a set to take them from.
    """
    if not a.shots:
        return []
    if a.data is not None:
        source = question_sets.question_rows(a.data, a.shots_split, a.question)
        if source.name == question_sets.questions_of(a).name:
            raise ValueError(
                f"--shots-split {a.shots_split}: the examples would be of the split that is asked about"
            )
    elif a.shots_questions is not None:
        if a.shots_questions.resolve() == a.questions.resolve():
            raise ValueError(
                "--shots-questions: the examples would be of the file that is asked about"
            )
        images = a.shots_images or a.images
        source = question_sets.read_questions(a.shots_questions, a.shots_annotations, images)
    else:
        raise ValueError(
            "--shots: expected --shots-questions, --shots-annotations (and --shots-images)"
        )
    source = source.take([i for i, answers in enumerate(source.answers) if answers])
    chosen = caption_sets.examples(source, a.shots, a.seed)
    common_answer = [Counter(source.answers[place]).most_common(1)[0][0] for place, _ in chosen]
    return [
        (p, source.questions[place], said)
        for (place, p), said in zip(chosen, common_answer, strict=True)
    ]


def scores(
    found: question_sets.QuestionSet, places: list[int], lines: Any, offered: int
) -> dict[str, Any]:
    """Accuracy x 100, of all and of each answer type, and what keeps it from standing beside published ones."""
    if not places:
        label = f"no accuracy: {found.name} comes without answers; the results file can be sent in"
        return {"accuracy": None, "label": label}
    each = {i: accuracy(lines[i]["said"], found.answers[i]) for i in places}
    types = sorted({found.types[i] for i in places})

    def mean(chosen: list[int]) -> float:
        return 100 * sum(each[i] for i in chosen) / len(chosen)

    departures = [] if found.standard else ["not a whole split of VQAv2, OK-VQA or VizWiz"]
    departures += [found.made_up] if found.made_up else []
    people = {len(found.answers[i]) for i in places}
    if people != {HUMANS}:
        counts = "1" if people == {1} else f"{min(people)} to {max(people)}"
        departures.append(
            f"{counts} human answers a question, not ten" + "; it counts as ten" * (people == {1})
        )
    if len(places) < len(found):
        departures.append(
            f"{len(found) - len(places)} of {len(found)} questions left out, unreadable or unanswered"
        )
    exact = sum(normalize(lines[i]["said"]) in map(normalize, found.answers[i]) for i in places)
    return {
        "accuracy": mean(places),
        "by_type": {
            t: {"accuracy": mean(p), "questions": len(p)}
            for t in types
            for p in [_of(found, places, t)]
        },
        "some_human_said_it": 100 * exact / len(places),
        "always_the_commonest": 100 * _commonest(found, places),
        "chance": 100 / offered if offered else None,
        "label": f"accuracy of the published description, own code, over {len(places)} questions of "
        f"{found.standard or found.name}",
        "departures": departures,
        "comparable": not departures,
    }


def _of(found: question_sets.QuestionSet, places: list[int], kind: str) -> list[int]:
    return [i for i in places if found.types[i] == kind]


def _commonest(found: question_sets.QuestionSet, places: list[int]) -> float:
    """The accuracy of one answer to everything, the commonest of this very set: a floor that knows no picture."""
    answer = Counter(normalize(x) for i in places for x in found.answers[i]).most_common(1)[0][0]
    return sum(accuracy(answer, found.answers[i]) for i in places) / len(places)


# What comes out


def show(
    found: question_sets.QuestionSet,
    good: Sequence[int],
    lines: Any,
    values: dict[str, Any],
    a: Namespace,
) -> None:
    chosen = [good[i] for i in common.evenly(SHOWN, len(good))]
    pictures = [picture for picture, _ in map(found.open, chosen) if picture is not None]
    texts = []
    for i in chosen:
        true = Counter(found.answers[i]).most_common(1)[0][0] if found.answers[i] else "-"
        texts.append(f"{found.questions[i]}\nsaid: {lines[i]['said']}\ntrue: {true}")
    bars: dict[str, float] = {}
    if values["accuracy"] is not None:
        bars = {"all": values["accuracy"]} | {
            t: v["accuracy"] for t, v in values["by_type"].items() if t != "all"
        }
        bars["the commonest answer to everything"] = values["always_the_commonest"]
    figure(a.out / f"{a.name}.png", bars, "accuracy x 100", pictures, texts)
    values["shown"] = [{"id": found.ids[i], "text": t} for i, t in zip(chosen, texts, strict=True)]


def text(v: dict[str, Any], a: Namespace) -> str:
    body = (
        f"{v['set']}. Model {v['model']}, {v['parameters'] / 1e6:.1f} M weights; {v['decoding']}; "
    )
    body += f"{v['shots']} examples before each question; template {v['template']!r}.\n\n{v['label']}.\n\n"
    if v["accuracy"] is not None:
        rows = [("all", f"{v['accuracy']:.2f}", v["answers"])]
        rows += [
            (t, f"{x['accuracy']:.2f}", x["questions"])
            for t, x in v["by_type"].items()
            if t != "all"
        ]
        rows.append(
            ("floor: the commonest answer to everything", f"{v['always_the_commonest']:.2f}", "-")
        )
        if v["chance"] is not None:
            rows.append(("a candidate by chance, if just one is right", f"{v['chance']:.2f}", "-"))
        body += common.table(("answers", "accuracy x 100", "questions"), rows)
        body += (
            f"\n\n{v['some_human_said_it']:.2f} % of the answers were given by at least one person."
        )
        body += "\n\n## Published\n\nBy the authors' own account. "
        if v["departures"]:
            body += "Not comparable with the figures above: " + "; ".join(v["departures"]) + ".\n\n"
        else:
            body += "The VQAv2 figures are of test-dev, by the evaluation server, which takes the results file.\n\n"
        body += common.table(("model", "VQAv2", "OK-VQA", "VizWiz", ""), PUBLISHED)
    body += common.rejected(v["rejects"])
    return (
        body
        + f"\n\nResults for the official server: `{a.name}.results.json`.\n\n![answers]({a.name}.png)"
    )


def arguments() -> Any:
    found = common.parser(__doc__, data=False, tokenizer=False, batch_size=32)
    question_sets.add_questions(found)
    talking.add_model(found)
    found.add_argument("--shots-questions", type=Path, help="question file of the examples")
    found.add_argument(
        "--template", help="{} is the question; by default as the model's objective asks"
    )
    found.add_argument("--max-tokens", type=common.positive, default=16, help="of an answer")
    found.add_argument(
        "--candidates",
        help="rank these: a text file, an answer a line; a VQA annotation file; or 'own', the set's",
    )
    found.add_argument(
        "--candidates-top", type=common.positive, default=3129, help="the most frequent so many"
    )
    found.add_argument(
        "--per-token", action="store_true", help="rank by mean log-likelihood of a token"
    )
    found.add_argument("--name", default="vqa", help="of the result files")
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

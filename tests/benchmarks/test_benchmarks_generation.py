"""Captions, answers and pictures by the official protocols: formats, scores against second computations, resuming."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.lm_parts import processor_and_model
from helpers.small_lms import TEXTS, small_tokenizer
from helpers.small_sets import captioned, crop
from PIL import Image as Picture
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from lavit_lm import MultimodalLM
from lavit_lm.checkpoints.native import save_model
from lavit_lm.objectives.lavit import LaVIT
from lavit_tok import VisualTokenizer

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
PICTURES = 7
SCORERS = ("--scorers", "BLEU", "ROUGE-L", "CIDEr")  # METEOR takes half a minute to start
needs_coco = pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


@pytest.fixture
def model(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any, tmp_path: Path) -> Path:
    """A random language model's directory; its visual tokenizer and a decoder lie beside it."""
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    processor, lm = processor_and_model("llama")
    save_model(
        tmp_path / "lm",
        lm,
        processor,
        LaVIT(),
        str(tmp_path / "visual"),
        tiny_tokenizer.fingerprint(),
    )
    return tmp_path / "lm"


@pytest.fixture
def coco(photos: list[Path], tmp_path: Path) -> Path:
    """A folder laid out like COCO's and VQAv2's, and VizWiz's file over the same pictures."""
    at = tmp_path / "coco"
    (at / "val2014").mkdir(parents=True)
    ids = [42 + 11 * i for i in range(PICTURES)]
    images = [{"id": one, "file_name": f"COCO_val2014_{one:012d}.jpg"} for one in ids]
    for i, image in enumerate(images):
        crop(photos, i).save(at / "val2014" / str(image["file_name"]))
    said = [
        {"image_id": one, "caption": TEXTS[(i + k) % 4]}
        for i, one in enumerate(ids)
        for k in range(2)
    ]
    write(at / "captions_val2014.json", {"images": images, "annotations": said})
    sentences = [{"raw": TEXTS[0]}, {"raw": TEXTS[1]}]
    splits = ["test", "train", "test", "val", "test", "restval", "train"]
    entries = [
        {
            "filepath": "val2014",
            "filename": x["file_name"],
            "split": s,
            "cocoid": x["id"],
            "sentences": sentences,
        }
        for x, s in zip(images, splits, strict=True)
    ]
    write(at / "dataset_coco.json", {"dataset": "coco", "images": entries})
    asked = [
        {"question_id": 10 * one, "image_id": one, "question": f"what is {i}?"}
        for i, one in enumerate(ids)
    ]
    write(at / "questions.json", {"data_subtype": "val2014", "questions": asked})
    people = [
        [{"answer": a, "answer_id": n} for n, a in enumerate(ten(i))] for i in range(PICTURES)
    ]
    types = ["yes/no", "other", "other", "number", "other", "yes/no", "number"]
    answers = [
        {"question_id": q["question_id"], "image_id": q["image_id"], "answer_type": t, "answers": p}
        for q, t, p in zip(asked, types, people, strict=True)
    ]
    write(at / "annotations.json", {"annotations": answers[::-1]})
    write(
        at / "vizwiz.json",
        [
            {
                "image": x["file_name"],
                "question": q["question"],
                "answers": p,
                "answer_type": t,
                "answerable": 1,
            }
            for x, q, p, t in zip(images, asked, people, types, strict=True)
        ],
    )
    return at


def ten(i: int) -> list[str]:
    """Ten people's answers to question i."""
    return ["red apple"] * (i + 1) + ["The town."] * 2 + [f"rain {n}" for n in range(7 - i)]


@pytest.fixture
def own(photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A captioned data set of our own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        captioned(tmp_path / "pictures" / split, photos, [TEXTS[i % 4] for i in range(PICTURES)])
    return tmp_path / "pictures"


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def run(script: ModuleType, out: Path, *words: object) -> dict[str, Any]:
    """The script's main with a command line's words; gives what its JSON file holds."""
    script.main(script.arguments().parse_args([*map(str, words), "--out", str(out)]))
    name = script.__name__
    text = (out / f"{name}.md").read_text()
    for part in ("command: `", "date: ", "commit: ", "hardware: ", "torchmetrics 1"):
        assert part in text
    assert Picture.open(out / f"{name}.png").width > 500
    found = json.loads((out / f"{name}.json").read_text())
    del found["stamp"]
    return found


def refused(scripts: Any, script: ModuleType, capsys: Any, out: Path, *words: object) -> str:
    """The one line that a user gets."""
    capsys.readouterr()
    given = [*map(str, words), "--out", str(out)]
    assert scripts("common").run(script.main, script.arguments().parse_args(given)) == 2
    said = capsys.readouterr().err.strip().replace("\r", "\n").splitlines()
    lines = [line for line in said if "/s]" not in line and line.strip()]  # but for progress bars
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# Accuracy


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The two dogs.", "2 dogs"),
        ("2.5 miles, 100,978 people", "2.5 miles 100978 people"),
        ("Dont", "don't"),
        ("girl's cat; dog/cow", "girl's cat dog cow"),
        ("2:50 pm", "2:50 pm"),
        ("None", "0"),
        ("  its\n well ", "its well"),
        ("a an the", ""),
        ("youre: yes!", "youre: yes"),
    ],
)
def test_vqa_answers_are_normalised(scripts: Any, answer: str, form: str):
    assert scripts("vqa_accuracy").normalize(answer) == form


def test_vqa_accuracy_by_hand(scripts: Any):
    accuracy = scripts("vqa_accuracy").accuracy
    for people, expected in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        humans = ["A cat."] * people + ["dog"] * (10 - people)
        assert accuracy("cat", humans) == pytest.approx(expected)
    # by the definition: every subset of nine, its matches over three, at most one
    humans = ["x"] * 3 + ["y"] * 5 + ["z"] * 2
    for said in "xyz":
        subsets = [humans[:i] + humans[i + 1 :] for i in range(10)]
        expected = sum(min(subset.count(said) / 3, 1) for subset in subsets) / 10
        assert accuracy(said, humans) == pytest.approx(expected)
    assert accuracy("Cat", ["the cat"]) == 1 and accuracy("cats", ["the cat"]) == 0
    with pytest.raises(ValueError, match="got none"):
        accuracy("x", [])


# Scores of captions

TRUE = [
    ["a red apple on a table", "an apple lies on the wooden table"],
    ["two dogs run on the beach", "dogs running along the beach at sunset", "two dogs"],
    ["the town hall in the rain", "a photo of the old town hall in the rain"],
]
SAID = ["a red apple on the table", "dogs run along a beach", "the old old hall"]


def ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(true: list[list[str]], said: list[str], most: int) -> float:
    """Papineni et al. (2002), over the corpus, the nearest reference length."""
    logs = []
    for n in range(1, most + 1):
        hits = total = 0
        for texts, text in zip(true, said, strict=True):
            highest: Counter[tuple[str, ...]] = Counter()
            for one in texts:
                highest |= ngrams(one, n)
            hits += sum((ngrams(text, n) & highest).values())
            total += sum(ngrams(text, n).values())
        logs.append(math.log(hits / total) if hits else -math.inf)
    length = sum(len(text.split()) for text in said)
    near = sum(
        min((abs(len(t.split()) - len(s.split())), len(t.split())) for t in ts)[1]
        for ts, s in zip(true, said, strict=True)
    )
    return math.exp(sum(logs) / most) * min(1.0, math.exp(1 - near / length))


def cider_d(true: list[list[str]], said: list[str]) -> list[float]:
    """Vedantam et al. (2015), with the clipping and length penalty of its second form, in dense vectors."""
    scores = np.zeros(len(said))
    for n in range(1, 5):
        words = sorted({g for texts in [*true, said] for text in texts for g in ngrams(text, n)})
        seen = np.array(
            [sum(any(w in ngrams(t, n) for t in texts) for texts in true) for w in words]
        )
        weights = math.log(len(true)) - np.log(np.maximum(seen, 1))

        def vector(text: str, n: int = n, words: Any = words, weights: Any = weights) -> np.ndarray:
            counts = ngrams(text, n)
            return np.array([counts[w] for w in words]) * weights

        for i, (texts, text) in enumerate(zip(true, said, strict=True)):
            for one in texts:
                a, b = vector(text), vector(one)
                norm = np.linalg.norm(a) * np.linalg.norm(b)
                gap = (len(text.split()) - 1) - (len(one.split()) - 1)
                near = float(np.minimum(a, b) @ b) / norm if norm else 0.0
                scores[i] += near * math.exp(-(gap**2) / 72) / len(texts) / 4
    return (10 * scores).tolist()


@needs_coco
def test_caption_scores_against_a_second_computation(scripts: Any):
    script = scripts("caption_scores")
    found = script.score(TRUE, SAID, ("BLEU", "CIDEr"), "words")
    for n in (1, 2, 3):
        assert found.scores[f"BLEU-{n}"] == pytest.approx(100 * bleu(TRUE, SAID, n), rel=1e-5)
    each = [100 * value for value in cider_d(TRUE, SAID)]
    assert found.cider == pytest.approx(each, rel=1e-6) and max(each) > 2 * min(each) > 0
    assert found.scores["CIDEr"] == pytest.approx(sum(each) / 3, rel=1e-6)
    assert not found.official and "not the official PTB" in found.tokenization
    perfect = script.score(TRUE, [texts[0] for texts in TRUE], ("BLEU", "ROUGE-L"), "words").scores
    assert perfect["BLEU-4"] == pytest.approx(100, rel=1e-5) and perfect[
        "ROUGE-L"
    ] == pytest.approx(100)
    assert (
        script.score(TRUE, ["", "", ""], ("BLEU", "ROUGE-L", "CIDEr"), "words").scores["CIDEr"] == 0
    )
    with pytest.raises(ValueError, match="all have true captions"):
        script.score([*TRUE[:2], []], SAID)


def test_bleu_without_pycocoevalcap(scripts: Any, monkeypatch: pytest.MonkeyPatch):
    script = scripts("caption_scores")
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    found = script.score(TRUE, SAID)
    assert found.scores["BLEU-2"] == pytest.approx(100 * bleu(TRUE, SAID, 2), rel=1e-5)
    assert (
        set(found.absent) == {"ROUGE-L", "CIDEr", "METEOR", "SPICE"}
        and "pip install" in found.absent["CIDEr"]
    )
    assert found.by.startswith("torchmetrics") and not found.official
    with pytest.raises(ValueError, match="--tokenization ptb: needs pycocoevalcap"):
        script.score(TRUE, SAID, tokenization="ptb")


@needs_coco
@needs_java
def test_the_official_tokenization(scripts: Any):
    script = scripts("caption_scores")
    spoilt = ["A red apple, on the table!", "Dogs run\u2028along a beach.", "the old (old) hall"]
    found = script.score(TRUE, spoilt, ("CIDEr", "SPICE"))
    assert found.official and "PTB" in found.tokenization
    assert found.scores["CIDEr"] > 0 and found.cider[1] == pytest.approx(
        100 * cider_d(TRUE, SAID)[1], rel=1e-6
    )
    assert "not fetched" in found.absent["SPICE"]
    assert script._ptb([["", "It isn't."], [""]]) == [["", "it is n't"], [""]]


# Formats


def test_official_caption_files(scripts: Any, coco: Path):
    script = scripts("caption_sets")
    found = script.read_captions(coco / "captions_val2014.json", coco / "val2014")
    assert found.ids[:2] == [42, 53] and found.captions[1] == TEXTS[1:3] and found.standard is None
    assert found.open(0)[0].size == (150, 120)
    karpathy = script.read_captions(coco / "dataset_coco.json", coco)
    assert karpathy.ids == [42, 64, 86] and karpathy.captions[0] == TEXTS[:2]
    flat = script.read_captions(coco / "dataset_coco.json", coco / "val2014", "train")
    assert flat.ids == [53, 108] and flat.open(1)[0] is not None
    with pytest.raises(ValueError, match=r"expected a split of .*'restval'.*got 'x'"):
        script.read_captions(coco / "dataset_coco.json", coco, "x")
    with pytest.raises(
        ValueError, match=r"expected COCO's captions .*got another format: no 'images'"
    ):
        script.read_captions(coco / "questions.json", coco)
    with pytest.raises(ValueError, match="got another format"):
        script.read_captions(coco / "vizwiz.json", coco)
    with pytest.raises(ValueError, match="got another format"):
        script.read_captions(coco / "val2014" / "COCO_val2014_000000000042.jpg", coco)


def test_whole_sets_are_known_and_parts_are_not(scripts: Any, tmp_path: Path):
    entry = {"filename": "x.jpg", "split": "test", "sentences": [{"raw": "x"}]}
    write(
        tmp_path / "k.json",
        {"dataset": "coco", "images": [{**entry, "cocoid": i} for i in range(5000)]},
    )
    whole = scripts("caption_sets").read_captions(tmp_path / "k.json", tmp_path)
    assert whole.standard == "COCO, Karpathy's test split"
    assert whole.take(range(4999)).standard is None and whole.take(range(5000)).standard
    asked = [{"question_id": i, "image_id": i, "question": "x"} for i in range(5046)]
    write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": asked})
    questions = scripts("question_sets").read_questions(tmp_path / "q.json", None, tmp_path)
    assert questions.standard == "OK-VQA val2014" and questions.take(range(9)).standard is None


def test_official_question_files(scripts: Any, coco: Path):
    script = scripts("question_sets")
    found = script.read_questions(
        coco / "questions.json", coco / "annotations.json", coco / "val2014"
    )
    assert (
        found.ids[:2] == [420, 530]
        and found.questions[1] == "what is 1?"
        and found.answers[2] == ten(2)
    )
    assert found.types[3] == "number" and found.id_name == "question_id"
    assert found.images[0].name == "COCO_val2014_000000000042.jpg"
    vizwiz = script.read_questions(coco / "vizwiz.json", None, coco / "val2014")
    assert vizwiz.ids[0] == "COCO_val2014_000000000042.jpg" and vizwiz.answers == found.answers
    assert vizwiz.id_name == "image" and vizwiz.questions == found.questions
    shutil.copy(coco / "val2014" / "COCO_val2014_000000000042.jpg", coco / "000000000042.jpg")
    newer = script.read_questions(coco / "questions.json", None, coco)
    assert newer.images[0].name == "000000000042.jpg" and newer.answers[0] == []
    with pytest.raises(ValueError, match="expected VQAv2's questions"):
        script.read_questions(coco / "captions_val2014.json", None, coco)
    with pytest.raises(ValueError, match="expected VQAv2's answers"):
        script.read_questions(coco / "questions.json", coco / "captions_val2014.json", coco)
    fewer = json.loads((coco / "annotations.json").read_text())
    write(coco / "fewer.json", {"annotations": fewer["annotations"][:3]})
    with pytest.raises(
        ValueError, match=r"4 of 7 questions of questions.json have no answers there, the first 420"
    ):
        script.read_questions(coco / "questions.json", coco / "fewer.json", coco)


# Captioning


def captioning_words(coco: Path, model: Path) -> list[object]:
    files = ["--annotations", coco / "captions_val2014.json", "--images", coco / "val2014"]
    return [
        *files,
        "--model",
        model,
        "--max-tokens",
        6,
        "--batch-size",
        2,
        "--tokenization",
        "words",
        *SCORERS,
    ]


def test_captioning_runs(scripts: Any, coco: Path, model: Path, tmp_path: Path, capsys: Any):
    script, words = scripts("captioning"), captioning_words(coco, model)
    found = run(script, tmp_path / "out", *words)
    results = json.loads((tmp_path / "out" / "captioning.results.json").read_text())
    lm = MultimodalLM.from_pretrained(model, decoder=None)
    images = json.loads((coco / "captions_val2014.json").read_text())["images"]
    files = [coco / "val2014" / image["file_name"] for image in images]
    again = [" ".join(text.split()) for text in lm.caption(files, 6)]
    assert results == [
        {"image_id": x["id"], "caption": t} for x, t in zip(images, again, strict=True)
    ]
    assert (
        "not the whole Karpathy test split of COCO" in found["departures"]
        and not found["comparable"]
    )
    assert "2 true captions a picture at least, not five" in found["departures"]
    assert found["captions"] == PICTURES
    if find_spec("pycocoevalcap"):
        true = [[TEXTS[i % 4], TEXTS[(i + 1) % 4]] for i in range(PICTURES)]
        split = [" ".join(re.findall(r"[\w']+", text.lower())) for text in again]
        assert found["cider_of_each"] == pytest.approx(
            [100 * v for v in cider_d(true, split)], abs=1e-6
        )
    text = (tmp_path / "out" / "captioning.md").read_text()
    assert "Not comparable" in text and "134.0" in text and "over 7 pictures" in text
    assert run(script, tmp_path / "twice", *words) == found

    beams = run(script, tmp_path / "beams", *words, "--beams", 3, "--min-tokens", 2)
    results = json.loads((tmp_path / "beams" / "captioning.results.json").read_text())
    wide = lm.caption(files, 6, min_tokens=2, beams=3)
    assert [r["caption"] for r in results] == [
        " ".join(text.split()) for text in wide
    ] and wide != again
    assert (
        beams["decoding"] == "3 beams, 2 to 6 tokens"
        and found["decoding"] == "greedy, 1 to 6 tokens"
    )
    line = refused(
        scripts, script, capsys, tmp_path / "x", *words, "--beams", 2, "--temperature", 1
    )
    assert "nothing is sampled there" in line

    fewer = run(script, tmp_path / "fewer", *words, "--limit", 3)
    assert (
        fewer["set"] == "3 of the 7 pictures of captions_val2014.json"
        and "over 3 pictures" in fewer["label"]
    )


def test_captioning_with_examples(
    scripts: Any, coco: Path, model: Path, own: Path, tmp_path: Path, capsys: Any
):
    script = scripts("captioning")
    words = [
        "--data",
        own,
        "--model",
        model,
        "--max-tokens",
        5,
        "--limit",
        2,
        "--tokenization",
        "words",
        *SCORERS,
    ]
    found = run(
        script, tmp_path / "out", *words, "--shots", 2, "--prompt", "a picture of", "--seed", 3
    )
    source = scripts("caption_sets").caption_rows(str(own), "train")
    before: list[Any] = []
    for place in np.random.default_rng(3).permutation(PICTURES)[:2].tolist():
        before += [source.open(place)[0], f"a picture of {source.captions[place][0]}"]
    assert found["examples"] == [text.removeprefix("a picture of ") for text in before[1::2]]
    lm = MultimodalLM.from_pretrained(model, decoder=None)
    results = json.loads((tmp_path / "out" / "captioning.results.json").read_text())
    for result in results:
        (said,) = lm.complete(
            [*before, own / result["image_id"], "a picture of"], 5, max_images=0
        ) or [""]
        assert " ".join(said.split()) == result["caption"]
    assert [r["image_id"] for r in results] == ["test/0.png", "test/3.png"], (
        "seen from the data set"
    )
    assert found["seen_in_training"] == 2 and found["cider_of_unseen"] is None
    texts = ["rain", TEXTS[0].upper()] + ["snow"] * (PICTURES - 2)
    rows = [f"{i}.png,{text}" for i, text in enumerate(texts)]
    (own / "train" / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
    unseen = run(script, tmp_path / "unseen", *words)
    assert unseen["seen_in_training"] == 1
    if unseen["cider_of_each"]:
        assert unseen["cider_of_unseen"] == pytest.approx(unseen["cider_of_each"][1])
    line = refused(
        scripts, script, capsys, tmp_path / "x", *words, "--shots", 1, "--shots-split", "test"
    )
    assert "the split that is captioned" in line
    words = captioning_words(coco, model)
    assert "--shots-annotations" in refused(
        scripts, script, capsys, tmp_path / "x", *words, "--shots", 1
    )
    split = [
        "--annotations",
        coco / "dataset_coco.json",
        "--images",
        coco,
        *words[4:],
        "--shots",
        1,
    ]
    shown = run(
        script, tmp_path / "karpathy", *split, "--shots-annotations", coco / "dataset_coco.json"
    )
    assert shown["captions"] == 3 and shown["examples"] == [TEXTS[0]]


def test_bad_pictures_and_files(
    scripts: Any, coco: Path, model: Path, own: Path, tmp_path: Path, capsys: Any
):
    script, words = scripts("captioning"), captioning_words(coco, model)
    bad = coco / "val2014" / "COCO_val2014_000000000064.jpg"
    bad.write_bytes(b"no picture")
    found = run(script, tmp_path / "out", *words)
    assert [r["key"] for r in found["rejects"]] == ["64"] and "not an image" in found["rejects"][
        0
    ]["reason"]
    assert found["captions"] == 6 and any(
        "1 of 7 pictures left out" in d for d in found["departures"]
    )
    results = json.loads((tmp_path / "out" / "captioning.results.json").read_text())
    assert 64 not in [r["image_id"] for r in results]
    assert (
        "`64`: COCO_val2014_000000000064.jpg: not an image"
        in (tmp_path / "out" / "captioning.md").read_text()
    )
    bad.unlink()
    line = refused(scripts, script, capsys, tmp_path / "x", *words)
    assert "COCO_val2014_000000000064.jpg: no such picture; 1 of the 7" in line
    assert not (tmp_path / "x").exists(), "said before anything is made"
    other = ["--annotations", coco / "questions.json", *words[2:]]
    assert "expected COCO's captions" in refused(scripts, script, capsys, tmp_path / "x", *other)
    assert "expected --images" in refused(
        scripts, script, capsys, tmp_path / "x", *words[:2], *words[4:]
    )
    both = [*words, "--data", own]
    assert "either --annotations" in refused(scripts, script, capsys, tmp_path / "x", *both)


def killed(script: str, out: Path, words: list[object], where: str, line: str) -> None:
    """Run the script until the third call of a function, after which `line` is executed and the run killed with -9."""
    home, name = where.rsplit(".", 1)
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import {home.split(".")[0]}, {script}
done = {home}.{name}
calls = []
def once(*given):
    found = done(*given)
    calls.append(given)
    if len(calls) == 3:
        {line}
        os.kill(os.getpid(), signal.SIGKILL)
    return found
{home}.{name} = once
{script}.main({script}.arguments().parse_args(sys.argv[1:]))
"""
    given = [sys.executable, "-c", program, *map(str, words), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(given, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def test_captioning_goes_on_after_kill(
    scripts: Any, coco: Path, model: Path, tmp_path: Path, capsys: Any
):
    script, words = scripts("captioning"), captioning_words(coco, model)
    whole = run(script, tmp_path / "whole", *words)
    torn = "(given[0].folder / 'said-000006.unfinished').write_bytes(b'half')"
    killed("captioning", tmp_path / "out", words, "parts.Parts.values", torn)
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert (
        len(list(folder.glob("*.safetensors"))) == 3
        and not (tmp_path / "out" / "captioning.json").exists()
    )
    capsys.readouterr()
    other = run(script, tmp_path / "out", *words, "--limit", 3)
    assert "went on" not in capsys.readouterr().out and other["captions"] == 3, (
        "other pictures share nothing"
    )
    assert run(script, tmp_path / "out", *words) == whole
    assert "went on from 3 finished parts" in capsys.readouterr().out and not folder.exists()


# Questions


def test_vqa_runs(scripts: Any, coco: Path, model: Path, tmp_path: Path, capsys: Any):
    script = scripts("vqa")
    files = ["--questions", coco / "questions.json", "--annotations", coco / "annotations.json"]
    common = ["--images", coco / "val2014", "--model", model, "--batch-size", 3, "--max-tokens", 4]
    found = run(script, tmp_path / "out", *files, *common)
    results = json.loads((tmp_path / "out" / "vqa.results.json").read_text())
    lm = MultimodalLM.from_pretrained(model, decoder=None)
    asked = json.loads((coco / "questions.json").read_text())["questions"]
    for result, question in zip(results, asked, strict=True):
        picture = coco / "val2014" / f"COCO_val2014_{question['image_id']:012d}.jpg"
        said = lm.answer(picture, question["question"], max_tokens=4)
        assert result == {"question_id": question["question_id"], "answer": " ".join(said.split())}
    assert not found["comparable"] and "not a whole split" in found["departures"][0]

    ranked = run(script, tmp_path / "ranked", *files, *common, "--candidates", "own")
    accuracy = scripts("vqa_accuracy").accuracy
    offered = sorted(
        {a for i in range(PICTURES) for a in ten(i)},
        key=lambda x: (-sum(ten(i).count(x) for i in range(PICTURES)), x.lower()),
    )
    results = json.loads((tmp_path / "ranked" / "vqa.results.json").read_text())
    each = []
    for i, result in enumerate(results):
        picture = coco / "val2014" / f"COCO_val2014_{asked[i]['image_id']:012d}.jpg"
        scores = lm.rank([picture, f"Question: {asked[i]['question']} Answer:"], offered)
        assert result["answer"] == offered[int(scores.argmax())]
        each.append(accuracy(result["answer"], ten(i)))
    assert ranked["accuracy"] == pytest.approx(100 * sum(each) / PICTURES)
    assert ranked["by_type"]["number"] == {
        "accuracy": pytest.approx(50 * (each[3] + each[6])),
        "questions": 2,
    }
    floor = sum(accuracy("red apple", ten(i)) for i in range(PICTURES)) / PICTURES
    assert ranked["always_the_commonest"] == pytest.approx(100 * floor)
    assert ranked["candidates"] == len(offered) and ranked["chance"] == pytest.approx(
        100 / len(offered)
    )

    (tmp_path / "yes.txt").write_text("red apple\n\n")
    listed = run(script, tmp_path / "listed", *files, *common, "--candidates", tmp_path / "yes.txt")
    assert listed["accuracy"] == pytest.approx(100 * floor)
    top = ["--candidates", coco / "annotations.json", "--candidates-top", 1]
    assert run(script, tmp_path / "top", *files, *common, *top)["accuracy"] == pytest.approx(
        100 * floor
    )
    vizwiz = run(script, tmp_path / "vizwiz", "--questions", coco / "vizwiz.json", *common, *top)
    assert (
        vizwiz["accuracy"] == pytest.approx(100 * floor) and vizwiz["by_type"] == listed["by_type"]
    )
    results = json.loads((tmp_path / "vizwiz" / "vqa.results.json").read_text())
    assert results[0] == {"image": "COCO_val2014_000000000042.jpg", "answer": "red apple"}
    blind = run(script, tmp_path / "blind", *files[:2], *common)
    assert blind["accuracy"] is None and "comes without answers" in blind["label"]
    other = ["--questions", coco / "captions_val2014.json", *common]
    assert "expected VQAv2's questions" in refused(scripts, script, capsys, tmp_path / "x", *other)


def test_vqa_with_examples_and_after_kill(
    scripts: Any, coco: Path, model: Path, tmp_path: Path, capsys: Any
):
    script = scripts("vqa")
    words = ["--questions", coco / "vizwiz.json", "--images", coco / "val2014", "--model", model]
    words += [
        "--max-tokens",
        4,
        "--batch-size",
        2,
        "--shots",
        1,
        "--template",
        "Q: {} A:",
        "--limit",
        6,
    ]
    shots = [
        "--shots-questions",
        coco / "questions.json",
        "--shots-annotations",
        coco / "annotations.json",
    ]
    whole = run(script, tmp_path / "whole", *words, *shots)
    killed("vqa", tmp_path / "out", [*words, *shots], "parts.Parts.values", "pass")
    capsys.readouterr()
    assert run(script, tmp_path / "out", *words, *shots) == whole
    assert "went on from 3 finished parts" in capsys.readouterr().out
    place = int(np.random.default_rng(0).permutation(PICTURES)[0])
    said = Counter(ten(place)).most_common(1)[0][0]
    assert whole["examples"] == [[f"what is {place}?", said]]
    lm, pictures = (
        MultimodalLM.from_pretrained(model, decoder=None),
        sorted((coco / "val2014").iterdir()),
    )
    results = json.loads((tmp_path / "out" / "vqa.results.json").read_text())
    for result in results:
        i = [p.name for p in pictures].index(result["image"])
        prompt = [
            pictures[place],
            f"Q: what is {place}? A: {said}",
            pictures[i],
            f"Q: what is {i}? A:",
        ]
        assert result["answer"] == " ".join("".join(lm.complete(prompt, 4, max_images=0)).split())
    same = ["--shots-questions", coco / "vizwiz.json"]
    assert "the file that is asked about" in refused(
        scripts, script, capsys, tmp_path / "x", *words, *same
    )


def test_vqa_of_captions_says_that_it_is_none(scripts: Any, model: Path, own: Path, tmp_path: Path):
    script = scripts("vqa")
    words = ["--data", own, "--model", model, "--template", "", "--candidates", "own", "--limit", 4]
    found = run(script, tmp_path / "out", *words)
    assert "no questions: 'what is this?' is asked of all" in found["made_up"]
    assert any(
        "1 human answers a question, not ten; it counts as ten" in d for d in found["departures"]
    )
    lm = MultimodalLM.from_pretrained(model, decoder=None)
    results = json.loads((tmp_path / "out" / "vqa.results.json").read_text())
    rows = [0, 1, 3, 5]
    offered = sorted(
        {TEXTS[i % 4] for i in rows},
        key=lambda t: (-[i % 4 for i in rows].count(TEXTS.index(t)), t),
    )
    right = 0
    for i, result in zip(rows, results, strict=True):
        best = offered[int(lm.rank([own / "test" / f"{i}.png"], offered).argmax())]
        assert result == {"question_id": f"test/{i}.png", "answer": best}
        right += best == TEXTS[i % 4]
    assert found["accuracy"] == 100 * right / 4


# Pictures


def vectors(captions: Any) -> torch.Tensor:
    """In the place of sentence embeddings, whose model is a package of its own: letters counted, at unit length."""
    counts = torch.zeros(len(captions), 384)
    for i, caption in enumerate(captions):
        for letter in caption:
            counts[i, ord(letter) % 384] += 1
    return torch.nn.functional.normalize(counts, dim=1)


@pytest.fixture
def teacher(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random teacher as its recipe saves one."""
    monkeypatch.setattr(scripts("caption_space"), "embed", vectors)
    config = CLIPVisionConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        CLIPVisionModel(config).save_pretrained(tmp_path / "teacher")
        layer = torch.nn.Linear(16, 384)
    save_file(layer.state_dict(), tmp_path / "teacher" / "caption_projection.safetensors")
    return tmp_path / "teacher"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A random CLIP with a text tokenizer."""
    part = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokenizer = small_tokenizer("llama")
    tokenizer.pad_token = "</s>"
    text = {
        **part,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 12,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    config = CLIPConfig(
        text_config=text,
        vision_config={**part, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. (2017), by SciPy."""
    (m, n), (s, t) = (a.mean(0), b.mean(0)), (np.cov(a.T), np.cov(b.T))
    return float(((m - n) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real))


def painting_words(coco: Path, model: Path) -> list[object]:
    files = ["--annotations", coco / "captions_val2014.json", "--images", coco / "val2014"]
    return [
        *files,
        "--model",
        model,
        "--decoder",
        model.parent / "decoder",
        "--steps",
        2,
        "--batch-size",
        2,
    ]


def test_text_to_image_runs(
    scripts: Any, coco: Path, model: Path, teacher: Path, clip: Path, tmp_path: Path, capsys: Any
):
    script = scripts("text_to_image")
    words = [
        *painting_words(coco, model),
        "--captions",
        5,
        "--seeds",
        2,
        "--scorer",
        teacher,
        "--clip",
        clip,
    ]
    found = run(script, tmp_path / "out", *words)
    (distance,) = [name for name in found["figures"] if "Frechet" in name]
    assert (
        "not FID" in distance and "FID," not in (tmp_path / "out" / "text_to_image.md").read_text()
    )
    assert (
        any("not COCO val2014" in d for d in found["departures"])
        and "5 captions, not 30000" in found["departures"]
    )
    assert found["figures"][distance]["seeds"] == 2 and not found["comparable"]

    # the first seed's pictures anew: what was drawn, and the figures by loops
    captions = scripts("caption_sets").read_captions(
        coco / "captions_val2014.json", coco / "val2014"
    )
    places, texts = script.choose(captions, 5, 0)
    assert len(set(places)) == 5 and all(
        t in captions.captions[p] for p, t in zip(places, texts, strict=True)
    )
    lm = MultimodalLM.from_pretrained(model, decoder=str(model.parent / "decoder"))
    seeded = scripts("parts").seeded
    made = []
    for place, caption in zip(
        places, texts, strict=True
    ):  # one at a time, as each depends on nothing beside it
        generators = [seeded(what, 0, captions.ids[place], 0) for what in ("codes", "noise")]
        codes = lm.generate_codes_batch([caption], 3.0, generators[:1], top_k=50)
        image = lm.decoder(
            codes, generator=[generators[1]], num_inference_steps=2, guidance_scale=2.0
        ).images[0]
        made.append(image)
    files = sorted((tmp_path / "out" / found["pictures"] / "seed0").iterdir())
    for file, image, caption in zip(files, made, texts, strict=True):
        with Picture.open(file) as kept:
            assert np.abs(np.array(kept, int) - np.array(image, int)).max() <= 1, (
                "rounding of another batch"
            )
            assert kept.text["caption"] == caption  # type: ignore[attr-defined]
    crops = [Picture.open(captions.images[p]).convert("RGB") for p in places]
    square = [
        c.resize((40, 32), Picture.Resampling.BICUBIC).crop((4, 0, 36, 32)) for c in crops
    ]  # 150x120
    kept = [Picture.open(file).resize((32, 32), Picture.Resampling.BICUBIC) for file in files]

    def features(images: list[Picture.Image]) -> np.ndarray:
        return lm.visual_tokenizer.features(lm.visual_tokenizer.preprocess(images)).mean(1).detach().double().numpy()

    expected = frechet(features(square), features(kept))
    assert found["per_seed"][0][distance] == pytest.approx(
        expected, rel=0.02
    )  # crops resized by another box
    near = "the teacher's space: 100 x cosine with the own caption"
    pixels = torch.stack([torch.from_numpy(np.array(k)).permute(2, 0, 1) for k in kept])
    shown = scripts("caption_space").Scorer(teacher).describe(pixels)
    assert found["per_seed"][0][near] == pytest.approx(
        100 * float((shown * vectors(texts)).sum(1).mean()), abs=0.05
    )
    assert f"CLIP {clip.name}: 100 x cosine with the own caption" in found["figures"]

    assert run(script, tmp_path / "twice", *words) == found
    for file in files:
        again = tmp_path / "twice" / found["pictures"] / "seed0" / file.name
        assert again.read_bytes() == file.read_bytes()
    guided = run(script, tmp_path / "out", *words, "--guidance", 5)
    assert guided["pictures"] != found["pictures"], "both lie side by side"
    line = refused(scripts, script, capsys, tmp_path / "x", *words, "--inception", clip)
    assert "FID over 5 pictures means nothing" in line
    line = refused(scripts, script, capsys, tmp_path / "x", *words[:10], "--best-of", 2)
    assert "expected --clip or --scorer" in line
    line = refused(scripts, script, capsys, tmp_path / "x", *words, "--clip", coco)
    assert "expected a CLIP model" in line


def test_clip_scores_are_those_of_transformers(scripts: Any, clip: Path, photos: list[Path]):
    found = scripts("nearness").Clip(clip, "cpu")
    pixels = torch.stack(
        [
            torch.from_numpy(np.array(Picture.open(p).convert("RGB").resize((16, 16)))).permute(
                2, 0, 1
            )
            for p in photos
        ]
    )
    texts = [*TEXTS[:3], " ".join(TEXTS)]
    given = found.tokenizer(
        texts, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    normal = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        whole = found.model(given["input_ids"], normal, given["attention_mask"])
    torch.testing.assert_close(found.describe(pixels), whole.image_embeds)
    torch.testing.assert_close(found.embed(texts), whole.text_embeds)


def test_best_of_some(scripts: Any, own: Path, model: Path, teacher: Path, tmp_path: Path):
    script = scripts("text_to_image")
    words = [
        "--data",
        own,
        "--model",
        model,
        "--decoder",
        model.parent / "decoder",
        "--steps",
        1,
        "--captions",
        3,
    ]
    words += ["--seeds", 1, "--scorer", teacher, "--batch-size", 4]
    one, best = (
        run(script, tmp_path / "one", *words),
        run(script, tmp_path / "best", *words, "--best-of", 3),
    )
    assert best["best_of"] == {"samples": 3, "by": "the teacher's space"}
    assert "best of 3 by a scorer" in best["departures"] and one["best_of"]["by"] is None
    near = "the teacher's space: 100 x cosine with the own caption"
    assert best["figures"][near]["mean"] > one["figures"][near]["mean"]
    # every sample anew: the one that was kept is the nearest
    lm = MultimodalLM.from_pretrained(model, decoder=str(model.parent / "decoder"))
    scorer, painting = scripts("nearness").CaptionSpace(teacher, "cpu"), scripts("painting")
    painter = painting.Painter(
        lm, scorer, script.arguments().parse_args([*map(str, words), "--batch-size", "1"])
    )
    for file in sorted((tmp_path / "best" / best["pictures"] / "seed0").iterdir()):
        notes = Picture.open(file).text  # type: ignore[attr-defined]
        drawn = [painter.samples([(notes["caption"], notes["id"], k)], 0)[0][0] for k in range(3)]
        scores = (
            scorer.describe(torch.stack([painting.uint8(d) for d in drawn]))
            @ vectors([notes["caption"]]).T
        )
        assert int(scores.argmax()) == int(notes["sample"])
        assert float(scores.max()) == pytest.approx(float(notes["score"]), abs=1e-4)


def test_text_to_image_goes_on_after_kill(
    scripts: Any, coco: Path, model: Path, tmp_path: Path, capsys: Any
):
    script, words = (
        scripts("text_to_image"),
        [*painting_words(coco, model), "--seeds", 1, "--size", 24],
    )
    whole = run(script, tmp_path / "whole", *words)
    assert whole["captions"] == PICTURES and "24x24, made at 16x16" in whole["crop"]
    killed("text_to_image", tmp_path / "out", words, "painting.save", "pass")
    folder = tmp_path / "out" / whole["pictures"] / "seed0"
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    assert len(kept) == 3, "killed within a batch of two"
    assert run(script, tmp_path / "out", *words) == whole
    for name, time in kept.items():
        assert (folder / name).stat().st_mtime_ns == time, "made once"
    for file in folder.iterdir():
        assert (
            file.read_bytes()
            == (tmp_path / "whole" / whole["pictures"] / "seed0" / file.name).read_bytes()
        )
    (folder / "000001.png").write_bytes(b"damaged")
    assert run(script, tmp_path / "out", *words) == whole
    bad = coco / "val2014" / "COCO_val2014_000000000064.jpg"
    bad.write_bytes(b"no picture")
    found = run(script, tmp_path / "out", *words)
    assert [r["key"] for r in found["rejects"]] == ["64"] and found["scored"] == 6
    assert "1 unreadable pictures left out" in found["departures"]
    against_all = run(script, tmp_path / "all", *words, "--captions", 3, "--reference", "all")
    assert (against_all["captions"], against_all["reference"]) == (3, 6)
    bad.unlink()
    assert "COCO_val2014_000000000064.jpg" in refused(
        scripts, script, capsys, tmp_path / "x", *words
    )

"""The language model's benchmarks: each runs at tiny size, and its numbers are what a second way of counting gives."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lm_parts import processor_and_model
from helpers.lm_runs import SMALL
from helpers.small_lms import TEXTS, small_lm, small_tokenizer
from helpers.small_sets import captioned
from PIL import Image as Picture
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from lavit_lm import MultimodalLM
from lavit_lm.checkpoints.native import save_model
from lavit_lm.objectives.lavit import LaVIT
from lavit_tok import VisualCodes, VisualTokenizer
from lavit_tok.cli import main as lavit_tok

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
PICTURES = 10


@pytest.fixture
def folder(
    tiny_tokenizer: VisualTokenizer,
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A visual tokenizer, captioned crops of photographs as train and test splits, and a config of an LM."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    for split, words in (("train", TEXTS[:2]), ("test", [*TEXTS, "rain"])):
        said = [words[i % len(words)] for i in range(PICTURES)]
        captioned(tmp_path / "pictures" / split, photos, said, sources="ab")
    (tmp_path / "lm.json").write_text(json.dumps(SMALL))
    return tmp_path


@pytest.fixture
def model(folder: Path, tiny_tokenizer: VisualTokenizer) -> Path:
    """A random language model's directory."""
    processor, lm = processor_and_model("llama")
    save_model(
        folder / "lm", lm, processor, LaVIT(), str(folder / "visual"), tiny_tokenizer.fingerprint()
    )
    return folder / "lm"


@pytest.fixture
def scorer(folder: Path) -> Path:
    """A random teacher as its recipe saves one; sentence embeddings of width 384."""
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
        CLIPVisionModel(config).save_pretrained(folder / "teacher")
        layer = torch.nn.Linear(16, 384)
    save_file(layer.state_dict(), folder / "teacher" / "caption_projection.safetensors")
    return folder / "teacher"


def run(script: ModuleType, out: Path, *words: object) -> dict[str, Any]:
    """The script's main with a command line's words; gives what its JSON file holds."""
    script.main(script.arguments().parse_args([*map(str, words), "--out", str(out)]))
    name = next(out.glob("*.json"))
    text = name.with_suffix(".md").read_text()
    for part in ("command: `", "date: ", "commit: ", "hardware: ", "lightning 2"):
        assert part in text
    return json.loads(name.read_text())


def refused(scripts: Any, script: ModuleType, capsys: Any, *words: object) -> str:
    """The one line that a user gets."""
    capsys.readouterr()
    assert (
        scripts("common").run(script.main, script.arguments().parse_args([*map(str, words)])) == 2
    )
    said = capsys.readouterr().err.strip().replace("\r", "\n").splitlines()
    lines = [line for line in said if "/s]" not in line and line.strip()]  # but for progress bars
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# Packing

QUICK = (
    "--repeats",
    2,
    "--batches",
    2,
    "--batch-size",
    2,
    "--steps",
    2,
    "--warm",
    1,
    "--matmul",
    64,
)


def test_packing_runs_on_shards(scripts: Any, folder: Path, tmp_path: Path, capsys: Any):
    script = scripts("packing")
    words = [
        str(folder / "pictures"),
        "--tokenizer",
        str(folder / "visual"),
        "--out",
        str(folder / "shards"),
    ]
    assert lavit_tok(["shards", *words]) == 0
    small_tokenizer("llama").save_pretrained(folder / "text")
    words = [
        "--shards",
        folder / "shards",
        "--tokenizer",
        folder / "visual",
        "--model",
        folder / "lm.json",
    ]
    text = ["--text-tokenizer", folder / "text", "--block", 64, *QUICK]
    found = run(script, tmp_path / "out", *words, *text)
    fill = found["fill"]
    assert (fill["rows"], fill["too_long"]) == (PICTURES, 0)
    assert fill["fill"] == pytest.approx(fill["used"] / (64 * fill["blocks"]))
    # a row is <s>, <|img|> codes <|/img|>, words (unless they were dropped as a prompt) and </s>
    visual, processor = (
        VisualTokenizer.from_pretrained(folder / "visual"),
        processor_and_model("llama")[0],
    )
    pictures = scripts("picture_sets").load_pictures(
        str(folder / "pictures"), 32, "train", crop=False
    )
    codes, said = (
        visual.encode(pictures.pixels).lengths,
        [len(processor.text(c)) for c in pictures.captions],
    )
    without = int(codes.sum()) + 4 * PICTURES
    assert without < fill["used"] <= without + sum(said)
    assert found["loss"]["difference"] <= script.LOSS
    assert found["loss"]["difference"] == pytest.approx(
        max(abs(found["loss"][k]["packed"] - found["loss"][k]["alone"]) for k in ("text", "image"))
    )
    small = refused(scripts, script, capsys, *words, "--block", 64, "--tokenizer", "default")
    assert "made by another tokenizer" in small or "codebook" in small
    assert "expected a split" in refused(scripts, script, capsys, *words, "--split", "nowhere")


def test_packing_runs_on_made_up_rows(scripts: Any, folder: Path, tmp_path: Path, capsys: Any):
    script = scripts("packing")
    words = ["--synthetic", "--tokenizer", folder / "visual", "--rows", 300]
    found = run(script, tmp_path / "out", *words, "--model", folder / "lm.json", *QUICK)
    assert found["fill"]["fill"] > 0.9 and found["fill"]["block"] == 128  # few rows, short blocks
    forms, overhead = found["speed"]["forms"], found["overhead"]
    assert (
        min(forms["packed"]["fill"], forms["padded, like lengths"]["fill"])
        > forms["padded"]["fill"]
    )
    for form in forms.values():
        assert form["fill"] * form["places"] == pytest.approx(found["speed"]["useful_tokens"])
        rate = found["speed"]["useful_tokens"] / form["seconds"]
        assert form["useful_tokens_per_second"] == pytest.approx(rate)
    assert forms["packed"]["packed_is_faster_by"] == 1
    # before the first step both have the same weights: the bare model, at the same shapes, has the same loss
    assert overhead["first_loss"]["lightning"] == pytest.approx(
        overhead["first_loss"]["bare"], abs=1e-4
    )
    utilisation = found["utilisation"]
    rate = overhead["useful_tokens_per_second"]["lightning"]
    share = rate * utilisation["flops_per_place"] / utilisation["matmul_peak"]
    assert utilisation["share"]["Lightning, whole step"] == pytest.approx(share)
    line = refused(scripts, script, capsys, *words, "--model", "huge")
    assert line.startswith("error: --model: expected small, 1b, a JSON file")
    line = refused(
        scripts,
        script,
        capsys,
        *words,
        "--lengths",
        folder / "lm.json",
        "--model",
        folder / "lm.json",
    )
    assert "expected the JSON that tokens_per_image.py writes" in line


def test_made_up_rows_are_as_long_as_measured(scripts: Any):
    script = scripts("language_models")
    rows = script.synthetic(4000, [9, 30, 0, 10], 7, seed=1)
    lengths = np.array([len(row["codes"]) for row in rows])
    assert set(lengths) == {1, 3} and abs((lengths == 3).mean() - 0.25) < 0.03
    assert {code for row in rows for code in row["codes"]} == set(range(7))
    assert 20 < statistics.fmean(len(row["caption"]) for row in rows) < 40
    assert rows[:5] == script.synthetic(4000, [9, 30, 0, 10], 7, seed=1)[:5]


def test_padded_batches_of_like_lengths(scripts: Any):
    rows = [[0] * n for n in (3, 9, 1, 2, 8, 4)]
    dealt = scripts("packing").shuffled(rows, 4, seed=0)
    assert sorted(len(row) for batch in dealt for row in batch) == [1, 2, 3, 4, 8, 9]
    assert sorted(map(len, dealt)) == [1, 1, 2, 2]
    batches = scripts("packing").like_lengths(rows, 16)  # two rows of 9 places would be 18
    assert [[len(row) for row in batch] for batch in batches] == [[9], [8, 4], [3, 2, 1]]
    assert all(len(batch) * len(batch[0]) <= 16 for batch in batches)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_place(scripts: Any, tied: bool):
    """Against torch's counter, which counts every matrix product."""
    model, length = small_lm("llama", 96, tied), 24
    ids = torch.randint(96, (2, length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, use_cache=False).logits.sum().backward()

    counted = scripts("timing").flops(step) / ids.numel()
    weights, everything = scripts("language_models").flops_per_place(model, length)
    assert weights < everything == pytest.approx(counted, rel=0.01)


# Generation


def logits_after(lm: MultimodalLM, rows: Any) -> torch.Tensor:
    """Of the next id of each row alone."""
    with torch.no_grad():
        return torch.stack([lm.model.causal(row.ids[None]).logits[0, -1] for row in rows])


def test_generate_speed_runs(scripts: Any, folder: Path, model: Path, tmp_path: Path, capsys: Any):
    script = scripts("generate_speed")
    found = run(
        script,
        tmp_path / "out",
        "--model",
        model,
        "--batch-sizes",
        1,
        3,
        "--codes",
        5,
        "--repeats",
        2,
    )
    for values, batch in zip(found["runs"], (1, 3), strict=True):
        assert values["cached_equals_uncached_guided"] and values["cached_equals_uncached_unguided"]
        assert values["equal_codes_guided"] == 1
        rate = batch * 5 / values["seconds"]["guided"]
        assert values["codes_per_second"]["guided"] == pytest.approx(rate)
        assert (
            values["guided_over_unguided"] > 0.2
            and 0 < values["constraint"]["seconds"] < values["seconds"]["guided"]
        )
        assert (
            values["over_transformers"]["guided"] > 0.1
            and values["over_transformers"]["unguided"] > 0.1
        )
    assert (tmp_path / "out" / "generate_speed.png").exists() and not list(
        (tmp_path / "out").glob(".*")
    )
    lm = MultimodalLM.from_pretrained(model, decoder=None)
    greedy = script.arguments().parse_args(["--codes", "5", "--top-k", "1"])
    rows, free = [lm.prompts.for_image(text) for text in TEXTS], lm.prompts.sequence([], "image")
    for guidance in (1.0, 3.0):  # the bare loop goes on from the same rows, under the same formula
        said = script.bare(lm, TEXTS, guidance, greedy)()
        given, other = (logits_after(lm, some) for some in (rows, [free] * len(TEXTS)))
        logits = other + guidance * (given - other)
        logits[:, lm.processor.stop] = -torch.inf  # of the very first id no model may make an end
        assert said.shape == (len(TEXTS), 5) and said[:, 0].tolist() == logits.argmax(1).tolist()
    assert script.equal_share([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
    words = ["--model", folder / "lm.json", "--tokenizer", folder / "visual", "--codes"]
    quick = ["--batch-sizes", 2, "--repeats", 1, "--cached-only"]
    assert run(script, tmp_path / "shape", *words, 4, *quick)["runs"][0]["batch"] == 2
    assert "expected 1..16" in refused(scripts, script, capsys, *words, 17, *quick)
    assert "--model: expected" in refused(scripts, script, capsys, "--model", "nowhere")


# Quality


def test_lm_quality_runs(
    scripts: Any,
    folder: Path,
    model: Path,
    scorer: Path,
    tmp_path: Path,
    tiny_decoder: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
):
    script = scripts("lm_quality")
    monkeypatch.setattr(scripts("caption_space"), "embed", vectors)
    monkeypatch.setattr(script, "embed", vectors)
    tiny_decoder.save_pretrained(folder / "decoder")
    words: list[object] = [
        "--data",
        folder / "pictures",
        "--model",
        model,
        "--decoder",
        folder / "decoder",
    ]
    words += ["--scorer", scorer, "--steps", 2, "--seeds", 2, "--batch-size", 3, "--max-tokens", 6]
    found = run(script, tmp_path / "out", *words, "--captions", 5)
    assert sorted(found["true_captions"]) == sorted([*TEXTS, "rain"])
    assert found["seen_in_training"] == 2
    read = (folder / "pictures" / "test" / "metadata.csv").read_text().splitlines()
    names = dict(line.split(",")[:2] for line in read)
    for key, caption in zip(found["keys"], found["true_captions"], strict=True):
        assert names[Path(key).name] == caption

    images = found["images"]
    assert (
        images["chance"] == {"top1": 1 / 5, "top5": 1} and images["generated"]["top5"]["mean"] == 1
    )
    for seed in images["per_seed"]:
        assert seed["top1"] == sum(rank == 0 for rank in seed["ranks"]) / 5
    # the first seed's pictures anew, scored by loops
    lm = MultimodalLM.from_pretrained(model, decoder=str(folder / "decoder"))
    captions = found["true_captions"]
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    codes = lm.generate_codes_batch(captions, 3.0, generators, top_k=50)
    assert codes.to_list() == images["per_seed"][0]["codes"]
    noise = [torch.Generator().manual_seed(i) for i in range(5)]
    shown = lm.decoder(codes, generator=noise, num_inference_steps=2, guidance_scale=2.0).images
    seen, said = (
        described(
            scorer, [picture.resize((32, 32), Picture.Resampling.BICUBIC) for picture in shown]
        ),
        [],
    )
    for i, vector in enumerate(vectors(captions)):
        near = [float(seen[i] @ other) for other in vectors(captions)]
        said.append(sum(value >= near[i] for value in near) - 1)
        assert float(vector @ vector) == pytest.approx(1)
    assert (
        sum(a == b for a, b in zip(said, images["per_seed"][0]["ranks"], strict=True)) >= 4
    )  # resized on bytes here

    texts = found["captions"]
    pictures = scripts("picture_sets").load_pictures(
        str(folder / "pictures"), 32, "test", crop=False
    )
    places = [pictures.keys.index(key) for key in found["keys"]]
    again = lm.caption(
        [Picture.fromarray(pictures.pixels[i].permute(1, 2, 0).numpy()) for i in places], 6
    )
    assert texts["said"] == again and texts["exact"] == sum(map(script.same, again, captions)) / 5
    similar = (vectors(again) * vectors(captions)).sum(1).mean()
    assert texts["similarity_to_true_caption"] == pytest.approx(float(similar))

    everything = lm.visual_tokenizer.encode(pictures.pixels)
    check_bits(found["bits"], lm, everything, pictures.captions)
    assert (
        sum(group["codes"] for group in found["bits"]["by_source"].values())
        == found["bits"]["codes"]
    )
    text = (tmp_path / "out" / "lm_quality.md").read_text()
    assert (
        all(caption in text for caption in captions)
        and "of the captions stand in the train split too" in text
    )
    sheet = Picture.open(tmp_path / "out" / "lm_quality.png")
    assert sheet.width > 8 * 64 and sheet.height > 2 * 64

    only = run(script, tmp_path / "bits", *words, "--parts", "bits")
    assert only["bits"] == found["bits"] and "images" not in only
    unseen = run(
        script, tmp_path / "unseen", *words, "--parts", "captions", "--captions", 3, "--unseen"
    )
    assert unseen["seen_in_training"] == 0 and not set(unseen["true_captions"]) & set(TEXTS[:2])
    line = refused(scripts, script, capsys, *words, "--captions", 6, "--parts", "captions")
    assert "at most the 5 different captions there are, got 6" in line
    (scorer / "caption_projection.safetensors").write_bytes(b"nothing")
    assert "expected tensors weight and bias" in refused(scripts, script, capsys, *words)
    (scorer / "caption_projection.safetensors").unlink()
    assert "missing ['caption_projection.safetensors']" in refused(scripts, script, capsys, *words)


def vectors(captions: Any) -> torch.Tensor:
    """In the place of sentence embeddings, whose model is a package of its own: letters counted, at unit length."""
    counts = torch.zeros(len(captions), 384)
    for i, caption in enumerate(captions):
        counts[i, 0] = 0.5
        for letter in caption:
            counts[i, ord(letter) % 384] += 1
    return torch.nn.functional.normalize(counts, dim=1)


@torch.no_grad()
def described(scorer: Path, pictures: list[Picture.Image]) -> torch.Tensor:
    """The teacher's own description, as its recipe says it."""
    recipes = str(SCRIPTS.parent / "recipes" / "default")
    sys.path.insert(0, recipes)
    try:
        from teacher import Teacher
    finally:
        sys.path.remove(recipes)
    from safetensors.torch import load_file

    teacher = Teacher(
        image_size=16, patch_size=8, hidden_size=16, layers=1, heads=2, intermediate_size=32
    )
    teacher.vision = CLIPVisionModel.from_pretrained(scorer)
    teacher.caption_projection.load_state_dict(load_file(scorer / "caption_projection.safetensors"))
    from lavit_tok import VisualImageProcessor

    small = [picture.resize((16, 16), Picture.Resampling.BICUBIC) for picture in pictures]
    pixels = torch.stack(
        [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in small]
    )
    return teacher.eval().describe(
        teacher.norm(teacher.features(VisualImageProcessor(16).normalize(pixels)))
    )


@torch.no_grad()
def check_bits(
    found: dict[str, Any], lm: MultimodalLM, codes: VisualCodes, captions: list[str]
) -> None:
    """Against one plain forward of the LM for each picture, and numpy's entropy."""
    listed, v = codes.to_list(), lm.processor.vocabulary
    count = sum(map(len, listed))
    assert (found["images"], found["codes"]) == (len(captions), count)
    shares = np.bincount(np.concatenate(listed)) / count
    unigram = -sum(p * math.log2(p) for p in shares if p)
    assert found["unigram_entropy"] == pytest.approx(unigram)
    for name, prompts in (("given the caption", captions), ("without it", [""] * len(captions))):
        total, ends = 0.0, 0.0
        for row, prompt in zip(listed, prompts, strict=True):
            before = [*lm.processor.start, *lm.processor.text(prompt), v.begin]
            ids = [*before, *(v.first + code for code in row), v.end]
            log_p = lm.model.causal(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            nats = [-float(log_p[i - 1, ids[i]]) for i in range(len(before), len(ids))]
            total, ends = total + sum(nats[:-1]), ends + nats[-1]
        per_code = total / count / math.log(2)
        assert found[name]["bits_per_code"] == pytest.approx(per_code, rel=1e-5)
        assert found[name]["below_unigram"] == pytest.approx(1 - per_code / unigram, abs=1e-5)
        assert found[name]["bits_per_code_with_end"] == pytest.approx(
            (total + ends) / count / math.log(2), rel=1e-5
        )


def test_ranks_by_brute_force(scripts: Any):
    script = scripts("caption_space")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 6, generator=generator), torch.randn(30, 6, generator=generator)
    found = script.ranks(a, b)
    for i in range(30):
        order = sorted(range(30), key=lambda j: -float(a[i].double() @ b[j].double()))
        assert order.index(i) == int(found[i])
    assert script.top(found) == {
        "top1": float((found == 0).double().mean()),
        "top5": float((found < 5).double().mean()),
    }
    assert script.top(found, found < 0) is None
    assert script.ranks(b, b * 0 + b[0]).tolist() == [29] * 30, (
        "an answer that fits all identifies none"
    )


def test_captions_are_chosen_by_seed(scripts: Any):
    choose = scripts("lm_quality").choose
    captions = ["a", "b", "a", "", "c", "b", "a"]
    for seed in range(5):
        places = choose(captions, 3, seed)
        assert sorted(captions[i] for i in places) == ["a", "b", "c"] and places == choose(
            captions, 3, seed
        )
    assert len({tuple(choose(captions, 3, seed)) for seed in range(9)}) > 1
    assert [captions[i] for i in choose(captions, 1, 0, frozenset("ab"))] == ["c"]
    with pytest.raises(ValueError, match="at most the 3 different captions"):
        choose(captions, 4, 0)


def test_the_scorer_is_the_teacher(scripts: Any, scorer: Path, photos: list[Path]):
    pictures = [Picture.open(photo).convert("RGB").resize((16, 16)) for photo in photos]
    pixels = torch.stack(
        [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    )
    found = scripts("caption_space").Scorer(scorer).describe(pixels, batch_size=3)
    torch.testing.assert_close(found, described(scorer, pictures))
    assert found.norm(dim=1).tolist() == pytest.approx([1] * 4)

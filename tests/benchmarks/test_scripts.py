"""Every script runs end to end at the smallest size, and a run that was killed goes on."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_lm import MultimodalLM
from lavit_tok import VisualTokenizer

from benchmarks import captioning, compare, lm_quality  # isort: skip
from benchmarks import reconstruction, speed, tokens_per_image  # isort: skip
from benchmarks.shared import cache, cli, datasets, metrics, provenance, report  # isort: skip

ROOT = Path(__file__).parents[2]
NAMES = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem != "__init__")


# Command lines and results


@pytest.mark.parametrize("name", NAMES)
def test_every_script_has_a_command_line(name: str) -> None:
    """Each in docs/benchmarks.md, and every command there parses."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    commands = re.findall(rf"`python benchmarks/{name}\.py([^`]*)`", page)
    assert commands
    for args in commands:
        import_module(f"benchmarks.{name}").arguments().parse_args(shlex.split(args))


def test_a_script_runs_as_a_module(tmp_path: Path) -> None:
    """The killed run below is started by the path of its file."""
    shipped = ROOT / "benchmarks" / "results" / "reconstruction.json"
    command = [sys.executable, "-m", "benchmarks.compare", "--results", shipped, "--out", tmp_path]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
    assert "TiTok" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_results_hide_where_they_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = str(tmp_path / "benchmarks" / "x.py")
    monkeypatch.setattr(sys, "argv", [script, "--data", "/somewhere/else/images"])
    assert provenance.stamp()["command"] == "python benchmarks/x.py --data images"


def test_spread_is_the_sample_deviation() -> None:
    assert report.spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "seeds": 2}
    assert report.spread([1.0])["std"] == 0
    rows = [(1, 0.123456), (None, report.spread([1.0, 3.0]))]
    assert report.table(("a", "b"), rows).splitlines()[2:] == ["| 1 | 0.1235 |", "| - | 2 ± 1.4 |"]


def test_options_take_the_type_of_their_default() -> None:
    parser = cli.parser("Doc.", data=False, a=(3, ""), b=([int], ""), c=(False, ""), d=(str, ""))
    args = parser.parse_args(["--b", "1", "2", "--c"])
    assert (args.a, args.b, args.c, args.d) == (3, [1, 2], True, None)
    with pytest.raises(SystemExit):
        parser.parse_args(["--a", "0"])


# Stages


def test_stages_are_computed_once_and_never_mixed(tmp_path: Path) -> None:
    calls, args = [], cli.parser("", data=False).parse_args(["--out", str(tmp_path)])

    def compute(batch: list[int]) -> dict[str, torch.Tensor]:
        calls.append(batch)
        return {"x": torch.tensor(batch)}

    first = cache.Stages(args, "name", torch.zeros(2))
    for _ in range(2):
        found = first.tensors("one", range(5), 2, compute)
        assert found["x"].tolist() == [0, 1, 2, 3, 4]
    assert calls == [[0, 1], [2, 3], [4]]
    first.batches("one", [3], 2, compute)  # other items are another stage, whatever its name
    same, other = (cache.Stages(args, "name", x) for x in (torch.zeros(2), torch.ones(2)))
    assert same.folder == first.folder != other.folder
    assert cache.Stages(args, "name", torch.zeros(1, 2)).folder != first.folder
    other("two", lambda: 3)
    other.done()
    assert not other.folder.exists() and first.folder.exists()


def test_a_killed_run_goes_on_to_the_same_result(
    run: Any, data: Path, tokenizer: Path, tmp_path: Path, capsys: Any
) -> None:
    """kill -9 of a process, the same command in another: every number is that of a whole run."""
    args = ["--data", data, "--tokenizer", tokenizer, "--batch-size", 1, "--budgets", 2, 5, 8]
    path, out = ROOT / "benchmarks" / "reconstruction.py", tmp_path / "killed"
    command = [sys.executable, path, *args, "--threads", 1, "--out", out]
    started, threads = time.monotonic(), torch.get_num_threads()
    words = [str(word) for word in command]
    killed = subprocess.Popen(words, cwd=tmp_path, stdout=-3, stderr=-3)  # finds no package there
    while len(list(out.rglob("output.pkl"))) < 15 and time.monotonic() < started + 300:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not (out / "reconstruction.json").exists()
    try:
        torch.set_num_threads(1)
        whole = run(reconstruction, *args, "--threads", 1)
        assert "finished stages" not in capsys.readouterr().out
        assert run(reconstruction, *args, "--threads", 1, out="killed") == whole
    finally:
        torch.set_num_threads(threads)
    assert re.search(r"continuing from \d+ finished stages", capsys.readouterr().out)


# Images


def test_tokens_per_image(run: Any, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    found = run(tokens_per_image, "--data", data, "--tokenizer", tokenizer, "--batch-size", 3)
    assert found["images"] == sum(found["histogram"]) == 8 and found["bad_records"] == 1
    assert found["rejects"][0]["key"].endswith("broken.png")
    assert "`test/broken.png`" in (tmp_path / "out" / "tokens_per_image.md").read_text()
    pixels = datasets.load_images(str(data), 32).pixels
    lengths = VisualTokenizer.from_pretrained(tokenizer).encode(pixels).lengths
    assert found["codes_per_image"]["mean"] == pytest.approx(float(lengths.double().mean()))
    assert [x["codes"] for x in found["fewest"]] == sorted(lengths.tolist())[:4]
    assert [x["codes"] for x in found["most"]] == sorted(lengths.tolist(), reverse=True)[:4]
    assert sum(group["images"] for group in found["by_source"].values()) == 8
    assert Image.open(tmp_path / "out" / "tokens_per_image_extremes.png").width > 4 * 64


def test_reconstruction(
    run: Any, refused: Any, data: Path, tokenizer: Path, decoder: Path, tmp_path: Path
) -> None:
    args = ["--data", data, "--tokenizer", tokenizer, "--decoder", decoder, "--steps", 2]
    args += ["--seeds", 2, "--decoded", 6, "--batch-size", 4]
    found = run(reconstruction, *args, "--selections", *reconstruction.SELECTIONS)
    assert found["features"]["plain"]["mean"] <= 1 and "'train'" in found["mean_feature_over"]
    own, *points = found["curve"]["points"]
    assert (own["selection"], own["budget"]) == ("learned", None)
    budgets, selections = (2, 4, 5, 8), reconstruction.SELECTIONS
    expected = [(selection, budget) for selection in selections for budget in budgets]
    assert [(p["selection"], p["budget"]) for p in points] == expected
    assert all(p["lengths"]["mean"] == pytest.approx(p["budget"], abs=0.2) for p in points)
    by_selection = {p["selection"]: p for p in points if p["budget"] == 5}
    assert by_selection["random"]["plain"]["std"] > 0 == by_selection["learned"]["plain"]["std"]
    assert own["psnr"]["std"] > 0  # two seeds of the decoder's noise
    # The selector's own decision anew, without stages.
    images, ours = datasets.load_images(str(data), 32), VisualTokenizer.from_pretrained(tokenizer)
    indices = datasets.evenly_spaced(6, 8)
    features = ours.features(ours.preprocess(images.pixels[indices]))
    mean = metrics.feature_mean(ours, [datasets.load_images(str(data), 32, "train").pixels])
    codes = ours.encode(images.pixels[indices])
    cosines = metrics.cosines(features, ours.reconstruct_features(codes), mean)
    for name in ("plain", "centered"):
        assert own[name]["mean"] == pytest.approx(float(cosines[name].mean()), abs=1e-5)
    (distance,) = found["pixels"]["distances"]
    assert "(not FID) [only 6 images" in distance["name"] and distance["kind"] == "Frechet"
    text = (tmp_path / "out" / "reconstruction.md").read_text()
    assert "Not comparable with published numbers" in text
    assert Image.open(tmp_path / "out" / "reconstruction.png").width > 8 * 32
    line = refused(reconstruction, *args, "--inception", "weights.pth", "--out", tmp_path)
    assert "FID over 6 images means nothing" in line
    assert "expected 1..16" in refused(reconstruction, *args, "--budgets", 17, "--out", tmp_path)


def squares(weights: Any, antialias: bool, device: str) -> Any:
    """In place of Inception-v3, whose weights are not here: bilinear 4x4 RGB."""
    options = {"size": (4, 4), "mode": "bilinear", "antialias": antialias}
    return lambda x: torch.nn.functional.interpolate(x.float() / 255, **options).flatten(1)


def test_another_tokenizer_with_both_resizings_of_inception(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "inception_space", squares)
    args = ["--data", data, "--tokenizer", "helpers.small_tokenizers:vqmodel", "--seeds", 1]
    args += ["--inception", "weights.pth", "--set-name", "coco-val2017", "--force"]
    found = run(reconstruction, *args)
    assert found["features"] == {} and found["codes_per_image"] == 64
    distances = found["pixels"]["distances"]
    kinds = [(d["kind"], d["antialias"]) for d in distances]
    assert kinds == [("Frechet", None), ("rFID", True), ("rFID", False)]
    for part in ("only 8 images", "8 of the 5000 images of coco-val2017", "random weights"):
        assert all(part in distance["name"] for distance in distances)
    from helpers.small_tokenizers import small

    pixels = datasets.load_images(str(data), 32).pixels
    codec = small()
    decoded = codec.decode(codec.encode(pixels))
    for distance in distances[1:]:
        space = squares(None, distance["antialias"], "cpu")
        expected = metrics.frechet(space(pixels), space(decoded))
        assert distance["value"]["mean"] == pytest.approx(expected, rel=1e-3)
    scores = metrics.psnr_ssim(decoded / 255, pixels / 255)
    for name in ("psnr", "ssim"):
        value = found["curve"]["points"][0][name]["mean"]
        assert value == pytest.approx(float(scores[name].mean()), rel=1e-5)
    squeezed = run(reconstruction, *args, "--squeeze", out="squeezed")
    assert "no center crop" in squeezed["pixels"]["distances"][0]["name"]
    records = compare.read_results([tmp_path / "out" / "reconstruction.json"])
    assert len(records) == 3 and all(record["reasons"] for record in records)


def result(folder: Path, name: str, **pixels: Any) -> Path:
    """A result of reconstruction.py, as far as compare.py reads it."""
    distance = {"name": "rFID", "kind": "rFID", "antialias": False}
    distance["value"] = report.spread([2.5, 3])
    values = {"stamp": {"commit": "abc", "date": "today"}, "weights": name, "codes_per_image": 90.0}
    values["pixels"] = {"against_published": [], "distances": [distance], **pixels}
    (folder / f"{name}.json").write_text(json.dumps(values))
    return folder / f"{name}.json"


def test_only_the_same_protocol_is_beside_published_figures(run: Any, tmp_path: Path) -> None:
    other = {"name": "Frechet", "kind": "Frechet", "antialias": None, "value": None}
    sharp = {"name": "rFID", "kind": "rFID", "antialias": True, "value": None}
    paths = [
        result(tmp_path, "same"),
        result(tmp_path, "small", against_published=["64x64 pixels, not 256x256"]),
        result(tmp_path, "space", distances=[other]),
        result(tmp_path, "sharp", distances=[sharp]),
        result(tmp_path, "features", distances=[]),
    ]
    found = run(compare, "--results", *paths)
    assert [r["tokenizer"] for r in found["ours_comparable"]] == ["lavit-tok (same)"]
    reasons = [record["reasons"][0] for record in found["ours_listed"]]
    expected = ["64x64 pixels, not 256x256", "no rFID", "antialias is not False"]
    assert reasons == [*expected, "no images were decoded"]
    table, _, listed = (tmp_path / "out" / "compare.md").read_text().partition("## Ours")
    assert "**lavit-tok (same)**" in table and "(small)" not in table and "(small)" in listed
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: expected a result of reconstruction\.py"):
        compare.read_results([tmp_path / "other.json"])
    for figure in found["figures"]:
        assert figure["paper"] and figure["tokens"] and figure["codes"] > 0 and figure["rfid"] > 0


# Speed


def test_encoding_and_decoding(run: Any, tokenizer: Path, decoder: Path) -> None:
    args = ["--tokenizer", tokenizer, "--decoder", decoder, "--batch-sizes", 2, "--repeats", 2]
    args += ["--decode-batch-size", 2, "--denoising", 2, "--guidance", 1, 3]
    args += ["--beside", "helpers.small_tokenizers:vqmodel"]
    bare, own, other = run(speed, *args, name="speed_encode")["records"]
    assert own["codes_per_image"] == pytest.approx(16 / 3, abs=0.3)  # a third, across the batch
    assert own["bits_per_image"] == pytest.approx(own["codes_per_image"] * math.log2(16))
    assert bare["gflops_per_image"] < own["gflops_per_image"]
    assert own["flop_ratio"] == own["gflops_per_image"] / bare["gflops_per_image"]
    assert bare["million_weights"] < own["million_weights"]
    assert (other["codes_per_image"], other["weights"]) == (64, "random weights")
    found = run(speed, *args, "--cases", "decode", out="decode", name="speed_decode")["records"]
    assert [r["name"].partition(",")[0] for r in found] == [
        *["bare U-Net", "lavit-tok"] * 2,
        "vqmodel",
    ]
    guided, unguided = found[2]["gflops_per_image"], found[0]["gflops_per_image"]
    assert guided == pytest.approx(2 * unguided)  # a doubled batch
    assert all(r["flop_ratio"] > 1 for r in found[1:4:2])


def test_the_bare_loop_calls_the_unet_as_the_pipeline_does(tiny_decoder: Any) -> None:
    calls: list[tuple[float, Any]] = []
    codes = speed.random_codes(2, 8, 16)
    handle = tiny_decoder.unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (float(kwargs["timestep"]), kwargs["sample"].shape)
        ),
        with_kwargs=True,
    )
    speed.bare_unet(tiny_decoder, codes, 3, guided=True)()
    bare, _ = list(calls), calls.clear()
    tiny_decoder.set_progress_bar_config(disable=True)
    tiny_decoder(codes, num_inference_steps=3, guidance_scale=2.0)
    handle.remove()
    assert len(bare) == 3 and calls == bare


def test_training_beside_the_bare_modules(run: Any, tokenizer: Path) -> None:
    args = ["--cases", "train", "--tokenizer", tokenizer, "--train-batch-size", 4]
    found = run(speed, *args, "--steps", 2, "--warm", 1, name="speed_train")["records"]
    assert [r["name"] for r in found] == [
        "shipped, sampled: lavit-tok",
        "shipped, quantized: lavit-tok",
    ]
    for record in found:
        assert record["codes_per_image"] == pytest.approx(16 / 3, abs=2)
        assert record["gflops_per_image"] > 0 and record["repeats"] == 2


@pytest.mark.parametrize("stretch", speed.STRETCHES)
def test_the_bare_step_trains_all_but_encoder_and_selector(
    stretch: str, tiny_tokenizer: VisualTokenizer
) -> None:
    args = speed.arguments().parse_args([])
    bare, batch = (
        speed.BareTraining(tiny_tokenizer, stretch, args),
        speed.random_batches(32, 4, 1)[0],
    )
    before = {n: p.clone() for n, p in bare.tokenizer.named_parameters()}
    losses = [bare.step(batch) for _ in range(8)]
    after = bare.tokenizer.named_parameters()
    moved = {n.split(".")[0] for n, p in after if not torch.equal(p, before[n])}
    assert moved == {"merger", "quantizer", "reconstructor"} and losses[-1] < losses[0]


def test_generation(run: Any, refused: Any, model: Path, tmp_path: Path) -> None:
    args = ["--cases", "generate", "--model", model, "--repeats", 2]
    found = run(speed, *args, "--batch-sizes", 3, "--codes", 5, name="speed_generate")["records"]
    forms = ["", ", transformers"]
    names = [f"{a}{b}" for a in ("unguided", "guided") for b in forms]
    assert [r["name"] for r in found] == names
    baselines = [None, "unguided", "unguided", "guided"]
    assert [r.get("baseline") for r in found] == baselines
    for record in found:
        assert record["codes_per_second"] == pytest.approx(5 * record["images_per_second"])
    assert "expected 1..16" in refused(speed, *args, "--codes", 17, "--out", tmp_path)


# Language models


def test_captions_are_chosen_by_seed() -> None:
    captions = ["a", "b", "a", "", "c", "b", "a"]
    for seed in range(5):
        chosen = lm_quality.choose(captions, 3, seed)
        assert sorted(captions[i] for i in chosen) == ["a", "b", "c"]
        assert chosen == lm_quality.choose(captions, 3, seed)
    assert [captions[i] for i in lm_quality.choose(captions, 1, 0, frozenset("ab"))] == ["c"]
    with pytest.raises(ValueError, match="at most the 3 different captions"):
        lm_quality.choose(captions, 4, 0)


def test_lm_quality(
    run: Any, data: Path, model: Path, decoder: Path, scorer: Path, tmp_path: Path
) -> None:
    args = ["--data", data, "--model", model, "--decoder", decoder, "--steps", 2, "--seeds", 2]
    args += ["--captions", 4, "--scorer", scorer]
    found = run(lm_quality, *args, "--batch-size", 3)
    images, bits = found["images"], found["bits"]
    again = run(lm_quality, *args, "--batch-size", 3, out="again")
    assert again == found, "the same command gives the same numbers"
    assert images["generated"]["own caption among 4, top5"]["mean"] == 1  # of four
    assert "4 captions, not 30000, and all different" in images["departures"]
    (distance,) = [name for name in images["generated"] if "Frechet" in name]
    assert "not FID" in distance and images["from_own_codes"][distance]["seeds"] == 2
    assert Image.open(tmp_path / "out" / "lm_quality.png").width > 8 * 64
    check_bits(bits, data, MultimodalLM.from_pretrained(model, decoder=None))
    assert sum(group["codes"] for group in bits["by_source"].values()) == bits["codes"]
    only_bits = run(lm_quality, *args[:4], "--parts", "bits", out="bits")
    assert only_bits["bits"] == bits
    unseen = run(lm_quality, *args[:-4], "--captions", 2, "--unseen", out="unseen")
    assert found["seen_in_training"] > 0 == unseen["seen_in_training"]


@torch.no_grad()
def check_bits(found: dict[str, Any], data: Path, lm: MultimodalLM) -> None:
    """Against one plain forward of the LM for each image, and numpy's entropy."""
    images = datasets.load_images(str(data), 32, crop=False)
    codes, v, ids_of = (
        lm.visual_tokenizer.encode(images.pixels).to_list(),
        lm.processor.vocabulary,
        lm.processor,
    )
    count, ratios = sum(map(len, codes)), np.bincount(np.concatenate(codes))
    unigram = -sum(p * math.log2(p) for p in ratios / count if p)
    assert (found["images"], found["codes"]) == (8, count)
    assert found["unigram_entropy"] == pytest.approx(unigram, rel=1e-5)
    for name, prompts in (("given the caption", images.captions), ("without it", [""] * 8)):
        total = ends = 0.0
        for own, prompt in zip(codes, prompts, strict=True):
            before = [*ids_of.start, *ids_of.text(prompt), v.begin]
            ids = [*before, *(v.first + code for code in own), v.end]
            log_p = lm.model.causal(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            nats = [-float(log_p[i - 1, ids[i]]) for i in range(len(before), len(ids))]
            total, ends = total + sum(nats[:-1]), ends + nats[-1]
        per_code, with_end = (x / count / math.log(2) for x in (total, total + ends))
        assert found[name]["bits_per_code"] == pytest.approx(per_code, rel=1e-5)
        assert found[name]["below_unigram"] == pytest.approx(1 - per_code / unigram, abs=1e-5)
        assert found[name]["bits_per_code_with_end"] == pytest.approx(with_end, rel=1e-5)


def test_captioning(run: Any, data: Path, model: Path, scorer: Path, tmp_path: Path) -> None:
    args = ["--data", data, "--model", model, "--max-tokens", 6, "--tokenization", "words"]
    args += ["--scorers", "BLEU", "CIDEr", "--batch-size", 3]
    found = run(captioning, *args, "--scorer", scorer, "--among", 4)
    results = json.loads((tmp_path / "out" / "captioning.results.json").read_text())
    lm = MultimodalLM.from_pretrained(model, decoder=None)
    images = datasets.load_images(str(data), 32, crop=False)
    texts = lm.caption(list(images.pixels), 6)
    assert [r["caption"] for r in results] == [datasets.first_line(text) for text in texts]
    assert [r["image_id"] for r in results] == images.keys
    assert (found["scored"], found["decoding"]) == (8, "greedy, 1 to 6 tokens")
    assert 0 < found["seen_in_training"] < 8 and "not the official PTB" in found["tokenization"]
    assert found["identified"]["chance"]["top1"] == 1 / 4
    beams = run(captioning, *args, "--beams", 2, out="beams")
    assert beams["decoding"] == "2 beams, 1 to 6 tokens"

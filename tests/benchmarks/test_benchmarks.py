"""The benchmarks: each runs end to end on a dozen pictures, and its formulas give what can be worked out by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_tok import VisualCodes, VisualTokenizer

pytest.importorskip("scipy")
pytest.importorskip("torchmetrics")
PICTURES = 12


@pytest.fixture
def folder(tmp_path: Path, photos: list[Path]) -> Path:
    """Twelve different crops of photographs as train and test splits of an image folder, and one broken file."""
    for split in ("train", "test"):
        target = tmp_path / "set" / split
        target.mkdir(parents=True)
        for i in range(PICTURES):
            image = Image.open(photos[i % len(photos)]).convert("RGB")
            left, top = 20 + 30 * (i // len(photos)), 20 + 10 * (i // len(photos))
            image.crop((left, top, left + 150, top + 120)).save(target / f"{i:02}.png")
    (tmp_path / "set" / "test" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "set"


@pytest.fixture
def saved(tmp_path: Path, tiny_tokenizer: VisualTokenizer) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def run(script: ModuleType, out: Path, *words: object) -> dict[str, Any]:
    """The script's main with a command line's words; gives what its JSON file holds."""
    arguments = script.arguments().parse_args(
        [*map(str, words), "--out", str(out), "--batch-size", "5"]
    )
    script.main(arguments)
    name = next(out.glob("*.json"))
    text = name.with_suffix(".md").read_text()
    for part in ("command: `", "date: ", "commit: ", "hardware: ", "versions: python 3"):
        assert part in text
    return json.loads(name.read_text())


def test_tokens_per_image_runs(
    scripts: Any, folder: Path, saved: Path, tmp_path: Path, tiny_tokenizer: VisualTokenizer
):
    script = scripts("tokens_per_image")
    found = run(script, tmp_path / "out", "--data", folder, "--tokenizer", saved)
    assert found["images"] == PICTURES
    assert "1 bad rows skipped" in found["set"] and found["bad_rows"] == 1
    (reject,) = found["rejects"]
    assert reject["key"] == "broken.png" and "broken.png: not an image" in reject["reason"]
    assert (
        "`broken.png`: broken.png: not an image"
        in (tmp_path / "out" / "tokens_per_image.md").read_text()
    )
    assert sum(found["histogram"]) == PICTURES
    counts = found["codes_per_image"]
    order = [counts[k] for k in ("min", "p5", "p25", "p50", "p75", "p95", "max")]
    assert order == sorted(order) and order[0] >= 1 and order[-1] <= 16
    pictures = scripts("picture_sets").load_pictures(str(folder), 32)
    again = tiny_tokenizer.encode(pictures.pixels)
    assert counts["mean"] == pytest.approx(float(again.lengths.double().mean()))
    assert (tmp_path / "out" / "tokens_per_image.png").stat().st_size > 1000
    lengths = again.lengths.tolist()
    assert [x["codes"] for x in found["fewest"]] == sorted(lengths)[:6]
    assert [x["codes"] for x in found["most"]] == sorted(lengths, reverse=True)[:6]
    assert Image.open(tmp_path / "out" / "tokens_per_image_extremes.png").width > 6 * 64


def test_reconstruction_runs_and_goes_on_where_it_was(
    scripts: Any,
    folder: Path,
    saved: Path,
    tmp_path: Path,
    tiny_decoder: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    script = scripts("reconstruction")
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    words = (
        "--data",
        folder,
        "--tokenizer",
        saved,
        "--decoder",
        tmp_path / "decoder",
        "--steps",
        2,
        "--seeds",
        2,
        "--pictures",
        6,
        "--curve-pictures",
        4,
    )
    found = run(script, tmp_path / "out", *words)
    assert list((tmp_path / "out").glob(".*")) == []  # nothing is left of the parts
    with monkeypatch.context() as patch:
        parts, save, calls = scripts("parts"), scripts("parts").save_file, []

        def stop_at_last(*words: Any) -> None:
            calls.append(words)
            if len(calls) == 30:
                raise KeyboardInterrupt
            save(*words)

        patch.setattr(parts, "save_file", stop_at_last)
        with pytest.raises(KeyboardInterrupt):
            run(script, tmp_path / "again", *words)
    assert list((tmp_path / "again").glob("*.json")) == []
    again = run(script, tmp_path / "again", *words)
    assert "went on from 29 finished parts" in capsys.readouterr().out
    assert without_stamp(again) == without_stamp(
        found
    )  # the same command gives the same numbers, stopped or not
    assert found["features"]["plain"]["mean"] <= 1
    assert "'train'" in found["mean_feature_over"]
    pixels = found["pixels"]
    assert (pixels["pictures"], pixels["sources"], len(pixels["per_seed"])) == (6, PICTURES, 2)
    assert pixels["per_seed"][0]["psnr"] != pixels["per_seed"][1]["psnr"]
    assert pixels["summary"]["psnr"]["mean"] == pytest.approx(
        np.mean([r["psnr"] for r in pixels["per_seed"]])
    )
    assert any("not FID" in name for name in pixels["summary"])
    text = (tmp_path / "out" / "reconstruction.md").read_text()
    assert "AdaTok" in text and "only 6 pictures" in text
    sheet = Image.open(tmp_path / "out" / "reconstruction.png")
    assert sheet.width > 10 * 32
    curve = found["curve"]
    assert curve["pictures"] == 4
    for rows in (curve["features"], curve["pixels"]):
        points = [(r["method"], r["budget"]) for r in rows]
        assert points == [
            ("learned", None),
            *((m, b) for m in ("learned", "random", "top norm") for b in (2, 4, 5, 8)),
        ]
    assert [r["codes_per_image"] for r in curve["features"] if r["budget"]] == [2, 4, 5, 8] * 3
    assert {r["psnr"]["seeds"] for r in curve["pixels"]} == {2}
    assert (tmp_path / "out" / "reconstruction_curve.png").stat().st_size > 1000


def without_stamp(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "stamp"}


def test_rfid_over_few_pictures_is_refused(
    scripts: Any, folder: Path, saved: Path, tmp_path: Path, tiny_decoder: Any, capsys: Any
):
    script, common = scripts("reconstruction"), scripts("common")
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    words = [
        "--data",
        folder,
        "--tokenizer",
        saved,
        "--decoder",
        tmp_path / "decoder",
        "--inception",
        "weights.pth",
    ]
    arguments = script.arguments().parse_args([*map(str, words), "--out", str(tmp_path)])
    assert common.run(script.main, arguments) == 2
    assert "rFID over 12 pictures means nothing" in capsys.readouterr().err


def test_selection_runs(scripts: Any, folder: Path, saved: Path, tmp_path: Path):
    script = scripts("selection")
    found = run(
        script, tmp_path / "out", "--data", folder, "--tokenizer", saved, "--budgets", 2, 5, 16
    )
    rows = {(r["method"], r["budget"]): r for r in found["rows"]}
    for budget in (2, 5, 16):
        for method in (script.LEARNED, script.RANDOM, script.EVEN, script.NORM):
            assert rows[method, budget]["codes_per_image"] == budget
    assert rows[script.RANDOM, 5]["plain"]["seeds"] == 3
    assert rows[script.RANDOM, 5]["plain"]["std"] > 0
    for name in ("plain", "centred"):  # with every patch kept there is nothing to choose
        methods = (script.LEARNED, script.RANDOM, script.EVEN, script.NORM)
        everything = [rows[method, 16][name]["mean"] for method in methods]
        assert everything == pytest.approx([everything[0]] * 4, abs=1e-6)
    assert (tmp_path / "out" / "selection.png").stat().st_size > 1000


def test_encode_speed_runs(scripts: Any, saved: Path, tmp_path: Path):
    script = scripts("encode_speed")
    words = (
        "--tokenizer",
        saved,
        "--cases",
        "shipped",
        "--batch-sizes",
        2,
        "--repeats",
        3,
        "--seconds",
        0,
        "--memory",
    )
    (found,) = run(script, tmp_path / "out", *words)["runs"]
    assert found["kept_share"] == pytest.approx(1 / 3, abs=0.05)
    flops = found["gflops_per_image"]
    assert flops["bare"] < flops["encode"] < flops["encode_all_rows"]
    assert found["overhead"] == pytest.approx(found["ratio"] / found["floor"])
    memory = found["peak_memory"]
    assert 0 < memory["imports_gib"] <= memory["loaded_gib"] <= memory["encoded_gib"]


def test_evenly_spaced_and_cropped(scripts: Any, folder: Path):
    picture_sets = scripts("picture_sets")
    some = picture_sets.load_pictures(str(folder), 32, "train", limit=4)
    everything = picture_sets.load_pictures(str(folder), 32, "train")
    assert torch.equal(some.pixels, everything.pixels[[0, 3, 6, 9]])
    source = Image.open(
        folder / "train" / "00.png"
    )  # 150 x 120: shorter side to 32, then the centre
    square = source.resize((40, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32))
    expected = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    assert int((everything.pixels[0].int() - expected.int()).abs().max()) <= 1
    with pytest.raises(ValueError, match="expected a split"):
        picture_sets.load_pictures(str(folder), 32, "nowhere")


def test_token_statistics_by_hand(scripts: Any):
    script = scripts("tokens_per_image")
    codes = VisualCodes.from_list([[0], [1, 1], [2, 2, 2]], codebook_size=8)
    found = script.statistics(codes, patches=6, codebook_size=8, rho=0.25, jpeg=[100, 300, 900])
    assert found["spearman_with_jpeg_size"] == pytest.approx(1)  # monotone, though not linear
    assert found["keep_ratio"]["measured"] == pytest.approx(2 / 6)
    assert found["keep_ratio"]["difference"] == pytest.approx(2 / 6 - 0.25)
    assert found["bits_per_image"]["mean"] == pytest.approx(2 * 3)
    assert found["histogram"] == [0, 1, 1, 1, 0, 0, 0]
    assert found["codebook"]["used_percent"] == pytest.approx(100 * 3 / 8)
    entropy = -sum(p * math.log2(p) for p in (1 / 6, 2 / 6, 3 / 6))
    assert found["codebook"]["unigram_entropy_bits"] == pytest.approx(entropy)
    assert found["codebook"]["perplexity"] == pytest.approx(2**entropy)
    assert script.rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert script.rank_correlation([2, 2, 2], [9, 4, 1]) is None


def test_jpeg_size_is_that_of_the_file(scripts: Any, tmp_path: Path):
    pixels = torch.randint(
        0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg", quality=90)
    assert scripts("tokens_per_image").jpeg_size(pixels, 90) == (tmp_path / "a.jpg").stat().st_size


def test_cosines_and_their_floors_by_hand(scripts: Any):
    script = scripts("metrics")
    mean = torch.tensor([1.0, 0.0])
    features = torch.tensor(
        [[[1.0, 1.0], [1.0, -1.0]], [[2.0, 1.0], [2.0, 1.0]]]
    )  # image 1 is the same everywhere
    found = script.cosines(features, features.clone(), mean)
    assert found["plain"].tolist() == pytest.approx([1, 1])
    assert found["centred"].tolist() == pytest.approx([1, 1])
    half = 2**-0.5
    assert found["plain_floor_set_mean"].tolist() == pytest.approx([half, 2 / 5**0.5])
    assert found["plain_floor_image_mean"].tolist() == pytest.approx([half, 1])
    assert found["centred_floor_image_mean"].tolist() == pytest.approx(
        [0, 1]
    )  # image 0's own mean is the set's mean
    # The mean feature as the answer: a fair plain cosine, and nothing centred.
    flat = script.cosines(features, mean.expand_as(features), mean)
    assert torch.equal(flat["plain"], found["plain_floor_set_mean"])
    assert flat["centred"].tolist() == [0, 0]


def test_mean_feature_is_over_all_patches_of_all_batches(
    scripts: Any, folder: Path, tiny_tokenizer: VisualTokenizer
):
    pictures = scripts("picture_sets").load_pictures(str(folder), 32)
    found = scripts("metrics").feature_mean(tiny_tokenizer, pictures.batches(5))
    expected = (
        tiny_tokenizer.features(tiny_tokenizer.preprocess(pictures.pixels)).double().mean((0, 1))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_retrieval(scripts: Any):
    script = scripts("metrics")
    pictures = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert script.retrieval(pictures, pictures) == 1
    assert script.retrieval(pictures + 0.01, pictures) == 1
    assert script.retrieval(pictures.roll(1, 0), pictures) == 0
    swapped = pictures[[1, 0, 2, 3, 4, 5, 6]]
    assert script.retrieval(swapped, pictures) == pytest.approx(5 / 7)
    assert script.retrieval(pictures[:4], pictures) == 1  # fewer drawn than there are sources
    assert script.retrieval(pictures[[0, 6]], pictures) == 0.5


def test_pixel_scores_by_hand(scripts: Any):
    script = scripts("metrics")
    black, white = torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)
    assert script.pixel_scores(black + 0.1, black)["psnr"] == pytest.approx(
        20, abs=1e-3
    )  # 10 log10(1 / 0.01)
    assert script.pixel_scores(white, black)["ssim"] == pytest.approx(0, abs=1e-3)
    assert script.pixel_scores(black, black)["ssim"] == pytest.approx(1)


def test_frechet_distance_in_the_encoders_space(
    scripts: Any, folder: Path, tiny_tokenizer: VisualTokenizer
):
    script = scripts("metrics")
    pictures = scripts("picture_sets").load_pictures(str(folder), 32).pixels

    def distance(images: torch.Tensor) -> float:
        return script.frechet(script.EncoderSpace(tiny_tokenizer), pictures, images, batch=5)

    assert distance(pictures) == pytest.approx(0, abs=1e-2)
    assert distance(255 - pictures) > 10 * abs(distance(pictures)) + 1e-3


def test_flops_of_a_product_and_of_attention(scripts: Any):
    script = scripts("encode_speed")
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert script.flops(lambda: a @ b) == 2 * 3 * 5 * 7
    q, k = torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 10, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert script.flops(lambda: attention(q, k, k)) == 2 * (2 * 2 * 4 * 6 * 10 * 8)


def test_interleaved_takes_turns(scripts: Any):
    calls: list[str] = []
    script = scripts("encode_speed")
    first, second = script.interleaved(
        [lambda: calls.append("a"), lambda: calls.append("b")], 3, "cpu", warm=1
    )
    assert calls == ["a", "b"] * 4
    assert len(first) == len(second) == 3


def test_results_hide_where_they_ran(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    common = scripts("common")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", [str(tmp_path / "benchmarks" / "x.py"), "--data", "/somewhere/else/pictures"]
    )
    assert common.stamp()["command"] == "python benchmarks/x.py --data pictures"


def test_spread_is_the_sample_deviation(scripts: Any):
    common = scripts("common")
    assert common.spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "seeds": 2}
    assert common.spread([1.0])["std"] == 0
    assert common.table(("a", "b"), [(1, 0.123456), (None, 12345.6)]).splitlines()[2:] == [
        "| 1   | 0.1235 |",
        "| -   | 12346  |",
    ]

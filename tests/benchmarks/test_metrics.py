"""Numbers to trust: independent computations agree, and labels follow what was done."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_tokenizers import small
from PIL import Image

from lavit_tok import VisualCodes, VisualTokenizer

from benchmarks import captioning, tokens_per_image  # isort: skip
from benchmarks.shared import datasets, metrics, protocol, timing  # isort: skip

needs_coco = pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


def pairs(photos: list[Path], size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Photographs and damaged copies, uint8 [4 3 s s] each."""
    opened = [Image.open(path).convert("RGB").resize((size, size)) for path in photos]
    sources = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in opened])
    noise = torch.randn(sources.shape, generator=torch.Generator().manual_seed(0)) * 12
    return sources, (sources + noise).clamp(0, 255).to(torch.uint8)


# Images


def test_frechet_distance_is_that_of_numpy_and_scipy() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    mix, other = rng.normal(size=(24, 24)) / 5, 0.05 * rng.normal(size=(24, 24))
    first = rng.normal(size=(300, 24)) @ mix + rng.normal(size=24)
    second = rng.normal(size=(400, 24)) @ (mix + other) + rng.normal(size=24)
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    means = np.square(first.mean(0) - second.mean(0)).sum()
    expected = means + np.trace(a + b - 2 * sqrtm(a @ b).real)
    found = metrics.frechet(torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx(expected, rel=1e-3)


def test_psnr_and_ssim_are_those_of_scikit_image(photos: list[Path]) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    sources, decoded = (x.float() / 255 for x in pairs(photos))
    found = metrics.psnr_ssim(decoded, sources)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i in range(len(sources)):
        a, b = (x[i].permute(1, 2, 0).double().numpy() for x in (sources, decoded))
        psnr = peak_signal_noise_ratio(a, b, data_range=1)
        ssim = structural_similarity(a, b, data_range=1, channel_axis=2, **options)
        assert float(found["psnr"][i]) == pytest.approx(psnr, abs=1e-4)
        assert float(found["ssim"][i]) == pytest.approx(ssim, abs=1e-4)


def test_retrieval_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    sources = rng.random((40, 12)).astype(np.float32)
    decoded = (sources[:30] + rng.normal(0, 0.35, (30, 12))).astype(np.float32)
    expected = []
    for i, vector in enumerate(decoded):
        distances = [
            sum((float(x) - float(y)) ** 2 for x, y in zip(vector, s, strict=True)) for s in sources
        ]
        expected.append(distances[i] == min(distances))
    assert 0 < sum(expected) < 30
    for chunk in (7, 256):
        found = metrics.retrieved(torch.from_numpy(decoded), torch.from_numpy(sources), chunk)
        assert found.tolist() == expected


def test_cosines_and_their_floors_by_hand() -> None:
    mean = torch.tensor([1.0, 0.0])
    features = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[2.0, 1.0], [2.0, 1.0]]])
    found, floors = metrics.cosines(features, features, mean), metrics.cosine_floors(features, mean)
    for name in ("plain", "centered"):
        assert found[name].tolist() == pytest.approx([1, 1])
    half = 2**-0.5
    assert floors["plain_floor_set_mean"].tolist() == pytest.approx([half, 2 / 5**0.5])
    assert floors["plain_floor_image_mean"].tolist() == pytest.approx([half, 1])
    assert floors["centered_floor_image_mean"].tolist() == pytest.approx([0, 1])
    # The mean feature as the answer: a fair plain cosine, and nothing centered.
    flat = metrics.cosines(features, mean.expand_as(features), mean)
    assert torch.equal(flat["plain"], floors["plain_floor_set_mean"])
    assert flat["centered"].tolist() == [0, 0]


def test_mean_feature_is_over_all_patches(data: Path, tiny_tokenizer: VisualTokenizer) -> None:
    pixels = datasets.load_images(str(data), 32).pixels
    found = metrics.feature_mean(tiny_tokenizer, pixels.split(3))
    features = tiny_tokenizer.features(tiny_tokenizer.preprocess(pixels))
    torch.testing.assert_close(found, features.double().mean((0, 1)), rtol=1e-5, atol=1e-6)


def test_images_are_evenly_spaced_and_cropped(data: Path) -> None:
    some = datasets.load_images(str(data), 32, "train", limit=4)
    everything = datasets.load_images(str(data), 32, "train")
    assert torch.equal(some.pixels, everything.pixels[[0, 2, 4, 6]])
    source = Image.open(data / "train" / "0.png")  # 150 x 120: shorter side to 32, then the center
    square = source.resize((40, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32))
    expected = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    assert int((everything.pixels[0].int() - expected.int()).abs().max()) <= 1
    with pytest.raises(ValueError, match="expected a split"):
        datasets.load_images(str(data), 32, "nowhere")


# Labels


def test_the_label_follows_what_was_done() -> None:
    made = protocol.Protocol(50_000, 256, True, set_name="imagenet-val")
    assert made.departures() == made.against_published() == []
    name = made.distance_name("", False)
    assert name.startswith("rFID, torchmetrics ")
    assert name.endswith("Inception-v3 2048-d, antialias=False")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"images": 3000, "set_name": None}, "only 3000 images, comparable from 10000"),
        ({"cropped": False}, "no center crop"),
        ({"images": 49_999, "bad_records": 1}, "49999 of the 50000 images of imagenet-val, 1 unr"),
        ({"set_name": "coco-val2017"}, "50000 of the 5000 images of coco-val2017"),
        ({"random_weights": True}, "random weights"),
    ]
    names = {name, made.distance_name("", True)}
    for change, text in changes:
        other = replace(made, **change)
        assert text in other.distance_name("", False)
        assert text in other.distance_name("a space", None)
        assert other.against_published() != []
        names.add(other.distance_name("", False))
    assert len(names) == len(changes) + 2
    for change in ({"size": 64}, {"set_name": None}):
        assert replace(made, **change).departures() == []
        assert replace(made, **change).against_published() != []
    space = made.distance_name("the shipped encoder's space", None)
    assert "rFID" not in space and "(not FID)" in space
    with pytest.raises(ValueError, match="over 2047 images means nothing"):
        protocol.refuse_few(2047, force=False)
    protocol.refuse_few(2047, force=True)


# Tokens and text


def test_token_statistics_by_hand() -> None:
    codes = VisualCodes.from_list([[0], [1, 1], [2, 2, 2]], codebook_size=8)
    found = tokens_per_image.statistics(codes, 6, 8, rho=0.25, jpeg=[100, 300, 900])
    assert found["spearman_with_jpeg_size"] == pytest.approx(1)  # monotone, though not linear
    assert found["keep_ratio"]["measured"] == pytest.approx(2 / 6)
    assert found["keep_ratio"]["difference"] == pytest.approx(2 / 6 - 0.25)
    assert found["bits_per_image"]["mean"] == pytest.approx(2 * 3)
    assert found["histogram"] == [0, 1, 1, 1, 0, 0, 0]
    assert found["codebook"]["used_percent"] == pytest.approx(100 * 3 / 8)
    entropy = -sum(p * math.log2(p) for p in (1 / 6, 2 / 6, 3 / 6))
    assert found["codebook"]["unigram_entropy_bits"] == pytest.approx(entropy)
    assert tokens_per_image.rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert tokens_per_image.rank_correlation([2, 2, 2], [9, 4, 1]) is None


def test_jpeg_size_is_that_of_the_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg", quality=90)
    assert tokens_per_image.jpeg_size(pixels, 90) == (tmp_path / "a.jpg").stat().st_size


TRUE = [
    ["a red apple on a table", "an apple lies on the wooden table"],
    ["two dogs run on the beach", "dogs running along the beach at sunset", "two dogs"],
    ["the town hall in the rain", "a photo of the old town hall in the rain"],
]
GENERATED = ["a red apple on the table", "dogs run along a beach", "the old old hall"]


def ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(true: list[list[str]], generated: list[str], order: int) -> float:
    """Papineni et al. (2002), over the corpus, the nearest reference length."""
    logs = []
    for n in range(1, order + 1):
        hits = total = 0
        for texts, text in zip(true, generated, strict=True):
            highest: Counter[tuple[str, ...]] = Counter()
            for one in texts:
                highest |= ngrams(one, n)
            hits += sum((ngrams(text, n) & highest).values())
            total += sum(ngrams(text, n).values())
        logs.append(math.log(hits / total) if hits else -math.inf)
    length, near = sum(len(text.split()) for text in generated), 0
    for texts, text in zip(true, generated, strict=True):
        words = len(text.split())
        near += min((abs(len(t.split()) - words), len(t.split())) for t in texts)[1]
    return math.exp(sum(logs) / order) * min(1.0, math.exp(1 - near / length))


def cider_d(true: list[list[str]], generated: list[str]) -> list[float]:
    """Vedantam et al. (2015), its second form, in dense vectors."""
    scores = np.zeros(len(generated))
    for n in range(1, 5):
        words = sorted({g for t in [*true, generated] for text in t for g in ngrams(text, n)})
        counts = [sum(any(w in ngrams(t, n) for t in texts) for texts in true) for w in words]
        weights = math.log(len(true)) - np.log(np.maximum(counts, 1))
        for i, (texts, text) in enumerate(zip(true, generated, strict=True)):
            a = np.array([ngrams(text, n)[w] for w in words]) * weights
            for one in texts:
                b = np.array([ngrams(one, n)[w] for w in words]) * weights
                norm, gap = (
                    np.linalg.norm(a) * np.linalg.norm(b),
                    len(text.split()) - len(one.split()),
                )
                near = float(np.minimum(a, b) @ b) / norm if norm else 0.0
                scores[i] += near * math.exp(-(gap**2) / 72) / len(texts) / 4
    return (10 * scores).tolist()


@needs_coco
def test_caption_scores_against_a_second_computation() -> None:
    found = captioning.score(TRUE, GENERATED, ("BLEU", "CIDEr"), "words")
    for n in (1, 2, 3):
        expected = 100 * bleu(TRUE, GENERATED, n)
        assert found["scores"][f"BLEU-{n}"] == pytest.approx(expected, rel=1e-5)
    each = [100 * value for value in cider_d(TRUE, GENERATED)]
    assert found["cider_of_each"] == pytest.approx(each, rel=1e-6)
    assert found["scores"]["CIDEr"] == pytest.approx(sum(each) / 3, rel=1e-6)
    assert "not the official PTB" in found["tokenization"]
    best = [texts[0] for texts in TRUE]
    perfect = captioning.score(TRUE, best, ("BLEU", "ROUGE-L"), "words")["scores"]
    assert perfect["BLEU-4"] == pytest.approx(100, rel=1e-5)
    assert perfect["ROUGE-L"] == pytest.approx(100)
    with pytest.raises(ValueError, match="true captions for every image"):
        captioning.score([*TRUE[:2], []], GENERATED)


def test_bleu_without_pycocoevalcap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "find_spec", lambda name: None)
    found = captioning.score(TRUE, GENERATED)
    assert found["scores"]["BLEU-2"] == pytest.approx(100 * bleu(TRUE, GENERATED, 2), rel=1e-5)
    assert set(found["absent"]) == {"ROUGE-L", "CIDEr", "METEOR"}
    assert "pip install" in found["absent"]["CIDEr"] and found["by"].startswith("torchmetrics")
    with pytest.raises(ValueError, match="--tokenization ptb: needs pycocoevalcap"):
        captioning.score(TRUE, GENERATED, tokenization="ptb")


@needs_coco
@needs_java
def test_the_official_tokenization() -> None:
    texts = ["A red apple, on the table!", "Dogs run\u2028along a beach.", "the old (old) hall"]
    found = captioning.score(TRUE, texts, ("CIDEr",))
    assert "the official PTB" in found["tokenization"]
    assert found["cider_of_each"][1] == pytest.approx(100 * cider_d(TRUE, GENERATED)[1], rel=1e-6)


# Arithmetic


def test_flops_of_a_product_and_of_attention() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert timing.flops(lambda: a @ b) == 2 * 3 * 5 * 7
    q, k = torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 10, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert timing.flops(lambda: attention(q, k, k)) == 2 * (2 * 2 * 4 * 6 * 10 * 8)


def test_calls_take_turns_beside_their_baseline() -> None:
    calls: list[str] = []
    both = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = timing.in_turns(both, 3, warm=1)
    assert calls == ["a", "b"] * 4
    assert len(times["a"].raw_times) == len(times["b"].raw_times) == 3
    a, b = torch.zeros(64, 64), torch.zeros(64, 128)
    entries = [
        timing.Entry("small", lambda: a @ a, 2, lambda: a @ a),
        timing.Entry("large", lambda: a @ b, 2, lambda: a @ b, baseline="small"),
    ]
    small_one, large = timing.compare(entries, 2)
    assert "time_ratio" not in small_one
    assert (large["flop_ratio"], large["baseline"]) == (2, "small")
    assert large["gflops_per_image"] == pytest.approx(2 * 64 * 64 * 128 / 1e9)
    assert large["images_per_second"] == pytest.approx(2 / large["seconds"])
    assert large["overhead"] == pytest.approx(large["time_ratio"] / 2)
    assert "| large" in timing.table([small_one, large])


# Other tokenizers


def test_vqmodel_decodes_what_its_own_forward_decodes(tmp_path: Path) -> None:
    from benchmarks.shared import tokenizers

    found = small()
    assert isinstance(found, tokenizers.ImageTokenizer)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    codes = found.encode(images)
    assert codes.lengths.tolist() == [64] * 3 and found.weights == tokenizers.RANDOM
    assert torch.equal(codes[1], found.encode(images[1:2])[0])  # whatever the batch
    with torch.no_grad():
        expected = (
            (found.model(images.float() / 127.5 - 1).sample.clamp(-1, 1) + 1) * 127.5
        ).round()
    assert int((found.decode(codes).float() - expected).abs().max()) <= 1
    parameters = sum(p.numel() for p in found.model.parameters())
    shared = found.model.quantize.embedding.weight.numel()
    assert found.parameters["encode"] + found.parameters["decode"] - shared == parameters
    found.model.save_pretrained(tmp_path / "weights")
    again = tokenizers.load(f"vqmodel:{tmp_path / 'weights'}", image_size=32)
    assert again.weights == "weights" and torch.equal(again.encode(images).values, codes.values)


def test_tokenizers_by_name(tokenizer: Path) -> None:
    from benchmarks.shared import tokenizers

    own = tokenizers.load(str(tokenizer))
    assert isinstance(own, tokenizers.Lavit)
    assert (own.image_size, own.codebook_size, own.max_codes, own.decodes) == (32, 16, 16, False)
    assert tokenizers.load("helpers.small_tokenizers:vqmodel").name == "vqmodel"
    for name, message in (
        ("helpers.small_tokenizers:no_tokenizer", "expected encode, decode, name, weights"),
        ("helpers.small_tokenizers:nothing", "PYTHONPATH"),
        ("no_such_module:anything", "PYTHONPATH"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizers.load(name)
    with pytest.raises(ValueError, match="decodes by itself"):
        tokenizers.load("helpers.small_tokenizers:vqmodel", decoder="default")
    with pytest.raises(ValueError, match="that 16 divides"):
        tokenizers.load("vqmodel", image_size=40)

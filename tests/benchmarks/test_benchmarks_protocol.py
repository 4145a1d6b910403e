"""Numbers to trust: independent computations agree, labels follow what was done, killed runs go on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("scipy")
pytest.importorskip("torchmetrics")
pytestmark = pytest.mark.usefixtures("scripts")
SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def pairs(photos: list[Path], size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Photographs and damaged copies, uint8 [4 3 s s] each."""
    opened = [Image.open(path).convert("RGB").resize((size, size)) for path in photos]
    sources = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in opened])
    noise = torch.randn(sources.shape, generator=torch.Generator().manual_seed(0)) * 12
    return sources, (sources + noise).clamp(0, 255).to(torch.uint8)


# Against independent computations


def test_frechet_distance_is_that_of_numpy_and_scipy(scripts: Any) -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24)) / 5
    first = rng.normal(size=(300, 24)) @ mix + rng.normal(size=24)
    second = rng.normal(size=(400, 24)) @ (mix + 0.05 * rng.normal(size=(24, 24))) + rng.normal(
        size=24
    )
    means = first.mean(0), second.mean(0)
    spreads = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    cross = sqrtm(spreads[0] @ spreads[1]).real
    expected = np.square(means[0] - means[1]).sum() + np.trace(spreads[0] + spreads[1] - 2 * cross)
    found = scripts("metrics").frechet_of_features(
        torch.from_numpy(first), torch.from_numpy(second)
    )
    assert found == pytest.approx(expected, rel=1e-3)


def test_psnr_and_ssim_are_those_of_scikit_image(scripts: Any, photos: list[Path]) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    sources, drawn = (x.float() / 255 for x in pairs(photos))
    found = scripts("metrics").psnr_ssim(drawn, sources)
    for i in range(len(sources)):
        a, b = (x[i].permute(1, 2, 0).double().numpy() for x in (sources, drawn))
        assert float(found["psnr"][i]) == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=1), abs=1e-4
        )
        expected = structural_similarity(
            a,
            b,
            data_range=1,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(found["ssim"][i]) == pytest.approx(expected, abs=1e-4)


def test_retrieval_is_that_of_brute_force(scripts: Any) -> None:
    metrics, rng = scripts("metrics"), np.random.default_rng(0)
    sources = rng.random((40, 12)).astype(np.float32)
    drawn = (sources[:30] + rng.normal(0, 0.35, (30, 12))).astype(np.float32)
    expected = []
    for i in range(30):
        distances = [
            sum((float(a) - float(b)) ** 2 for a, b in zip(drawn[i], s, strict=True))
            for s in sources
        ]
        expected.append(distances[i] == min(distances))
    assert 0 < sum(expected) < 30
    for chunk in (7, 256):
        found = metrics.found_own(torch.from_numpy(drawn), torch.from_numpy(sources), chunk)
        assert found.tolist() == expected


def test_feature_spaces_of_transformers(scripts: Any, photos: list[Path], tmp_path: Path) -> None:
    """Resized, normalised and pooled as the library's own processor and model do it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=48, patch_size=16)).eval()
    model.save_pretrained(tmp_path / "clip")
    metrics = scripts("metrics")
    sources, _ = pairs(photos)
    space = metrics.VisionSpace("clip", str(tmp_path / "clip"))
    pixels = (sources / 255 - torch.tensor(metrics.CLIP_MEAN).view(3, 1, 1)) / torch.tensor(
        metrics.CLIP_STD
    ).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(space(sources), model(pixel_values=pixels).pooler_output)
    with pytest.raises(ValueError, match="expected encoder, or one of"):
        metrics.VisionSpace("anything", "x")


# Labels


def test_the_label_follows_what_was_done(scripts: Any) -> None:
    protocol = scripts("protocol")
    done = protocol.Done(50_000, 256, True, set_name="imagenet-val")
    assert done.departures() == done.against_published() == []
    name = protocol.rfid_name(False, done)
    assert name.startswith("rFID, torchmetrics ") and name.endswith(
        "Inception-v3 2048-d, antialias=False"
    )
    changes: list[tuple[dict[str, Any], str]] = [
        ({"pictures": 3000, "set_name": None}, "only 3000 pictures, comparable from 10000 on"),
        ({"cropped": False}, "no centre crop"),
        (
            {"pictures": 49_999, "bad_rows": 1},
            "49999 of the 50000 pictures of imagenet-val, 1 unreadable",
        ),
        ({"set_name": "coco-val2017"}, "50000 of the 5000 pictures of coco-val2017"),
        ({"random_weights": True}, "random weights"),
    ]
    names = {name}
    for change, words in changes:
        other = replace(done, **change)
        assert words in protocol.rfid_name(False, other) and words in protocol.frechet_name(
            "a space", other
        )
        assert other.against_published() != []
        names.add(protocol.rfid_name(False, other))
    assert len(names) == len(changes) + 1
    assert protocol.rfid_name(True, done) != name  # another resize
    for change in ({"size": 64}, {"set_name": None}):
        assert replace(done, **change).departures() == []
        assert replace(done, **change).against_published() != []
    assert "rFID" not in protocol.frechet_name("the shipped encoder's space", done)
    assert "(not FID)" in protocol.frechet_name("the shipped encoder's space", done)


def test_few_pictures_are_refused_unless_forced(scripts: Any) -> None:
    protocol = scripts("protocol")
    with pytest.raises(ValueError, match="over 2047 pictures means nothing"):
        protocol.refuse_few(2047, force=False)
    protocol.refuse_few(2047, force=True)
    protocol.refuse_few(2048, force=False)


def test_squeezed_pictures_are_said_to_be_squeezed(
    scripts: Any, photos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "set" / "test").mkdir(parents=True)
    for path in photos:
        Image.open(path).convert("RGB").resize((90, 60)).save(tmp_path / "set" / "test" / path.name)
    script = scripts("reconstruction")
    words = [
        "--data",
        tmp_path / "set",
        "--tokenizer",
        "helpers.small_tokenizers:vqmodel",
        "--seeds",
        1,
        "--batch-size",
        4,
    ]
    names = []
    for extra in ([], ["--squeeze"], ["--squeeze", "--limit", 3]):
        out = tmp_path / f"out{len(names)}"
        script.main(
            script.arguments().parse_args([*map(str, words), *map(str, extra), "--out", str(out)])
        )
        found = json.loads((out / "reconstruction.json").read_text())
        names.append(found["pixels"]["distances"][0]["name"])
        assert ("resized to 32x32" if extra else "crop 32x32") in found["set"]
    assert "squeezed" not in names[0] and "squeezed" in names[1]
    assert "only 4 pictures" in names[1] and "only 3 pictures" in names[2]


class Squares(torch.nn.Module):
    """In place of Inception-v3, whose weights are not here: bilinear 4x4 RGB, resized with or without antialiasing."""

    def __init__(self, weights: Any, antialias: bool) -> None:
        super().__init__()
        self.options = {"size": (4, 4), "mode": "bilinear", "antialias": antialias}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(images.float() / 255, **self.options).flatten(1)


def test_rfid_is_given_for_both_resizings(
    scripts: Any, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set" / "test").mkdir(parents=True)
    for path in photos:
        Image.open(path).convert("RGB").save(tmp_path / "set" / "test" / path.name)
    script, metrics, compare = scripts("reconstruction"), scripts("metrics"), scripts("compare")
    monkeypatch.setattr(metrics, "inception", Squares)
    words = [
        "--data",
        tmp_path / "set",
        "--tokenizer",
        "helpers.small_tokenizers:vqmodel",
        "--inception",
        "weights.pth",
    ]
    words += ["--seeds", 2, "--out", tmp_path, "--set-name", "coco-val2017", "--force"]
    script.main(script.arguments().parse_args(list(map(str, words))))
    found = json.loads((tmp_path / "reconstruction.json").read_text())["pixels"]["distances"]
    assert [(d["kind"], d["antialias"]) for d in found] == [
        ("Frechet", None),
        ("rFID", True),
        ("rFID", False),
    ]
    assert all(
        "only 4 pictures" in d["name"] and "4 of the 5000 pictures of coco-val2017" in d["name"]
        for d in found
    )
    assert "antialias=False" in found[2]["name"] and found[1]["value"] != found[2]["value"]
    pictures = scripts("picture_sets").load_pictures(str(tmp_path / "set"), 32).pixels
    codec = __import__("helpers.small_tokenizers").small_tokenizers.small("vqmodel")
    for distance in found[1:]:
        features = [
            Squares(None, distance["antialias"])(x)
            for x in (pictures, codec.decode(codec.encode(pictures)))
        ]
        expected = metrics.frechet_of_features(*features)
        assert distance["value"]["mean"] == pytest.approx(expected, rel=1e-3)
    beside, listed = compare.split(compare.read_results([tmp_path / "reconstruction.json"]))
    assert (len(beside), len(listed)) == (0, 3)  # four pictures of another set stand beside nothing


# Runs that were killed


def test_parts_are_computed_once_and_never_mixed(scripts: Any, tmp_path: Path) -> None:
    module, calls = scripts("parts"), []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.arange(4)}

    first = module.Parts(tmp_path, "name", {"tokenizer": "a"})
    assert first.tensors("one", compute)["x"].tolist() == [0, 1, 2, 3]
    assert first.values("two", lambda: {"rows": [1.5, None]}) == {"rows": [1.5, None]}
    again = module.Parts(tmp_path, "name", {"tokenizer": "a"})
    assert again.tensors("one", compute)["x"].tolist() == [0, 1, 2, 3]
    assert (len(calls), again.reused) == (1, 1)
    other = module.Parts(tmp_path, "name", {"tokenizer": "b"})  # other settings share nothing
    other.tensors("one", compute)
    assert len(calls) == 2
    (other.folder / "three.unfinished").write_bytes(
        b"half"
    )  # what a kill in the middle of writing leaves
    assert other.values("three", lambda: 3) == 3
    other.done()
    assert not other.folder.exists() and first.folder.exists()


def test_a_killed_run_goes_on_to_the_same_result(
    tiny_tokenizer: Any, photos: list[Path], tmp_path: Path
) -> None:
    """kill -9 in the middle, the same command again: every number is that of a run that nobody stopped."""
    for split in ("train", "test"):
        target = tmp_path / "set" / split
        target.mkdir(parents=True)
        for i in range(24):
            image = Image.open(photos[i % 4]).convert("RGB")
            image.crop((4 * i, 3 * i, 4 * i + 150, 3 * i + 120)).save(target / f"{i:02}.png")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = SCRIPTS / "reconstruction.py"
    words = ["--data", "set", "--tokenizer", "tokenizer", "--batch-size", "1", "--threads", "1"]
    words += ["--curve-pictures", "24", "--budgets", "2", "5", "8"]
    command = [sys.executable, str(script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--out", out],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    whole = start("whole")
    assert "finished parts" not in whole.communicate()[0]
    assert whole.returncode == 0
    killed, out = start("killed"), tmp_path / "killed"
    deadline = time.monotonic() + 300
    while (
        len(list(out.glob(".reconstruction-*/codes-*.safetensors"))) < 30
        and time.monotonic() < deadline
    ):
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "reconstruction.json").exists()
    finished = len(list(out.glob(".reconstruction-*/*.safetensors")))
    assert finished >= 30
    resumed = start("killed")
    assert f"went on from {finished} finished parts" in resumed.communicate()[0]
    assert resumed.returncode == 0
    first, second = (
        json.loads((tmp_path / x / "reconstruction.json").read_text()) for x in ("whole", "killed")
    )
    first.pop("stamp"), second.pop("stamp")
    assert second == first
    assert list(out.glob(".*")) == []


# Beside published figures


def result(folder: Path, name: str, **pixels: Any) -> Path:
    """A result of reconstruction.py, as far as compare.py reads it."""
    value = {"mean": 2.5, "std": 0.1, "seeds": 3}
    distance = {"name": "rFID, torchmetrics", "kind": "rFID", "antialias": False, "value": value}
    found = {
        "stamp": {"commit": "abc", "date": "today"},
        "set": "some pictures",
        "tokenizer": "lavit-tok",
        "weights": name,
        "codes_per_image": 90.0,
        "pixels": {
            "against_published": [],
            "codes_per_image": 92.0,
            "distances": [distance],
            **pixels,
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(found))
    return folder / f"{name}.json"


def test_only_the_same_protocol_stands_beside_published_figures(
    scripts: Any, tmp_path: Path
) -> None:
    script = scripts("compare")
    value = {"mean": 2.5, "std": 0.1, "seeds": 3}
    other = {
        "name": "Frechet distance in a space (not FID)",
        "kind": "Frechet",
        "antialias": None,
        "value": value,
    }
    sharp = {"name": "rFID, antialias=True", "kind": "rFID", "antialias": True, "value": value}
    paths = [
        result(tmp_path, "same"),
        result(tmp_path, "small", against_published=["64x64 pixels, not 256x256"]),
        result(tmp_path, "space", distances=[other]),
        result(tmp_path, "sharp", distances=[sharp]),
    ]
    words = ["--results", *map(str, paths), "--out", str(tmp_path / "out")]
    found = script.main(script.arguments().parse_args(words))
    assert [r["tokenizer"] for r in found["ours_beside"]] == ["lavit-tok (same)"]
    assert found["ours_beside"][0]["codes"] == 92
    reasons = {r["tokenizer"]: r["reasons"] for r in found["ours_listed"]}
    assert reasons == {
        "lavit-tok (small)": ["64x64 pixels, not 256x256"],
        "lavit-tok (space)": ["no rFID"],
        "lavit-tok (sharp)": ["antialias is not False"],
    }
    text = (tmp_path / "out" / "compare.md").read_text()
    table, _, listed = text.partition("## Ours, not comparable")
    assert "**lavit-tok (same)**" in table and "(small)" not in table and "(small)" in listed
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: expected a result of reconstruction\.py"):
        script.read_results([tmp_path / "other.json"])


def test_published_figures_each_have_a_source_and_a_count() -> None:
    published = json.loads((SCRIPTS / "published.json").read_text())
    for figure in published["figures"]:
        assert figure["paper"] and figure["tokens"] and figure["codes"] > 0 and figure["rfid"] > 0
        assert figure["arxiv"] is None or (
            figure["arxiv"][:4].isdigit() and len(figure["arxiv"]) == 10
        )
    adaptive = next(f for f in published["figures"] if f["tokenizer"] == "AdaTok")
    assert (adaptive["rfid"], adaptive["codes"]) == (1.50, 118)
    assert "LaVIT" in published["none_published"]


# The pages


@pytest.mark.parametrize(
    "name",
    [
        "tokens_per_image",
        "reconstruction",
        "selection",
        "encode_speed",
        "decode_speed",
        "train_speed",
        "compare",
    ],
)
def test_every_command_of_the_page_is_understood(name: str, scripts: Any) -> None:
    """docs/benchmarks.md has one command a row, and each parses."""
    import re
    import shlex

    page = (SCRIPTS.parent / "docs" / "benchmarks.md").read_text()
    commands = re.findall(rf"`python benchmarks/{name}\.py([^`]*)`", page)
    assert commands
    for words in commands:
        scripts(name).arguments().parse_args(shlex.split(words))

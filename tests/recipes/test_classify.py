"""Classification with an LM's hidden states, on classes that anything can tell apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.lm_parts import processor_and_model
from PIL import Image

from benchmarks.shared.provenance import recipe
from lavit_lm import MultimodalLM
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.davinci import DaVinci
from lavit_tok import VisualTokenizer
from lavit_tok.data.splits import load_splits

SHADES = {"black": 20, "gray": 120, "white": 235}

pytestmark = pytest.mark.usefixtures("data_recipe")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Gray squares with noise, named by their brightness; and one image of another source."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split, count in (("train", 60), ("validation", 12), ("test", 24)):
        names = [list(SHADES)[i % 3] for i in range(count)]
        noise = torch.randint(-15, 15, (count, 32, 32, 3), generator=generator)
        pixels = torch.tensor([SHADES[n] for n in names])[:, None, None, None] + noise
        images = [Image.fromarray(p.to(torch.uint8).numpy()) for p in pixels]
        rows = {"image": images, "caption": names, "source": ["shades"] * count}
        rows["image"].append(images[0])
        rows["caption"].append("a square")
        rows["source"].append("other")
        splits[split] = Dataset.from_dict(rows)
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def model(tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> str:
    """A saved DaVinci with random weights."""
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    processor, plain = processor_and_model("llama")
    objective = DaVinci(caption_prompt="")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SequenceModel(plain.lm, *objective.connectors.build(tiny_tokenizer, 16)).eval()
    lm = MultimodalLM(model, processor, tiny_tokenizer, objective=objective)
    lm.save_pretrained(tmp_path / "lm", str(tmp_path / "visual"))
    return str(tmp_path / "lm")


def test_brightness(data: Path, model: str, tmp_path: Path) -> None:
    args = ["--model", model, "--data", str(data), "--source", "shades"]
    out = tmp_path / "numbers.json"
    page = recipe("lm/classify.py")
    found = page.main([*args, "--steps", "40", "--lr", "3e-3", "3e-3", "--out", str(out)])
    assert json.loads(out.read_text()) == found and set(found) == set(page.METHODS)
    for method, numbers in found.items():
        assert list(numbers) == ["60", "6"], "all labels, and two of each class"
        assert numbers["60"] > 0.9, method


def test_texts(model: str, tmp_path: Path) -> None:
    """Groups of emoji by their names, each of which is in one split."""
    from sources import EMOJI

    page = recipe("lm/classify.py")
    file = tmp_path / "raw" / EMOJI / "emoji.json"
    file.parent.mkdir(parents=True)
    groups = {"cat": "Animals", "train": "Travel"}
    entries = [
        {"name": f"{kind.upper()} {i}" if i % 3 else None, "short_name": f"{kind} {i}",
         "category": group}
        for i in range(60)
        for kind, group in groups.items()
    ]  # fmt: skip
    file.write_text(json.dumps(entries))
    found = page.texts(tmp_path / "raw")
    names = [(name, label) for own in found.values() for [name], label in zip(*own, strict=True)]
    assert sorted(name for name, _ in names) == sorted(
        f"{k} {i}" for k in groups for i in range(60)
    )
    assert all(int(label) == name.startswith("train") for name, label in names)
    assert len(found["train"].items) > 80 and found["test"].items and found["validation"].items
    args = ["--model", model, "--task", "texts"]
    with pytest.raises(SystemExit):
        page.main(args)
    args += ["--raw", str(tmp_path / "raw"), "--steps", "40", "--lr", "3e-3", "3e-3"]
    for method, numbers in page.main([*args, "--labels", "1"]).items():
        assert list(numbers.values()) == [1.0], method


def test_pairs(data: Path, model: str) -> None:
    """Every second image has the caption of another."""
    page = recipe("lm/classify.py")
    loaded = load_splits(str(data))
    found = page.pairs(loaded, "shades", 32, 20, seed=0)
    assert [len(found[split].items) for split in page.SPLITS] == [20, 12, 20]
    for split in page.SPLITS:
        assert found[split].labels.tolist() == [0, 1] * (len(found[split].items) // 2)
        for (image, caption), label in zip(*found[split], strict=True):
            shown = abs(float(image.float().mean()) - SHADES[caption]) < 40
            assert shown == bool(label)
    with pytest.raises(ValueError, match="expected one of other, shades, got 'emoji'"):
        page.pairs(loaded, "emoji", 32, 20, seed=0)
    args = ["--model", model, "--data", str(data), "--task", "pairs", "--source", "shades"]
    numbers = page.main([*args, "--steps", "3", "--labels", "1", "--methods", "frozen", "scratch"])
    assert set(numbers) == {"frozen", "scratch"} and set(numbers["frozen"]) == {"60"}


def test_a_fraction_has_the_first_of_every_class() -> None:
    page = recipe("lm/classify.py")
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1])
    taken = page.Labeled(torch.arange(8), labels)
    assert taken.take(0.5).items == [0, 1, 2, 4]
    assert taken.take(1.0).labels.equal(labels)

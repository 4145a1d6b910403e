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

SHADES = {"black": 20, "gray": 120, "white": 235}


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


def test_brightness(data: Path, tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    processor, plain = processor_and_model("llama")
    objective = DaVinci(caption_prompt="")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SequenceModel(plain.lm, *objective.connectors.build(tiny_tokenizer, 16)).eval()
    lm = MultimodalLM(model, processor, tiny_tokenizer, objective=objective)
    lm.save_pretrained(tmp_path / "lm", str(tmp_path / "visual"))
    args = ["--model", str(tmp_path / "lm"), "--data", str(data), "--source", "shades"]
    out = tmp_path / "numbers.json"
    page = recipe("lm/classify.py")
    found = page.main([*args, "--steps", "40", "--lr", "3e-3", "3e-3", "--out", str(out)])
    assert json.loads(out.read_text()) == found and set(found) == set(page.METHODS)
    for method, numbers in found.items():
        assert list(numbers) == ["60", "6"], "all labels, and two of each class"
        assert numbers["60"] > 0.9, method


def test_a_fraction_has_the_first_of_every_class() -> None:
    page = recipe("lm/classify.py")
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1])
    taken = page.Labeled(torch.arange(8), labels)
    assert taken.take(0.5).items == [0, 1, 2, 4]
    assert taken.take(1.0).labels.equal(labels)

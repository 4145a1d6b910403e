"""The example programs run, on drawn shapes, and do what they say."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavit_tok import VisualTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("shapes", "small_gpt", "lightning_gpt", "webdataset_codes")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """examples/ on the path and an empty working folder, as `python examples/NAME.py` has them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    folder: Path = import_module("shapes").write_shapes(tmp_path / "shapes", 12)
    return folder


def test_shapes(shapes: Path) -> None:
    with (shapes / "metadata.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    for line in lines:
        _, color, _, _, background = line["caption"].split()
        colors = Image.open(shapes / line["file_name"]).convert("RGB").getcolors()
        named = [Image.new("RGB", (1, 1), name).getpixel((0, 0)) for name in (background, color)]
        assert sorted(colors, reverse=True)[0][1] == named[0]
        assert {value for _, value in colors} == set(named)


def test_small_gpt(shapes: Path, tmp_path: Path) -> None:
    losses = import_module("small_gpt").main(
        [str(shapes), "--steps", "12", "--images", "2", "--out", str(tmp_path)]
    )
    assert losses[-1] < losses[0] - 1
    assert all(Image.open(tmp_path / f"{i}.png").size == (128, 128) for i in range(2))


def test_a_gpt_attends_to_earlier_codes_and_learns_the_end() -> None:
    module = import_module("small_gpt")
    torch.manual_seed(0)
    model = module.GPT(8, 5, width=32, layers=1)
    ids = torch.tensor([[8, 1, 2, 3], [8, 1, 2, 7]])
    logits = model(ids)
    torch.testing.assert_close(logits[0, :3], logits[1, :3])
    assert not torch.allclose(logits[0, 3], logits[1, 3])
    # Padding behind the end of a shorter image is no target.
    alone = model.loss([[1, 2]]) * 3 + model.loss([[3, 4, 5, 6, 7]]) * 6
    torch.testing.assert_close(model.loss([[1, 2], [3, 4, 5, 6, 7]]) * 9, alone)
    module.train(model, [[1, 2], [3, 4, 5]], 80)
    generated = model.generate(20, torch.Generator().manual_seed(0))
    assert sum(codes in ([1, 2], [3, 4, 5]) for codes in generated) >= 15


def test_lightning(shapes: Path, tmp_path: Path) -> None:
    main = import_module("lightning_gpt").main
    trainer = main([str(shapes), "--max-steps", "2", "--batch-size", "4", "--out", str(tmp_path)])
    assert trainer.global_step == 2
    names = set(trainer.lightning_module.state_dict())
    assert names and all(name.startswith("model.") for name in names)
    optimized = trainer.optimizers[0].param_groups[0]["params"]
    assert len(optimized) == len(list(trainer.lightning_module.model.parameters()))


def test_webdataset(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wds: Any = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "images-0.tar")) as tar:
        for path in sorted(shapes.glob("*.png"))[:5]:
            tar.write({"__key__": path.stem, "png": path.read_bytes(), "txt": b"a shape"})
        tar.write({"__key__": "broken", "png": b"no image", "txt": b"nothing"})
    main = import_module("webdataset_codes").main
    out = str(tmp_path / "codes-%02d.tar")
    source = str(tmp_path / "images-{0..0}.tar")
    assert main([source, out, "--batch-size", "2", "--samples-per-tar", "3"]) == 5
    assert "broken: " in capsys.readouterr().out
    read = wds.WebDataset(str(tmp_path / "codes-{00..01}.tar"), shardshuffle=False)
    samples = {sample["__key__"]: sample for sample in read}
    assert len(samples) == 5
    tokenizer = VisualTokenizer.from_pretrained("default")
    for key, sample in samples.items():
        codes = tokenizer.encode(shapes / f"{key}.png")[0].tolist()
        assert json.loads(sample["codes.json"]) == codes and sample["txt"] == b"a shape"
        assert "png" not in sample

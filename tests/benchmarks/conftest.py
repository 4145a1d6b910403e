"""Data sets and models for the benchmarks, at the smallest size."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.lm_parts import processor_and_model
from helpers.small_lms import TEXTS
from helpers.small_sets import captioned
from safetensors.torch import save_file

from lavit_lm.checkpoints.native import save_model
from lavit_lm.objectives.lavit import LaVIT
from lavit_tok import VisualTokenizer

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are not installed
IMAGES = 8
CAPTIONS = [*TEXTS, "rain"]


@pytest.fixture
def data(tmp_path: Path, photos: list[Path]) -> Path:
    """Captioned crops of photographs of two sources, train and test splits; one file is broken."""
    for split, texts in (("train", TEXTS[:2]), ("test", CAPTIONS)):
        captions = [texts[i % len(texts)] for i in range(IMAGES)]
        captioned(tmp_path / "set" / split, photos, captions, sources="ab")
    metadata = tmp_path / "set" / "test" / "metadata.csv"
    metadata.write_text(metadata.read_text() + "\nbroken.png,broken,b")
    (tmp_path / "set" / "test" / "broken.png").write_bytes(b"no image")
    return tmp_path / "set"


@pytest.fixture
def tokenizer(tmp_path: Path, tiny_tokenizer: VisualTokenizer) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def decoder(tmp_path: Path, tiny_decoder: Any) -> Path:
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


@pytest.fixture
def model(tmp_path: Path, tokenizer: Path, tiny_tokenizer: VisualTokenizer) -> Path:
    """A random language model's directory."""
    processor, lm = processor_and_model("llama")
    fingerprint = tiny_tokenizer.fingerprint()
    save_model(tmp_path / "lm", lm, processor, LaVIT(), str(tokenizer), fingerprint)
    return tmp_path / "lm"


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random scorer as its recipe saves one; sentence embeddings are counts of letters."""
    from benchmarks.shared.provenance import recipe

    monkeypatch.setitem(sys.modules, "sentences", SimpleNamespace(embed=letters))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        weights = recipe("default/scorer.py").Scorer().state_dict()
    (tmp_path / "scorer").mkdir()
    save_file(weights, tmp_path / "scorer" / "scorer.safetensors")
    return tmp_path / "scorer"


def letters(captions: Any) -> torch.Tensor:
    """Unit vectors [n 384] in place of sentence embeddings, whose model is a package of its own."""
    counts = torch.zeros(len(captions), 384)
    for i, caption in enumerate(captions):
        counts[i, 0] = 0.5
        for letter in caption:
            counts[i, ord(letter) % 384] += 1
    return torch.nn.functional.normalize(counts, dim=1)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a script with a command line; returns what its JSON file holds, without the stamp."""

    def run_script(script: Any, *args: Any, out: str = "out", name: str = "") -> dict[str, Any]:
        name, folder = name or script.__name__.rpartition(".")[2], tmp_path / out
        script.main(script.arguments().parse_args([*map(str, args), "--out", str(folder)]))
        text = (folder / f"{name}.md").read_text()
        for part in ("command: `", "date: ", "commit: ", "hardware: ", "versions: python 3"):
            assert part in text
        assert not list(folder.glob(".*")), "finished stages are removed"
        values = json.loads((folder / f"{name}.json").read_text())
        del values["stamp"]
        return values

    return run_script


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script that must fail; returns the one line that a user gets."""

    def run_script(script: Any, *args: Any) -> str:
        from benchmarks.shared import cli

        capsys.readouterr()
        assert cli.run(script.main, script.arguments(), [str(arg) for arg in args]) == 2
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run_script

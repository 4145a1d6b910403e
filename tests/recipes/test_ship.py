"""What is shipped: half precision, and of several models the mean of their weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.emu_parts import EMU, built
from safetensors.torch import load_file

from benchmarks.shared.provenance import recipe
from lavit_lm import MultimodalLM
from lavit_tok import VisualTokenizer

FILES = ("model.safetensors", "objective_modules.safetensors")


@pytest.fixture
def models(tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> list[Path]:
    """Two models of equal names and other weights; those of the second are larger by 0.25."""
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        processor, model = built(tiny_tokenizer)
        model.lm.config.tie_word_embeddings = True
        model.lm.tie_weights()
        for parameter in model.parameters():
            parameter.data += 0.25 * number
        lm = MultimodalLM(model, processor, tiny_tokenizer, objective=EMU)
        lm.save_pretrained(folder, str(tmp_path / "visual"))
    return folders


def test_the_mean_of_two_models(models: list[Path], tmp_path: Path):
    ship = recipe("lm/ship.py")
    visual = ["--visual-tokenizer", str(tmp_path / "visual")]
    for names, added in ((models[:1], 0), (models, 0.125)):
        out = tmp_path / f"of {len(names)}"
        ship.main(["--model", *map(str, names), "--out", str(out), *visual])
        for file in FILES:
            before, after = load_file(models[0] / file), load_file(out / file)
            assert before.keys() == after.keys()
            for name, weight in before.items():
                assert after[name].dtype == torch.float16
                torch.testing.assert_close(
                    after[name].float(), weight + added, rtol=1e-3, atol=1e-3, msg=name
                )
        lines = (out / "tokenizer.json").read_text().splitlines()
        assert len(lines) == 1 and json.loads(lines[0])
        MultimodalLM.from_pretrained(out, decoder=None)


def test_models_of_other_weights_are_refused(
    models: list[Path], tiny_tokenizer: VisualTokenizer, tmp_path: Path
):
    for number, other in enumerate((replace(EMU, depth=1), replace(EMU, queries=2))):
        processor, model = built(tiny_tokenizer, objective=other)
        lm = MultimodalLM(model, processor, tiny_tokenizer, objective=other)
        folder = tmp_path / f"other {number}"
        lm.save_pretrained(folder, str(tmp_path / "visual"))
        with pytest.raises(ValueError, match=r"same names and shapes, got .*first, .*other"):
            recipe("lm/ship.py").main(
                ["--model", str(models[0]), str(folder), "--out", str(tmp_path / "out")]
            )
        assert not (tmp_path / "out").exists()

"""README's blocks under "Training": from a folder of images to generated images, in a few steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_lm.cli import main as lavit_lm
from lavit_tok.cli import main as lavit_tok

README = (Path(__file__).parent.parent / "README.md").read_text()
NEW = (
    "--model.config.codebook_size=16 --model.config.merger_depth=1 --trainer.max_steps=1"
    " --model.selection.stop_sampling_step=1 --model.codebook.start_step=2 --data.batch_size=4"
    " --model.config.reconstructor_depth=1 --trainer.precision=32-true"
)
STEPS = "--trainer.max_steps=2 --trainer.precision=32-true --data.batch_size="
SMALL = {  # what a command of the block is shortened by
    "fit": f"{STEPS}4 --model.error_steps=2",
    "fit-mean-decoder": f"{STEPS}4",
    "shards": "",
    "lavit-lm fit": f"{STEPS}1",
    "generate": "-n 2 --steps 2",
    "caption": "--max-new-tokens 4",
    "export": "",
}


def photographs(folder: Path, count: int = 12) -> None:
    """Generated images with a text file beside each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        image = np.full((40, 48, 3), rng.integers(256, size=3), np.uint8)
        top, left = rng.integers(0, 20, size=2)
        image[top : top + 16, left : left + 16] = rng.integers(256, size=3)
        Image.fromarray(image).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a square at {left // 10}\n")


def test_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first, _, second, *_ = re.split("```(?:sh)?\n", README.partition("\n## Training\n")[2])
    commands = [s for s in (first + second).splitlines() if s.startswith("lavit-")]
    assert len(commands) == 9
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "my_images")
    threads = torch.get_num_threads()
    recipe = ["fit", "-c", "selected/tokenizer", "--data.data=my_images"]
    assert lavit_tok([*recipe, *NEW.split()]) == 0
    assert re.search(
        r"no tokenizer saved: .* step 1, before .* raise trainer.max_steps above 2 ",
        capsys.readouterr().err,
    )
    lines = []
    for command in commands:
        program, name, *_ = command.split()
        key = name if program == "lavit-tok" or name != "fit" else "lavit-lm fit"
        arguments = shlex.split(f"{command} {SMALL[key]}")[1:]
        assert {"lavit-tok": lavit_tok, "lavit-lm": lavit_lm}[program](arguments) == 0, command
        lines.append(capsys.readouterr())
    assert list(Path("runs/lm").glob("*/text-tokenizer-*/tokenizer.json"))
    torch.set_num_threads(threads)
    ends = [captured.err.splitlines()[-1] for captured in lines]
    assert ends[5].startswith("wrote the tokenizer to runs/default/tokenizer; next: ")
    assert ends[6].startswith("wrote the pixel decoder to runs/default/decoder; next: ")
    assert "held out of train by content" in lines[0].err and "next: lavit-lm fit" in ends[0]
    following = [*commands[1:5], *commands[6:]]
    for end, command in zip([*ends[:4], *ends[5:8]], following, strict=True):
        assert f"next: {' '.join(command.split()[:2])}" in end
    assert len(list(Path("generated").glob("*.png"))) == 2
    assert len(lines[3].out.splitlines()) == 12, "a caption for each image"
    assert (tmp_path / "exported/model.safetensors").is_file()

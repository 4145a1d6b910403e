"""Recipes by name, from a checkout and from an installed wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lavit_tok.cli import main, recipes

ROOT = Path(__file__).parents[3]


def test_every_recipe_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.partition(" ")[2].strip() for line in lines}
    assert set(listed) == {
        f"{path.parent.name}/{path.stem}" for path in (ROOT / "recipes").glob("*/*.yaml")
    }
    assert all(len(text) > 20 for text in listed.values())


def test_show_and_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "recipes/lm/lavit.yaml").read_text()
    assert main(["recipes", "show", "lm/lavit"]) == 0
    assert capsys.readouterr().out == text
    assert main(["recipes", "copy", "lm/lavit", "mine/my.yaml"]) == 0
    assert Path("mine/my.yaml").read_text() == text
    assert main(["recipes", "copy", "selected"]) == 0
    assert Path("selected/vae.py").read_bytes() == (ROOT / "recipes/selected/vae.py").read_bytes()
    capsys.readouterr()
    assert main(["recipes", "copy", "selected"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_local_file_has_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    installed = str(ROOT / "recipes/default/tokenizer.yaml")
    for name in ("default/tokenizer", "default/tokenizer.yaml", "recipes/default/tokenizer.yaml"):
        assert recipes.with_files(["-c", name, "--a=1"]) == ["-c", installed, "--a=1"]
        assert recipes.with_files([f"--config={name}"]) == [f"--config={installed}"]
    Path("default").mkdir()
    Path("default/tokenizer.yaml").write_text("mine: 1\n")
    assert recipes.with_files(["-c", "default/tokenizer.yaml"]) == ["-c", "default/tokenizer.yaml"]
    assert recipes.with_files(["-c", "default/tokenizer"]) == ["-c", installed]
    Path("default/tokenizer").write_text("mine: 2\n")
    assert recipes.with_files(["-c", "default/tokenizer"]) == ["-c", "default/tokenizer"]


@pytest.mark.parametrize(
    ("name", "similar"),
    [("default/tokeniser", "default/tokenizer"), ("lavit", "lm/lavit"), ("zz/zz", "list` lists")],
)
def test_an_unknown_name(name: str, similar: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", name]) == 2
    assert similar in capsys.readouterr().err


def test_the_wheel_has_the_recipes(tmp_path: Path) -> None:
    """Built from a copy of the checkout, unpacked elsewhere, and run from an unrelated folder."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lavit_tok", "lavit_lm", "recipes"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = "import sys\nfrom setuptools import build_meta\nbuild_meta.build_wheel(sys.argv[1])"
    wheel = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(wheel, cwd=source, check=True, capture_output=True)
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "lavit_tok.cli", "recipes", "show", "default/tokenizer"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (ROOT / "recipes/default/tokenizer.yaml").read_text()
    assert (tmp_path / "site/lavit_tok/recipes/selected/vae.py").is_file()

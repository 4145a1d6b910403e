"""What importing costs, and that imports go one way."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

import lavit_lm
import lavit_tok

PACKAGE = Path(lavit_tok.__file__).parent
LM_PACKAGE = Path(lavit_lm.__file__).parent


def modules_after(code: str) -> set[str]:
    """Top-level modules that a new interpreter has loaded after running code."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return set(json.loads(shown.splitlines()[-1]))


def test_import_is_light() -> None:
    heavy = {"torch", "transformers", "diffusers", "datasets", "pytorch_lightning"}
    for package in ("lavit_tok", "lavit_lm"):
        assert not modules_after(f"import {package}") & heavy


def test_a_vocabulary_needs_no_training_packages() -> None:
    loaded = modules_after(
        "from lavit_lm import VisualVocabulary; import lavit_lm.checkpoints.export"
    )
    assert not loaded & {"diffusers", "datasets", "pytorch_lightning", "peft", "jsonargparse"}


def test_encoding_needs_no_training_packages() -> None:
    code = "from lavit_tok import VisualTokenizer, VisualCodes; VisualTokenizer()"
    loaded = modules_after(code)
    assert "torch" in loaded
    assert not loaded & {
        "diffusers",
        "datasets",
        "pytorch_lightning",
        "vector_quantize_pytorch",
        "torchmetrics",
        "jsonargparse",
    }


def test_decoding_needs_no_training_packages() -> None:
    loaded = modules_after("from lavit_tok import PixelDecoder; import lavit_tok.cli.commands")
    assert "diffusers" in loaded
    assert not loaded & {
        "datasets",
        "pytorch_lightning",
        "vector_quantize_pytorch",
        "torchmetrics",
        "jsonargparse",
    }


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in (lavit_tok, lavit_lm) for name in package.__all__],
)
def test_public_names_exist(package: Any, name: str) -> None:
    assert getattr(package, name).__name__ == name


@pytest.mark.parametrize("package", [lavit_tok, lavit_lm])
def test_unknown_names(package: Any) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        package.Nothing  # noqa: B018


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_go_one_way(path: Path) -> None:
    """lavit_tok never imports lavit_lm; no room imports the training; nothing needs torchvision or timm."""
    tree = ast.parse(path.read_text())
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {"lavit_lm", "torchvision", "timm"}
    if "training" not in path.parts and path.name not in (
        "commands.py",
        "__init__.py",
    ):  # which import when asked
        assert not [name for name in names if name.startswith("lavit_tok.training")]


@pytest.mark.parametrize(
    "path", sorted(LM_PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(LM_PACKAGE))
)
def test_language_models_use_only_public_names(path: Path) -> None:
    """lavit_lm imports lavit_tok's public names, and modules of the folders that both packages share."""
    shared = ("nn", "checkpoints", "data", "training", "cli")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            assert (
                not {name for name in names if name.startswith("lavit_tok.")}
                and "torchvision" not in names
            )
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lavit_tok":
            folder = (node.module or "").split(".")[1:2]
            if (
                folder
                and folder[0] in shared
                and not node.module.rpartition(".")[2].startswith("_")
            ):
                continue
            assert node.module == "lavit_tok", f"line {node.lineno}: {node.module}"
            assert {alias.name for alias in node.names} <= set(lavit_tok.__all__)


def test_shapes_in_signatures_are_checked() -> None:
    """In every process that runs tests: jaxtyping's pytest option must act in xdist's workers, too."""
    with pytest.raises(TypeCheckError):
        lavit_tok.VisualCodes(torch.zeros(3), torch.tensor([3]), 16)

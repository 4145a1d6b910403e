"""What importing costs, and that imports go one way."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lavit_tok

PACKAGE = Path(lavit_tok.__file__).parent


def modules_after(code: str) -> set[str]:
    """Top-level modules that a new interpreter has loaded after running code."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(json.loads(shown.splitlines()[-1]))


def test_import_is_light() -> None:
    assert not modules_after("import lavit_tok") & {"torch", "transformers", "diffusers", "datasets", "lightning"}


def test_encoding_needs_no_training_packages() -> None:
    code = "from lavit_tok import VisualTokenizer, VisualCodes; VisualTokenizer()"
    loaded = modules_after(code)
    assert "torch" in loaded
    assert not loaded & {
        "diffusers",
        "datasets",
        "lightning",
        "vector_quantize_pytorch",
        "torchmetrics",
        "jsonargparse",
    }


def test_decoding_needs_no_training_packages() -> None:
    loaded = modules_after("from lavit_tok import PixelDecoder; import lavit_tok.commands")
    assert "diffusers" in loaded
    assert not loaded & {"datasets", "lightning", "vector_quantize_pytorch", "torchmetrics", "jsonargparse"}


@pytest.mark.parametrize("name", lavit_tok.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(lavit_tok, name).__name__ == name


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lavit_tok.Nothing  # noqa: B018


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    """lavit_tok never imports lavit_lm; no room imports the training; nothing needs torchvision or timm."""
    tree = ast.parse(path.read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {"lavit_lm", "torchvision", "timm"}
    if "training" not in path.parts and path.name != "commands.py":
        assert not [name for name in names if name.startswith("lavit_tok.training")]

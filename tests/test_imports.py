"""What importing costs, and that imports go one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

import lavit_lm
import lavit_tok

ROOT = Path(lavit_tok.__file__).parents[1]
# The folders of each package: one imports only those before it. (docs/architecture.md)
FOLDERS = {
    "lavit_tok": ["nn", "checkpoints", "encode", "decode", "released", "data", "training", "cli"],
    "lavit_lm": [
        *("vocabulary", "sequences", "vision", "models", "objectives", "checkpoints"),
        *("generation", "auto", "training", "cli"),
    ],
}
SHARED = ("nn", "checkpoints", "data", "training", "cli")  # of lavit_tok, with lavit_lm
HEAVY = {"torch", "transformers", "diffusers", "datasets", "pytorch_lightning"}
TRAINING = {"datasets", "pytorch_lightning", "vector_quantize_pytorch", "torchmetrics", "peft"}


# Code that one interpreter runs in this order; which modules it then has, and which it has not.
LOADED: dict[str, list[tuple[str, set[str], set[str]]]] = {
    "processes that only open images": [
        ("import lavit_tok.data.ray_engine, lavit_tok.data.shard_source", {"datasets"}, {"torch"})
    ],
    "all others": [
        ("import lavit_tok", set(), HEAVY),
        ("import lavit_lm", set(), HEAVY),
        ("import lavit_tok.cli.parser, lavit_lm.cli.parser", set(), HEAVY),
        (
            "from lavit_lm import VisualVocabulary; import lavit_lm.checkpoints.export",
            {"torch"},
            {"diffusers", "jsonargparse", *TRAINING},
        ),
        (
            "from lavit_tok import VisualTokenizer, VisualCodes; VisualTokenizer()",
            {"torch"},
            {"diffusers", "jsonargparse", *TRAINING},
        ),
        (
            "from lavit_tok import PixelDecoder; import lavit_tok.cli.commands",
            {"diffusers"},
            {"jsonargparse", *TRAINING} - {"peft"},  # diffusers imports peft
        ),
        (
            "from lavit_tok import *; from lavit_lm import *",
            {"diffusers"},
            {"jsonargparse", *TRAINING} - {"peft"},
        ),
    ],
}


@pytest.mark.parametrize("parts", LOADED.values(), ids=LOADED)
def test_what_an_import_loads(parts: list[tuple[str, set[str], set[str]]]) -> None:
    """Read from a new interpreter: the top-level modules that it has after running each code."""
    show = "import sys; print('loaded', *{name.split('.')[0] for name in sys.modules})"
    code = "\n".join(line for part, _, _ in parts for line in (part, show))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("loaded ")]
    for line, (part, needed, absent) in zip(lines, parts, strict=True):
        loaded = set(line.split())
        assert needed <= loaded, part
        assert not loaded & absent, part


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in (lavit_tok, lavit_lm) for name in package.__all__],
)
def test_public_names_exist(package: Any, name: str) -> None:
    value = getattr(package, name)
    assert getattr(value, "__name__", name) == name  # a union of types has no name


@pytest.mark.parametrize("package", [lavit_tok, lavit_lm])
def test_unknown_names(package: Any) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        package.Nothing  # noqa: B018


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, names taken from it) of each import, except those for type checkers."""
    tree = ast.parse(path.read_text())
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield str(node.module), [alias.name for alias in node.names]


def folder(module: str) -> str:
    """The folder of a module in its package; checkpoints/released/ is one of its own."""
    parts = module.split(".")[1:]
    return "released" if "released" in parts else parts[0] if parts else ""


@pytest.mark.parametrize("package", FOLDERS)
def test_folders_import_one_way(package: str) -> None:
    """Each folder imports only those before it in the list, so that there is no cycle."""
    order = FOLDERS[package]
    backwards = []
    for path in sorted((ROOT / package).rglob("*.py")):
        here = folder(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module, _ in imports(path):
            there = folder(module) if module.split(".")[0] == package else ""
            if here in order and there in order and order.index(there) > order.index(here):
                backwards.append(f"{path.relative_to(ROOT)}: {module}")
    assert not backwards


@pytest.mark.parametrize("package", FOLDERS)
def test_few_entries_at_the_top(package: str) -> None:
    """At most twelve files and folders of code, and every folder is in the list above."""
    entries = [path for path in (ROOT / package).iterdir() if [*path.glob("*.py")]]
    assert {path.name for path in entries} <= set(FOLDERS[package])
    assert len(entries) + len([*(ROOT / package).glob("*.py")]) <= 12


def test_neither_package_imports_what_it_may_not() -> None:
    """lavit_tok never imports lavit_lm, which takes public names and shared modules from it."""
    for package in FOLDERS:
        for path in sorted((ROOT / package).rglob("*.py")):
            for module, names in imports(path):
                where = f"{path.relative_to(ROOT)}: {module}"
                assert module.split(".")[0] not in ("torchvision", "timm"), where
                if package == "lavit_tok":
                    assert module.split(".")[0] != "lavit_lm", where
                elif module == "lavit_tok":
                    assert set(names) <= set(lavit_tok.__all__), where
                elif module.startswith("lavit_tok."):
                    assert folder(module) in SHARED, where
                    assert not re.search(r"(^|\W)_", f"{module} {names}"), where


def test_shapes_in_signatures_are_checked() -> None:
    """Jaxtyping's pytest option acts in xdist's workers, too."""
    with pytest.raises(TypeCheckError):
        lavit_tok.VisualCodes(torch.zeros(3), torch.tensor([3]), 16)

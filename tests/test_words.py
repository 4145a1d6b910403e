"""The field's words in public names, docstrings, command-line texts and error messages.

`python tests/test_words.py [ROOT]` prints every other word that it finds, and how many.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lavit_tok", "lavit_lm")
# The field says image, sequence or example, position, generate, attend to, processor, config, ...
WORDS = r"""pictures? rows? places? say says said saying speaks? sees seen seeing paint\w*
    lexicon\w* fed rooms? houses? tells? told asks? asked asking settings words chance mirror\w*
    learnt"""
NAMES = r"""see shares? inner speaker finished scored wording least most settle nearness talking"""
PROSE = r"""whoever stands? stood lies leaves?\ over left\ over
    shares?\ of \[IMG\] <\|img\|(?!>) \|img>
    colour\w* behaviour\w* neighbour\w* favour\w* centred? centres grey\w* modelling labelled
    licen[c]e\w*
    \w*(quant|normal|token|initial|synchron|recogn|organ|real|optim|summar|general|special)is(e[ds]?|ing|ation)"""
# Embedding rows, Parquet's row groups, and "in place" are terms of the field, too.
ALLOWED = re.compile(r"embedding[ _]?rows?|row[ _-]?groups?|\bin[ -]place\b", re.IGNORECASE)
# Benchmarks are named after what they hold.
FILES = {"parts", "common", "figures", "nearness", "talking", "painting"}


def pattern(words: str) -> re.Pattern[str]:
    choices = "|".join(re.split(r"(?<!\\)\s+", words.strip()))
    return re.compile(rf"(?<![\w|])({choices})(?![\w])", re.IGNORECASE)


IN_NAMES, IN_PROSE = pattern(f"{WORDS} {NAMES}"), pattern(f"{WORDS} {PROSE}")


def public(parent: Any) -> Iterator[Any]:
    """The module or class, and what is public in it; __init__ and the like are."""
    yield parent
    for node in parent.body:
        name = ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else ""
        name = getattr(node, "name", name)
        if isinstance(node, ast.ClassDef) and not name.startswith("_"):
            yield from public(node)
        elif name and not re.match(r"_(?!_)", name) and not isinstance(node, ast.ClassDef):
            yield node


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Public classes, functions and methods, their parameters, and annotated fields."""
    for node in public(tree):
        if isinstance(node, ast.AnnAssign):
            yield node.lineno, ast.unparse(node.target)
        elif not isinstance(node, ast.Module):
            yield node.lineno, node.name
        if isinstance(node, ast.FunctionDef):
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg) and not argument.arg.startswith("_"):
                    yield argument.lineno, argument.arg


def texts(tree: ast.Module, command_line: bool) -> Iterator[tuple[int, str]]:
    """Docstrings of what is public; strings in errors, warnings and prints; all help texts."""
    for node in public(tree):
        if isinstance(node, ast.Module | ast.ClassDef):  # a field's docstring follows the field
            for item in node.body:
                if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
                    yield item.lineno, str(item.value.value)
        elif isinstance(node, ast.FunctionDef):
            yield node.lineno, ast.get_docstring(node) or ""
    for node in ast.walk(tree):
        call = node.func if isinstance(node, ast.Call) else None
        name = ast.unparse(call).rpartition(".")[2] if call else ""
        if isinstance(node, ast.Raise) or name in ("warn", "print", "info", "warning"):
            yield from strings(node)
        elif command_line and isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in ("help", "description", "metavar"):
                    yield from strings(keyword)


def strings(node: ast.AST) -> Iterator[tuple[int, str]]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.lineno, part.value


def violations(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    found = []
    for line, name in names(tree):
        spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", ALLOWED.sub("", name))
        found += [f"{path}:{line}: {name}: {word[0]}" for word in IN_NAMES.finditer(spaced)]
    for line, text in texts(tree, "cli" in path.parts):
        words = IN_PROSE.finditer(ALLOWED.sub("", text))
        found += [f"{path}:{line}: text: {word[0]}" for word in words]
    return list(dict.fromkeys(found))


def sources(root: Path = ROOT) -> list[Path]:
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_of_the_field(path: Path) -> None:
    found = violations(path)
    assert not found, "\n".join(found)


def test_benchmarks_are_named_after_what_they_hold() -> None:
    stems = {path.stem for path in (ROOT / "benchmarks").rglob("*.py")}
    assert not stems & FILES
    assert not [name for name in stems if IN_NAMES.search(name.replace("_", " "))]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def draw(codes, _rows): 'Images.'", []),
        ("def paint(codes, row): 'Images.'", ["paint", "row"]),
        ("class A:\n    lexicon_size: int\n    'Grey rows.'", ["lexicon", "Grey", "rows"]),
        ("def _f(rows):\n    'Rows.'\n    raise ValueError(f'{rows} pictures')", ["pictures"]),
        ("def f(): 'Embedding rows, a row group, in place; `<|img|> 7 <|/img|>`.'", []),
        ("def f(): 'Draws <|img| 7 |img> and tokenises.'", ["<|img|", "|img>", "tokenises"]),
    ],
)
def test_what_is_read(source: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(source)
    found = violations(tmp_path / "a.py")
    assert [one.rpartition(": ")[2] for one in found] == expected


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_public_methods_have_docstrings(path: Path) -> None:
    """Except where they override a method of another class."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if path.stem in ("__main__", "lmms_eval", "s3"):  # runs its command; need lmms-eval, s3fs
        return
    classes = [kind for kind in vars(import_module(name)).values() if isinstance(kind, type)]
    missing = [
        f"{kind.__qualname__}.{method}"
        for kind in classes
        if kind.__module__ == name and not kind.__name__.startswith("_")
        for method, member in vars(kind).items()
        if isinstance(member, FunctionType | property | classmethod | staticmethod)
        and not method.startswith("_")
        and not inspect.getdoc(getattr(kind, method))
        and not any(hasattr(base, method) for base in kind.__bases__)
    ]
    assert not missing, f"{name}: {missing}"


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT)
    everything = [one for path in sources(root) for one in violations(path)]
    print("\n".join(everything))
    print(f"{len(everything)} in {len({one.partition(':')[0] for one in everything})} files")

"""Training recipes by name: `-c default/tokenizer`, and `lavit-tok recipes list | show | copy`.

The folder recipes/ of the repository is installed as lavit_tok/recipes. A local file has priority.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CONFIG = ("-c", "--config")


def folder() -> Path:
    """The installed recipes, or those of the checkout that the package is imported from."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def names() -> list[str]:
    """Names of all recipes, e.g. "default/tokenizer"."""
    return sorted(
        path.relative_to(folder()).with_suffix("").as_posix() for path in folder().glob("*/*.yaml")
    )


def find(name: str) -> Path:
    """The file of a recipe: an existing path, or a name such as "default/tokenizer".

    Raises:
        ValueError: neither; the message has the names of similar recipes.
    """
    if Path(name).is_file():
        return Path(name)
    short = name.removesuffix(".yaml").removeprefix("recipes/")
    if short in names():
        return folder() / f"{short}.yaml"
    similar = get_close_matches(short, names(), n=3, cutoff=0.5)
    if not similar:  # the folder or the file may be right
        similar = [n for n in names() if set(n.split("/")) & set(short.split("/"))][:3]
    hint = f"did you mean {' or '.join(similar)}? " if similar else ""
    raise ValueError(
        f"{name}: expected an existing YAML file or the name of a recipe; {hint}"
        "`lavit-tok recipes list` lists all"
    )


def with_files(args: Sequence[str]) -> list[str]:
    """Arguments of a training command, with the file of each recipe in place of its name.

    Raises:
        ValueError: an unknown recipe.
    """
    found = list(args)
    for i, arg in enumerate(found):
        option, equals, value = arg.partition("=")
        if option not in CONFIG:
            continue
        if equals:
            found[i] = f"{option}={find(value)}"
        elif i + 1 < len(found):
            found[i + 1] = str(find(found[i + 1]))
    return found


def run(arguments: argparse.Namespace) -> int:
    """List the recipes, print one, or copy one or a folder of them.

    Raises:
        ValueError: no name, an unknown one, or a target that exists.
    """
    action, name = arguments.action, arguments.name
    if action == "list":
        for recipe in names():
            print(f"{recipe:24s} {_title((folder() / f'{recipe}.yaml').read_text('utf-8'))}")
        return 0
    if name is None:
        raise ValueError(f"recipes {action}: expected the name of a recipe")
    source = folder() / name if (folder() / name).is_dir() else folder() / _installed(name)
    if action == "show":
        if source.is_dir():
            raise ValueError(f"{name}: expected one recipe, got a folder")
        print(source.read_text(encoding="utf-8"), end="")
        return 0
    out = Path(arguments.out or source.name)
    if out.exists():
        raise ValueError(f"{out}: exists already; give another path to copy to")
    if source.is_dir():
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("__pycache__"))
        print(f"copied the folder {name} to {out}", file=sys.stderr)
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, out)
    print(f"copied {name} to {out}; its first lines have the command", file=sys.stderr)
    return 0


def _title(text: str) -> str:
    """The first sentence of a recipe's first comment."""
    comment = text.partition("\n#  ")[0].replace("\n# ", " ").removeprefix("# ")
    return re.split(r"\.(?: |$)", comment.partition("\n")[0], maxsplit=1)[0]


def _installed(name: str) -> str:
    """The path of a recipe in the installed folder, even where a local file has its name."""
    short = name.removesuffix(".yaml").removeprefix("recipes/")
    return f"{short}.yaml" if short in names() else str(find(short))

"""README.md and docs/: their Python runs, their commands parse, the paths they name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from lavit_lm.cli import parser as lm_cli
from lavit_tok.cli.parser import COMMANDS, Command, _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.stem != "log"),  # history
]
QUICK_START = README.partition("## Quick start\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_python_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as a reader would type them, with the shipped models."""
    snippets = blocks(README, "python")
    assert len(snippets) >= 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)
    lists = [value for value in names.values() if isinstance(value, list) and len(value) == 2]
    assert sum(all(isinstance(item, Image.Image) for item in value) for value in lists) == 3, (
        "two images are decoded from codes by each shipped model, and two are generated from text"
    )


def test_quick_start_begins_with_two_shell_blocks() -> None:
    first, second = blocks(QUICK_START, "sh")
    assert QUICK_START.index("```sh") == QUICK_START.index("```")
    for block, environment in ((first, ".venv"), (second, ".venv-test")):
        lines = block.splitlines()
        install = [
            f"python3 -m venv {environment}",
            f". {environment}/bin/activate",
            "pip install torch==2.13.0",
        ]
        assert lines[:3] == install
        assert lines[3].startswith("pip install -c constraints.txt ")
        assert len(lines) == 5
    assert first.splitlines()[-1] == "lavit-tok reconstruct --out out"
    assert second.splitlines()[-1] == "pytest -q"


def test_continuous_integration_runs_the_second_block() -> None:
    shown = subprocess.run(
        ["bash", ROOT / ".ci/run", "--show"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == blocks(QUICK_START, "sh")[1]


@pytest.mark.parametrize(
    ("program", "commands"), [("lavit-tok", COMMANDS), ("lavit-lm", lm_cli.COMMANDS)]
)
def test_every_command_is_in_the_readme(program: str, commands: dict[str, Command]) -> None:
    """Every command is in a table, in any order; every line that calls the program parses."""
    cells = re.findall(rf"^\| (`{program} .*?) \|", README, re.MULTILINE)
    listed = [
        name
        for cell in cells
        for name in re.findall(r"`(?:lavit-\w+ )?([a-z-]+)", cell)
        if not name.startswith("lavit")
    ]
    assert sorted(listed) == sorted(commands)
    for line in re.findall(rf"^{program} (.*)$", README, re.MULTILINE):
        arguments = line.split()
        assert arguments[0] in commands
        if commands[arguments[0]].arguments is not None:
            _parser(program, "", commands).parse_args(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert [x for x in links if "://" not in x and not (page.parent / x).exists()] == []
    assert [path for path in paths(text) if not (ROOT / path).exists()] == []


def paths(text: str) -> list[str]:
    top = "lavit_tok|lavit_lm|recipes|benchmarks|examples|tests|docs"
    return re.findall(rf"`((?:{top})/[\w./-]*)`", text)


def test_fifteen_questions_are_answered_by_a_path() -> None:
    """The table of docs/architecture.md for those who look for a line of code."""
    text = (ROOT / "docs/architecture.md").read_text()
    answers = re.findall(r"^\|[^|]*\?\s*\|([^|]*)\|", text, re.MULTILINE)
    assert len(answers) >= 15
    assert [answer for answer in answers if not paths(answer)] == []


def test_constraints_pin_every_dependency_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert lines[0] == "torch==2.13.0"
    pinned = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = [
        project["dependencies"],
        *(
            project["optional-dependencies"][extra]
            for extra in ("train", "bench", "docs", "serve", "dev")
        ),
    ]
    for requirement in (Requirement(text) for texts in tested for text in texts):
        if requirement.name != "lavit-tok":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), (
                requirement
            )

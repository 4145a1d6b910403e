"""README.md tells the truth: its Python runs, its shell commands are those that continuous integration runs."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from lavit_lm.cli import parser as lm_cli
from lavit_tok.cli.parser import COMMANDS, parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("architecture", "sequences", "objectives", "benchmarks")
QUICK_START = README.partition("## Quick start\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_python_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as a reader would type them, with the shipped model."""
    snippets = blocks(README, "python")
    assert len(snippets) == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)
    images = names["pictures"]
    assert isinstance(images, list)
    assert len(images) == 2
    painted = names["painted"]
    assert isinstance(painted, list)
    assert len(painted) == 2


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


def test_every_command_of_the_readme_is_understood() -> None:
    """Every `lavit-tok ...` line parses, and every command is in the table."""
    for line in re.findall(r"^lavit-tok (.*)$", README, re.MULTILINE):
        words = line.split()
        assert words[0] in COMMANDS
        if COMMANDS[words[0]].arguments is not None:
            parser("lavit-tok", "", COMMANDS).parse_args(words)
    listed = re.findall(r"^\| `lavit-tok ([a-z-]+)", README, re.MULTILINE)
    assert listed == list(COMMANDS)


def test_every_command_of_language_models_is_in_its_table() -> None:
    rows = re.findall(r"^\| (`lavit-lm .*?) \|", README, re.MULTILINE)
    listed = [
        word
        for row in rows
        for word in re.findall(r"`(?:lavit-lm )?([a-z-]+)", row)
        if not word.startswith("lavit")
    ]
    assert sorted(listed) == sorted(lm_cli.COMMANDS)
    for line in re.findall(r"^lavit-lm (.*)$", README, re.MULTILINE):
        assert line.split()[0] in lm_cli.COMMANDS


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/sequences.md",
        "docs/objectives.md",
    ],
)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    links = [
        link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()) if "://" not in link
    ]
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("page", "house"), [("architecture", "lavit_tok"), ("sequences", "lavit_lm")]
)
def test_files_named_in_the_data_path_exist(page: str, house: str) -> None:
    named = set(re.findall(r"\b([a-z_]+\.py)\b", (ROOT / f"docs/{page}.md").read_text()))
    assert len(named) > 12
    found = {path.name for path in (ROOT / house).rglob("*.py")}
    assert sorted(named - found) == []


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
        *(project["optional-dependencies"][extra] for extra in ("train", "bench", "dev")),
    ]
    for requirement in (Requirement(text) for texts in tested for text in texts):
        if requirement.name != "lavit-tok":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), (
                requirement
            )

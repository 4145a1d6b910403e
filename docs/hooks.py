"""Hooks of mkdocs: README.md as home page, links that leave docs/, and options of all commands."""

from __future__ import annotations

import posixpath
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import lavit_lm.cli.parser
import lavit_tok.cli.parser

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Add pages of docs/ that the navigation does not list to its section "How to"."""
    listed = str(config.nav)
    pages = sorted(path.name for path in Path(config.docs_dir).glob("*.md"))
    section = next(entry["How to"] for entry in config.nav if "How to" in entry)
    section += [page for page in pages if page not in listed]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add README.md as index.md."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Follow links within docs/; of a link to another file of the repository keep the text."""
    uri = page.file.src_uri
    folder = "" if uri == "index.md" else posixpath.dirname(f"docs/{uri}")

    def linked(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        if "://" in target or (folder and path.startswith("docs/")):
            return match[0]
        if path == "README.md" or path.startswith("docs/"):
            path = "index.md" if path == "README.md" else path.removeprefix("docs/")
            relative = posixpath.relpath(path, posixpath.dirname(uri) or ".")
            return f"{image}[{text}]({relative}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # mkdocs reports it
        return f"[{text}]({config.repo_url}/blob/main/{path})" if config.repo_url else text

    markdown = LINK.sub(linked, markdown)
    return markdown.replace("<!-- commands -->", commands())


def commands() -> str:
    """Help of every command; options of training commands are those of the recipe's classes."""
    sections = []
    for program in (lavit_tok.cli.parser, lavit_lm.cli.parser):
        name = program.__name__.partition(".")[0].replace("_", "-")
        for command, options in program.COMMANDS.items():
            text = f"{options.help}. Options: `{name} {command} --help`."
            if options.arguments is not None:
                printed = StringIO()
                with redirect_stdout(printed), suppress(SystemExit):
                    program.main([command, "--help"])
                text = f"```text\n{printed.getvalue()}```"
            sections.append(f"## {name} {command}\n\n{text}\n")
    return "\n".join(sections)

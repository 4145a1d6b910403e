"""The documentation site: every public name has an entry, and the how-to pages' Python runs."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml

import lavit_lm
import lavit_tok

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.mark.parametrize("package", [lavit_tok, lavit_lm])
def test_every_public_name_is_in_the_reference(package: Any) -> None:
    page = (DOCS / "reference" / f"{package.__name__}.md").read_text()
    entries = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    # ImageDataModule is importable, too, but not in __all__: it needs the extra "train".
    assert set(package.__all__) <= {entry.rpartition(".")[2] for entry in entries}
    for entry in entries:
        assert resolve_name(entry) is getattr(package, entry.rpartition(".")[2])


def test_navigation_lists_every_page_once() -> None:
    """Except pages that others add to docs/ itself: docs/hooks.py appends them."""
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"]))
    assert len(set(listed)) == len(listed)
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(listed) <= pages | {"index.md"}
    assert {page for page in pages if "/" in page} <= set(listed)


@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("*.md")), ids=lambda path: path.stem)
def test_snippets_of_how_to_pages_run(page: Path) -> None:
    names: dict[str, object] = {}
    for snippet in re.findall(
        r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        exec(compile(snippet, str(page), "exec"), names)
    if "tokenizer" in names:
        assert isinstance(names["tokenizer"], lavit_tok.VisualTokenizer)

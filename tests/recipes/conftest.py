"""Fixtures of the tests of recipes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "data"


@pytest.fixture(scope="module")
def data_recipe() -> Iterator[None]:
    """Let the scripts of recipes/data be imported, and forget their short names afterwards."""
    names = [path.stem for path in RECIPE.glob("*.py")]
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))
    for name in names:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]

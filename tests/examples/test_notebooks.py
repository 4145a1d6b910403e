"""The notebooks run from the first to the last cell, at a small size."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
PARAMETERS = {
    "tokenize_dataset": "IMAGES, STEPS = 12, 4",
    "own_images": "IMAGES, BATCH_SIZE, CODES = 24, 8, 16\n"
    "FREEZE_SELECTOR, START_QUANTIZING, STEPS = 1, 2, 3",
    "objective": "IMAGES, STEPS = 8, 2",
}
PRINTED = {
    "tokenize_dataset": r"nats per code",
    "own_images": r"own: +-?0\.\d+ with",
    "objective": r"completed \[\d+",
}


def test_all_are_run() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_notebook(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In this process, which has imported the packages, by the shell that a kernel runs."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    (parameters,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    set_there = set(re.findall(r"\b[A-Z_]{2,}\b(?=.*=)", parameters.source))
    assert set(re.findall(r"[A-Z_]{2,}", PARAMETERS[name])) <= set_there
    parameters.source += "\n" + PARAMETERS[name]
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # seed_everything sets it
    module, config = ModuleType("notebook"), Config({"HistoryManager": {"enabled": False}})
    monkeypatch.setitem(sys.modules, "notebook", module)
    shell = InteractiveShell(user_module=module, config=config)
    for cell in cells:
        shell.run_cell(cell.source).raise_error()
    assert re.search(PRINTED[name], capsys.readouterr().out)

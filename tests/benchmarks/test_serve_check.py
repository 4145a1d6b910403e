"""examples/serve_check.py: prompts, answers, and the server where extra `serve` is installed."""

from __future__ import annotations

import importlib.util
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lavit_lm import MultimodalLM


@pytest.fixture
def script() -> Any:
    path = Path(__file__).parents[2] / "examples" / "serve_check.py"
    spec = importlib.util.spec_from_file_location("serve_check", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prompts_and_greedy_answers(script: Any, model: Path, tmp_path: Path) -> None:
    lm = MultimodalLM.from_pretrained(model, decoder=None)
    lm.export(tmp_path / "exported")
    found = script.prompts(tmp_path / "exported", "a red apple", [3, 0])
    assert found["caption"] == f"{script.BEGIN}<|vis_00003|><|vis_00000|>{script.END}"
    assert found["image codes"] == f"a red apple{script.BEGIN}"
    answer = script.greedy(tmp_path / "exported", found["image codes"], 4)
    assert isinstance(answer, str)


def test_a_server_that_does_not_start(script: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such option'); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="no such option"), script.server(command, tmp_path, 30):
        pass


@pytest.mark.skipif(
    find_spec("openai") is None or find_spec("uvicorn") is None, reason="needs serve"
)
def test_the_server_answers_as_greedy_decoding(script: Any, model: Path, tmp_path: Path) -> None:
    MultimodalLM.from_pretrained(model, decoder=None).export(tmp_path / "exported")
    command = f"{Path(sys.executable).parent / 'transformers'} serve"
    assert script.main([str(tmp_path / "exported"), "--command", command]) == 0

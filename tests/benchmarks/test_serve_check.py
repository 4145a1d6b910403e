"""benchmarks/serve_check.py: what it asks, and that it finds wrong answers. The server needs the extra `serve`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lavit_lm.vocabulary.visual_vocabulary import BEGIN, END

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_check.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("serve_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["serve_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def asked(
    script: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int], list[Any]]:
    """The exported model, the codes of its first picture, and the requests with their right answers."""
    directory = tmp_path_factory.mktemp("serve") / "exported"
    captions, pictures = script.learnt_by_heart(directory, codebook_size=64, steps=150, seed=0)
    return directory, pictures[0], script.requests(directory, captions[0], pictures[0], 40)


def test_the_model_has_learnt_both_orders(
    script: Any, asked: tuple[Path, list[int], list[Any]]
) -> None:
    directory, codes, requests = asked
    tokenizer = AutoTokenizer.from_pretrained(directory)
    shown = [
        (r.name, r.ask, tokenizer.decode(r.expected, skip_special_tokens=True)) for r in requests
    ]
    picture = "".join(f"<|vis_{code:05d}|>" for code in codes)
    assert shown == [
        ("caption", "completion", script.CAPTIONS[0]),
        ("caption", "chat", script.CAPTIONS[0]),
        ("image codes", "completion", picture + END),
        ("image codes", "chat", picture + END),
        ("image codes", "stream", picture + END),
    ]
    assert requests[0].prompt == BEGIN + picture + END
    for right in requests:
        result = script.judge(
            right, tokenizer.decode(right.expected, skip_special_tokens=True), None, 0.1, tokenizer
        )
        assert all(value for value in result.values() if isinstance(value, bool))
        assert right.name == "caption" or result["codes"] == codes


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ("", {"text_equal", "ids_equal", "only_codes", "ended"}),
        ("{codes}", {"text_equal", "ids_equal", "ended"}),
        ("{codes} " + END, {"text_equal", "only_codes"}),
        ("apple{codes}" + END, {"text_equal", "only_codes"}),
        ("<|vis_00001|>{codes}" + END, {"text_equal", "ids_equal"}),
    ],
)
def test_wrong_answers(
    script: Any, asked: tuple[Path, list[int], list[Any]], answer: str, wrong: set[str]
) -> None:
    directory, codes, requests = asked
    text = answer.replace("{codes}", "".join(f"<|vis_{code:05d}|>" for code in codes))
    counted = len(requests[2].expected)
    result = script.judge(requests[2], text, counted, 0.1, AutoTokenizer.from_pretrained(directory))
    assert {name for name, value in result.items() if value is False} == wrong


def test_a_server_that_does_not_start(script: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such option'); raise SystemExit(3)"]
    with (
        pytest.raises(RuntimeError, match="no such option"),
        script.server(command, tmp_path, tmp_path / "log", seconds=30),
    ):
        pass

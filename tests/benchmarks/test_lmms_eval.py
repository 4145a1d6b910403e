"""The adapter for lmms-eval; without that package, with stand-ins for the names that it uses."""

from __future__ import annotations

import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lavit_lm import MultimodalLM


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    if find_spec("lmms_eval") is None:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        registry = ModuleType("lmms_eval.models.registry_v2")
        registry.ModelManifest = lambda name, **paths: SimpleNamespace(model_id=name, **paths)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, registry.__name__, registry)
        sys.modules["lmms_eval.api.model"].lmms = type("lmms", (), {"task_dict": {}})  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "lavit_lm.cli.lmms_eval", raising=False)
    import lavit_lm.cli.lmms_eval as adapter

    return adapter


def test_lmms_eval(adapter: Any, model: Path, photos: list[Path]) -> None:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    entry = pyproject["project"]["entry-points"]["lmms_eval.models"]["lavit_lm"]
    assert entry == "lavit_lm.cli.lmms_eval:manifest"
    assert adapter.manifest().simple_class_path == "lavit_lm.cli.lmms_eval.LavitLM"
    evaluated = adapter.LavitLM(str(model), batch_size="2")
    images = [Image.open(photo).convert("RGB") for photo in photos]
    evaluated.task_dict = {"task": {"test": [{"image": image} for image in images]}}
    options = [{"max_new_tokens": 5}, {"max_new_tokens": 3, "num_beams": 2}, {"until": ["a", "e"]}]
    requests = [
        SimpleNamespace(args=("<image>\nWhat?", how, lambda doc: [doc["image"]], i, "task", "test"))
        for i, how in enumerate([*options, options[0]])
    ]
    lm = MultimodalLM.from_pretrained(model, decoder=None)
    prompts = [[image, "What?"] for image in images]
    whole = lm.generate_text_batch(prompts, 5)
    found = evaluated.generate_until(requests)
    assert [found[0], found[3]] == [whole[0], whole[3]]
    assert found[1] == lm.generate_text_batch([prompts[1]], 3, num_beams=2)[0]
    assert "a" not in found[2] and "e" not in found[2]
    request = SimpleNamespace(args=("", "an apple", *requests[0].args[2:]))
    ((nats, greedy),) = evaluated.loglikelihood([request])
    assert nats == pytest.approx(float(lm.rank([images[0]], ["an apple"])[0])) and not greedy

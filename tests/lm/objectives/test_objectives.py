"""docs/objectives.md: the fifth objective it writes out is trained, saved, read and asked, by its
one file alone.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from helpers.lm_runs import SMALL, Losses, data, module, trainer

from lavit_lm import MultimodalLM
from lavit_lm.objectives import by_name
from lavit_tok import WeightsError

PAGE = Path(__file__).parents[3] / "docs" / "objectives.md"


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page's first block of Python as a file of its own."""
    first, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "counting.py").write_text(first)
    monkeypatch.syspath_prepend(str(tmp_path))
    import counting

    yield counting.Counting
    sys.modules.pop("counting")


def test_a_fifth_objective_is_one_file(folder: Path, counting, tmp_path: Path):
    wide = {**SMALL, "hidden_size": 64}
    training = module(folder, objective=counting(), out=str(tmp_path / "made"), lr=1e-2, lm=wide)
    output = Losses()
    trainer(tmp_path, 40, [output], num_sanity_val_steps=0, limit_val_batches=0).fit(
        training, data(folder)
    )
    assert output.values[-1] < 0.2 * output.values[0]
    with pytest.raises(WeightsError, match="objective 'counting' is not one of this library's"):
        MultimodalLM.from_pretrained(tmp_path / "made", decoder=None)
    lm = MultimodalLM.from_pretrained(tmp_path / "made", objective=counting(), decoder=None)
    image = folder / "pictures" / "train" / "0.png"
    assert lm.caption(str(image), 4).isdigit()
    with pytest.raises(ValueError, match="it generates no images"):
        lm.generate_codes("a cat")


def test_only_these_four_can_be_named():
    assert by_name("lavit").name == "lavit"
    with pytest.raises(KeyError):
        by_name("os")

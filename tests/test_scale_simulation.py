"""examples/scale: the simulation at its limits, where the result is known, and a measurement."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "examples/scale/simulation.py"
NEVER = ["--mtbf", "1e9", "--stragglers", "0", "--driver", "0", "--blocks", "20"]


def test_limits(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(PATH))

    def rate(workers: int, *args: str) -> tuple[float, int]:
        values: Any = script["arguments"]().parse_args([*NEVER, "--rate", "500", *args])
        return script["simulate"](workers, values)

    assert rate(1) == (pytest.approx(500, rel=0.01), 0)
    assert rate(64)[0] == pytest.approx(64 * 500, rel=0.05)
    assert rate(64, "--driver", "100")[0] == pytest.approx(10_000, rel=0.1)  # 1e6 / 100
    slow, failures = rate(64, "--mtbf", "0.05", "--restart", "600")
    assert failures > 10 and slow < 0.5 * 64 * 500
    assert rate(64, "--stragglers", "0.5")[0] < 0.6 * 64 * 500
    script["main"](script["arguments"]().parse_args([*NEVER, "--driver", "35"]))
    assert "knee: 32 workers" in capsys.readouterr().out


def test_cost_of_shards(capsys: pytest.CaptureFixture[str]) -> None:
    """Shards are written, and a second job finds them; what it prints are times."""
    runpy.run_path(str(PATH.with_name("measure.py")))["shards"]([3])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "ms each" in line)
    found = re.fullmatch(r"3 shards: ([\d.]+) ms each, resumed ([\d.]+) ms", line)
    assert found and float(found[2]) > 0 and 0 < float(found[1]) < 1000

"""Results as markdown and JSON."""

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.shared import provenance

MAX_REJECTS = 20


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [[cell(value) for value in row] for row in (headers, *rows)]
    lines.insert(1, ["---"] * len(headers))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    """Floats with four significant digits; None is a dash, a `spread` is mean ± deviation."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        deviation = f" ± {value['std']:.2g}" if value.get("seeds") != 1 else ""
        return cell(value["mean"]) + deviation
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "\\|")


def flat(values: dict[str, Any], group: str = "") -> list[tuple[str, Any]]:
    """Rows for `table` of a nested dict; lists are left out."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{group}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            rows += flat(value, f"{name}, ")
        elif not isinstance(value, list):
            rows.append((name, value))
    return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (n - 1) of one number over several seeds."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    std = float(numbers.std()) if len(numbers) > 1 else 0.0
    return {"mean": float(numbers.mean()), "std": std, "seeds": len(numbers)}


def spreads(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """`spread` of every number of several runs."""
    return {name: spread([run[name] for run in runs]) for name in runs[0]} if runs else {}


def rejected(rejects: Sequence[dict[str, str]]) -> str:
    """A markdown list of the images that could not be read; empty if there are none."""
    if not rejects:
        return ""
    lines = [f"- `{r['key']}`: {r['reason']}" for r in rejects[:MAX_REJECTS]]
    head = f"\n\n{len(rejects)} images could not be read and are in no number (all: JSON file):\n\n"
    return head + "\n".join(lines)


def write(name: str, args: Namespace, title: str, body: str, values: dict[str, Any]) -> None:
    """Print the result and write it, with the stamp of the run, as NAME.md and NAME.json."""
    stamp = provenance.stamp()
    versions = ", ".join(f"{k} {v}" for k, v in stamp["versions"].items())
    text = f"# {title}\n\n- command: `{stamp['command']}`\n- date: {stamp['date']}; commit: "
    text += f"{stamp['commit']}\n- hardware: {stamp['hardware']}\n- versions: {versions}\n\n"
    text += body.strip() + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text(text)
    (args.out / f"{name}.json").write_text(json.dumps({"stamp": stamp, **values}, indent=1) + "\n")
    print(text)

"""Our results beside the figures that others publish: one table, one plot of rFID against codes an image.

A result of reconstruction.py is drawn as a point only if an rFID was measured under the protocol of the published ones:
ImageNet-1k validation, all 50,000 pictures, 256x256 centre crops, Inception-v3, trained weights. Of the two resizings
the one without antialiasing is drawn, which is how the usual implementations resize. Every other result is listed with
its own label and the reasons why it cannot stand there. Writes compare.md, .json and .png.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import common

PUBLISHED = Path(__file__).parent / "published.json"


def read_results(paths: list[Path]) -> list[dict[str, Any]]:
    """What reconstruction.py wrote. Raises ValueError for a file that is something else."""
    found = []
    for path in paths:
        try:
            values = json.loads(path.read_text())
            pixels = values.get("pixels")
            kept = {key: values[key] for key in ("stamp", "set", "codes_per_image")}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path}: expected a result of reconstruction.py: {error!r}"
            ) from error
        weights = values.get("weights", "weights not named")
        name = f"{values.get('tokenizer', 'lavit-tok')} ({weights})"
        found.append({**kept, "name": name, "file": path.name, "pixels": pixels})
    return found


def distances_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The Frechet distances of one result, each with its full label; empty if no pictures were drawn."""
    pixels = result["pixels"] or {}
    if "distances" in pixels:
        return pixels["distances"]
    # Results written before distances were listed apart.
    summary = pixels.get("summary", {})
    return [
        {
            "name": name,
            "kind": "rFID" if name.startswith("rFID") else "Frechet",
            "antialias": None,
            "value": value,
        }
        for name, value in summary.items()
        if name.startswith(("rFID", "Frechet"))
    ]


def split(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows beside the published ones, rows that are only listed), one for each distance of each result."""
    beside, listed = [], []
    for result in results:
        pixels = result["pixels"] or {}
        reasons = pixels.get("against_published", ["its protocol was not recorded"])
        found = distances_of(result)
        if not found:
            listed.append(_row(result, None, ["no pictures were drawn"]))
        for distance in found:
            why = list(reasons)
            if distance["kind"] != "rFID":
                why.insert(0, "no rFID")
            elif distance["antialias"] is not False:
                why.insert(0, "antialias is not False")
            (listed if why else beside).append(_row(result, distance, why))
    return beside, listed


def _row(
    result: dict[str, Any], distance: dict[str, Any] | None, reasons: list[str]
) -> dict[str, Any]:
    pixels = result["pixels"] or {}
    return {
        "tokenizer": result["name"],
        "measure": distance["name"] if distance else "-",
        "value": distance["value"] if distance else None,
        "codes": pixels.get("codes_per_image", result["codes_per_image"]),
        "set": result["set"],
        "reasons": reasons,
        "source": f"{result['file']}, commit {result['stamp']['commit']}, {result['stamp']['date']}",
    }


def plot(published: list[dict[str, Any]], beside: list[dict[str, Any]], path: Path) -> None:
    plt = common.pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    labels = []
    for name in dict.fromkeys(p["tokenizer"] for p in published):
        own = sorted((p for p in published if p["tokenizer"] == name), key=lambda p: p["codes"])
        x, y = [p["codes"] for p in own], [p["rfid"] for p in own]
        style = {"markerfacecolor": "none"} if "note" in own[0] else {}
        axis.plot(
            x, y, marker="o", linestyle="-" if len(set(x)) > 1 else "none", color="0.5", **style
        )
        labels.append((x[-1], y[-1], name))
    for row in beside:
        mean, std = row["value"]["mean"], row["value"]["std"]
        axis.errorbar([row["codes"]], [mean], [std], marker="*", markersize=14, color="tab:red")
        labels.append((row["codes"], mean, row["tokenizer"]))
    for x, y, at, name in spaced(labels):
        line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.6}
        axis.annotate(name, (x, y), (x * 1.15, at), fontsize=8, va="center", arrowprops=line)
    axis.set(
        xscale="log", xlabel="codes an image, mean", ylabel="rFID, ImageNet-256 (lower is better)"
    )
    ticks = [32, 64, 128, 256, 512, 1024, 2048]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlim(right=4000)
    if not beside:
        axis.set_title(
            "published figures only: ours was not measured under their protocol", fontsize=9
        )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def spaced(
    labels: list[tuple[float, float, str]], gap: float = 0.2
) -> list[tuple[float, float, float, str]]:
    """(x, y, height of the label, name): labels of points at one x are moved up until they are `gap` apart."""
    found: list[tuple[float, float, float, str]] = []
    for x, y, name in sorted(labels):
        before = [at for other, _, at, _ in found if 0.8 < other / x < 1.25]
        found.append((x, y, max([y, *(at + gap for at in before if at > y - gap)]), name))
    return found


def main(arguments: Namespace) -> dict[str, Any]:
    published = json.loads(PUBLISHED.read_text())
    beside, listed = split(read_results(arguments.results))
    values = {**published, "ours_beside": beside, "ours_listed": listed}
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(published["figures"], beside, arguments.out / "compare.png")
    common.write("compare", arguments.out, "Beside published figures", text(values), values)
    return values


def source(figure: dict[str, Any]) -> str:
    return figure["paper"] + (f", arXiv:{figure['arxiv']}" if figure["arxiv"] else "")


def text(values: dict[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = [
        (
            f"**{r['tokenizer']}**",
            common.plus_minus(r["value"]),
            f"{r['codes']:.1f} on average",
            r["source"],
        )
        for r in values["ours_beside"]
    ]
    rows += [(f["tokenizer"], f["rfid"], f["tokens"], source(f)) for f in values["figures"]]
    rows += [(name, "none published", "-", "-") for name in values["none_published"]]
    body = f"{values['protocol']}.\n\n" + common.table(
        ("tokenizer", "rFID", "codes an image", "source"), rows
    )
    notes = {f["tokenizer"]: f["note"] for f in values["figures"] if "note" in f}
    body += "\n\n" + " ".join(f"{name}: {note}." for name, note in notes.items())
    body += "\n\n![rFID against codes an image](compare.png)"
    if not values["ours_beside"]:
        body += "\n\nNone of our results was measured under that protocol, so none is in the table or the plot."
    if values["ours_listed"]:
        lines = [
            (
                r["tokenizer"],
                r["measure"],
                common.plus_minus(r["value"]) if r["value"] else None,
                f"{r['codes']:.1f}",
                "; ".join(r["reasons"]),
                r["source"],
            )
            for r in values["ours_listed"]
        ]
        body += "\n\n## Ours, not comparable\n\n"
        body += common.table(
            ("tokenizer", "measure", "value", "codes an image", "why not above", "source"), lines
        )
    return body


def arguments() -> Any:
    found = common.parser(__doc__, data=False, tokenizer=False)
    found.add_argument(
        "--results",
        nargs="*",
        type=Path,
        default=[Path("results/reconstruction.json")],
        help="of reconstruction.py",
    )
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

"""Our results beside published figures: a table, and a plot of rFID against codes per image.

A result of reconstruction.py is in the table only if its rFID was measured under the published
protocol: ImageNet-1k validation, all 50,000 images, 256x256 center crops, Inception-v3 without
antialiasing, trained weights. Every other result is listed with its own label and the reasons.
Writes compare.md, .json and .png.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from benchmarks.shared import cli, plots, report

PUBLISHED = Path(__file__).parent / "published.json"
FIELDS = ("tokenizer", "measure", "value", "codes", "reasons", "source")


def read_results(paths: list[Path]) -> list[dict[str, Any]]:
    """One record for each distance of each result, with the reasons why it is not comparable.

    Raises:
        ValueError: a file that reconstruction.py did not write.
    """
    records = []
    for path in paths:
        try:
            values = json.loads(path.read_text())
            stamp, pixels = values["stamp"], values.get("pixels") or {}
            source = f"{path.name}, commit {stamp['commit']}, {stamp['date']}"
            codes = pixels.get("codes_per_image", values["codes_per_image"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            expected = "a result of reconstruction.py"
            raise ValueError(f"{path}: expected {expected}: {error!r}") from error
        tokenizer, weights = values.get("tokenizer", "lavit-tok"), values.get("weights", "unnamed")
        record = {"tokenizer": f"{tokenizer} ({weights})", "codes": codes, "source": source}
        known = pixels.get("against_published", ["its protocol was not recorded"])
        for distance in pixels.get("distances", ()):
            reasons = ["no rFID"] * (distance["kind"] != "rFID")
            if not reasons and distance["antialias"] is not False:
                reasons = ["antialias is not False"]
            found = {"measure": distance["name"], "value": distance["value"]}
            records.append({**record, **found, "reasons": reasons + known})
        if not pixels.get("distances"):
            reasons = ["no images were decoded"]
            records.append({**record, "measure": None, "value": None, "reasons": reasons})
    return records


def plot(published: list[dict[str, Any]], ours: list[dict[str, Any]], path: Path) -> None:
    """Published figures as circles, ours as red stars."""
    figure, axis = plots.pyplot().subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(p["tokenizer"] for p in published):
        points = sorted((p["codes"], p["rfid"]) for p in published if p["tokenizer"] == name)
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    for record in ours:
        axis.plot(record["codes"], record["value"]["mean"], "r*", label=record["tokenizer"])
    axis.set(xscale="log", xlabel="codes per image, mean", ylabel="rFID, ImageNet-256")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, ncols=2)
    plots.save(figure, path)


def main(args: Namespace) -> dict[str, Any]:
    published, records = json.loads(PUBLISHED.read_text()), read_results(args.results)
    comparable = [record for record in records if not record["reasons"]]
    listed = [record for record in records if record["reasons"]]
    plot(published["figures"], comparable, args.out / "compare.png")
    rows: list[tuple[Any, ...]]
    rows = [(f"**{r['tokenizer']}**", r["value"], r["codes"], r["source"]) for r in comparable]
    for figure in published["figures"]:
        source = figure["paper"] + (f", arXiv:{figure['arxiv']}" if figure["arxiv"] else "")
        rows.append((figure["tokenizer"], figure["rfid"], figure["tokens"], source))
    rows += [(name, "none published", "-", "-") for name in published["none_published"]]
    head = ("tokenizer", "rFID", "codes per image", "source")
    body = f"{published['protocol']}.\n\n{report.table(head, rows)}\n\n"
    notes = {f["tokenizer"]: f["note"] for f in published["figures"] if "note" in f}
    body += " ".join(f"{name}: {note}." for name, note in notes.items())
    body += "\n\n![rFID against codes per image](compare.png)\n\n## Ours, not comparable\n\n"
    if not comparable:
        body += "None of our results was measured under that protocol.\n\n"
    body += report.table(FIELDS, [[record[name] for name in FIELDS] for record in listed])
    values = {**published, "ours_comparable": comparable, "ours_listed": listed}
    report.write("compare", args, "Beside published figures", body, values)
    return values


def arguments() -> ArgumentParser:
    results = ([Path("results/reconstruction.json")], "results of reconstruction.py")
    return cli.parser(__doc__, data=False, results=results)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))

"""What reconstruction.py writes: tables, the curve's plot, the sheet of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
from PIL import Image
from reconstruction_parts import LEARNED, NORM, RANDOM
from torch import Tensor

from lavit_tok.visualize import sheet

PUBLISHED = Path(__file__).parent / "published.json"


def pairs_sheet(sources: Tensor, drawn: Tensor, pairs: int = 32, across: int = 8) -> Image.Image:
    """Source and drawn picture side by side, `across` pairs a line."""
    flat = [
        Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())
        for pair in zip(sources[:pairs], drawn[:pairs], strict=False)
        for x in pair
    ]
    return sheet(
        [flat[i : i + 2 * across] for i in range(0, len(flat), 2 * across)],
        ["source", "drawn"] * across,
    )


def summarised(found: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over images of every cosine."""
    names = [name for name in found if name not in ("values", "lengths")]
    values = {
        n: {"mean": float(found[n].mean()), "std": float(found[n].std(correction=0))} for n in names
    }
    return values | {"centred_floor_set_mean": {"mean": 0.0, "std": 0.0}}


def feature_text(values: dict[str, Any]) -> str:
    def row(label: str, plain: str, centred: str) -> tuple[str, str, str]:
        cells = [values["features"][name] for name in (plain, centred)]
        return label, *(f"{c['mean']:.4f} ± {c['std']:.4f}" for c in cells)

    rows = [
        row("reconstruct(encode(x))", "plain", "centred"),
        row(
            "floor: each image's own mean feature",
            "plain_floor_image_mean",
            "centred_floor_image_mean",
        ),
        row("floor: the data set's mean feature", "plain_floor_set_mean", "centred_floor_set_mean"),
    ]
    text = "## Features\n\n" + common.table(
        ("cosine with the encoder's features", "plain", "centred"), rows
    )
    return (
        text
        + f"\n\nMean over patches, then mean ± std over images. Mean feature over: {values['mean_feature_over']}."
    )


def curve_text(curve: dict[str, Any]) -> str:
    """One line for each way to choose patches and each budget."""
    pixels = curve.get("pixels") or [{}] * len(curve["features"])
    names = [n for n in pixels[0] if n not in ("method", "budget")]
    rows = []
    for feature, pixel in zip(curve["features"], pixels, strict=True):
        start = (
            feature["budget"] or "none",
            feature["method"],
            f"{feature['codes_per_image']:.2f}",
        )
        cells = [
            common.plus_minus(feature[n])
            if feature[n]["seeds"] > 1
            else f"{feature[n]['mean']:.4f}"
            for n in ("plain", "centred")
        ]
        rows.append((*start, *cells, *(common.plus_minus(pixel[n]) for n in names)))
    head = ("budget", "selection", "codes an image", "plain cosine", "centred cosine", *names)
    text = f"## Distortion against codes\n\n{curve['pictures']} pictures, the same for every line; ± over seeds.\n\n"
    return (
        text
        + common.table(head, rows)
        + "\n\n![distortion against mean codes](reconstruction_curve.png)"
    )


def plot(curve: dict[str, Any], path: Path) -> None:
    """Distortion falls from left to right: 1 - centred cosine, and the drawn pictures' error where there are any."""
    plt = common.pyplot()
    panels = [("1 - centred cosine", lambda f, p: (1 - f["centred"]["mean"], f["centred"]["std"]))]
    if curve.get("pixels"):
        panels.append(("PSNR, dB", lambda f, p: (p["psnr"]["mean"], p["psnr"]["std"])))
        panels.append(
            ("retrieval, top-1", lambda f, p: (p["retrieval"]["mean"], p["retrieval"]["std"]))
        )
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    lines = list(zip(curve["features"], curve.get("pixels") or curve["features"], strict=True))
    for axis, (name, value) in zip(axes[0], panels, strict=True):
        for method in (LEARNED, RANDOM, NORM):
            own = sorted(
                (x for x in lines if x[0]["method"] == method and x[0]["budget"]),
                key=lambda x: x[0]["budget"],
            )
            if own:
                x, y = [f["codes_per_image"] for f, _ in own], [value(f, p) for f, p in own]
                axis.errorbar(x, [m for m, _ in y], [s for _, s in y], marker="o", label=method)
        f, p = lines[0]
        axis.errorbar(
            [f["codes_per_image"]],
            *([v] for v in value(f, p)),
            marker="*",
            markersize=12,
            label="own decision",
        )
        axis.set(xlabel="codes an image, mean", ylabel=name)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pixel_text(pixels: dict[str, Any]) -> str:
    names = {
        "psnr": "PSNR, dB (data_range=1)",
        "ssim": "SSIM (data_range=1)",
        "lpips": "LPIPS (AlexNet)",
        "retrieval": f"retrieval, top-1 among {pixels['sources']} in 16x16 RGB (chance {1 / pixels['sources']:.4f})",
    }
    rows = [
        (names.get(name, name), common.plus_minus(value))
        for name, value in pixels["summary"].items()
    ]
    if "lpips" not in pixels["summary"]:
        rows.append(("LPIPS", "not measured: --lpips, with torchvision and its weights at hand"))
    if not any(d["kind"] == "rFID" for d in pixels["distances"]):
        rows.append(
            ("rFID", "not measured: --inception, with torch-fidelity's Inception-v3 weights")
        )
    text = "## Pixels\n\n" + common.table(
        ("measure", f"mean ± std over {pixels['seeds']} seeds"), rows
    )
    text += f"\n\n{pixels['pictures']} pictures"
    text += (
        f", {pixels['steps']} steps, guidance {pixels['guidance']:g}. "
        if "steps" in pixels
        else ". "
    )
    text += "The reference is the same crops.\n\n![pairs](reconstruction.png)\n\n## Published\n\n"
    text += (
        "rFID on ImageNet-256 by the authors' own account, of another protocol than this run's: "
    )
    text += (
        "; ".join(pixels["against_published"]) + ".\n\n"
        if pixels["against_published"]
        else "the same set and size.\n\n"
    )
    lines = [
        (p["tokenizer"], p["rfid"], p["tokens"])
        for p in json.loads(PUBLISHED.read_text())["figures"]
    ]
    return text + common.table(("tokenizer", "rFID", "tokens an image"), lines)

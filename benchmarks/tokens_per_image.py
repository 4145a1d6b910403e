"""How many codes does an image have, what do they cost in bits, and how is the codebook used?

For any tokenizer (shared/tokenizers.py); of ours, the selector alone decides. Writes
tokens_per_image.md, .json, a histogram .png, and ..._extremes.png: the images with the fewest and
with the most codes. A stopped run continues where it was.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import io
import math
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.shared import cli, datasets, plots, report, tokenizers
from benchmarks.shared.cache import Stages
from lavit_tok import VisualCodes
from lavit_tok.encode.image_files import open_image
from lavit_tok.training.codebook import usage
from lavit_tok.visualize import kept_overlay

PERCENTILES = (5, 25, 50, 75, 95)
MEASURED = (
    "codes_per_image",
    "bits_per_image",
    "keep_ratio",
    "spearman_with_jpeg_size",
    "codebook",
)


def main(args: Namespace) -> dict[str, Any]:
    tokenizer = tokenizers.load(args.tokenizer, args.device, args.image_size)
    size, crop = tokenizer.image_size, not args.squeeze
    images = datasets.load_images(args.data, size, args.split, args.limit, crop)
    stages = Stages(args, "tokens_per_image", tokenizer.identity, images.pixels)

    def encode(items: list[int]) -> dict[str, Tensor]:
        pixels = images.pixels[items]
        codes = tokenizer.encode(pixels)
        sizes = torch.tensor([jpeg_size(p, args.jpeg_quality) for p in pixels])
        masks = {} if codes.keep is None else {"keep": codes.keep}
        return {"values": codes.values, "lengths": codes.lengths, "jpeg": sizes, **masks}

    found = stages.tensors("encode", range(len(images)), args.batch_size, encode)
    keep, codebook_size = found.get("keep"), tokenizer.codebook_size
    codes = VisualCodes(found["values"], found["lengths"], keep, codebook_size)
    selects = isinstance(tokenizer, tokenizers.Lavit) and not tokenizer.tokenizer.nested
    rho = args.rho if selects else None
    values = statistics(codes, tokenizer.max_codes, codebook_size, rho, found["jpeg"].tolist())
    values |= {name: getattr(tokenizer, name) for name in ("weights", "image_size")}
    values |= {"tokenizer": tokenizer.name, "jpeg_quality": args.jpeg_quality, **images.record()}
    order = sorted(range(len(codes)), key=lambda i: int(codes.lengths[i]))
    count = min(args.extremes, max(1, len(codes) // 2))
    extremes = {"fewest": order[:count], "most": order[: -count - 1 : -1]}
    for name, indices in extremes.items():
        values[name] = [{"key": images.keys[i], "codes": int(codes.lengths[i])} for i in indices]
    body = text(values)
    groups = images.groups(list(range(len(images))))
    if groups:
        lengths = {name: codes.lengths[group].double() for name, group in groups.items()}
        rows = [(name, len(own), float(own.mean())) for name, own in lengths.items()]
        values["by_source"] = {name: {"images": n, "mean": mean} for name, n, mean in rows}
        body += "\n\n" + report.table(("source", "images", "codes per image, mean"), rows)
    body += report.rejected(images.rejects) + "\n\n![histogram](tokens_per_image.png)"
    plot(values, args.out / "tokens_per_image.png")
    side = round(tokenizer.max_codes**0.5)
    if keep is not None and side**2 == tokenizer.max_codes:
        shown = [i for indices in extremes.values() for i in indices]
        kept = [kept_overlay(images.pixels[i], keep[i], (side, side)) for i in shown]
        labels = [f"{codes.lengths[i]} codes" for i in shown]
        path = args.out / "tokens_per_image_extremes.png"
        plots.pairs(path, images.pixels[shown], kept, ("image", "kept patches"), labels)
        body += "\n\n![images with the fewest and the most codes](tokens_per_image_extremes.png)"
    report.write("tokens_per_image", args, "Codes per image", body, values)
    stages.done()
    return values


def jpeg_size(pixels: Tensor, quality: int) -> int:
    """Bytes of a uint8 [3 h w] image as JPEG (4:2:0, as Pillow writes by default)."""
    target = io.BytesIO()
    open_image(pixels).save(target, "JPEG", quality=quality)
    return target.tell()


def rank_correlation(first: Any, second: Any) -> float | None:
    """Spearman's rho; None where one side does not vary, so that nothing can be correlated."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def statistics(
    codes: VisualCodes, patches: int, codebook_size: int, rho: float | None, jpeg: list[int]
) -> dict[str, Any]:
    """Everything that is reported, from the codes alone and the images' JPEG sizes."""
    counts, used = codes.lengths.double(), usage(codes.values, codebook_size)
    ratios = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    quantiles = dict(zip(PERCENTILES, torch.quantile(counts, ratios).tolist(), strict=True))
    mean, bits = float(counts.mean()), math.log2(codebook_size)
    difference = None if rho is None else mean / patches - rho
    return {
        "images": len(codes),
        "patches": patches,
        "codes_per_image": {
            "mean": mean,
            "std": float(counts.std(correction=0)),
            "min": int(counts.min()),
            **{f"p{percent}": value for percent, value in quantiles.items()},
            "max": int(counts.max()),
        },
        "bits_per_image": {"mean": mean * bits, "bits_per_code": bits},
        "keep_ratio": {"measured": mean / patches, "rho": rho, "difference": difference},
        "spearman_with_jpeg_size": rank_correlation(codes.lengths.tolist(), jpeg),
        "codebook": {
            "size": codebook_size,
            "codes": len(codes.values),
            "used_percent": 100 * used.used,
            "perplexity": used.perplexity,
            "perplexity_percent": 100 * used.perplexity / codebook_size,
            "unigram_entropy_bits": used.entropy_bits,
        },
        "histogram": torch.bincount(codes.lengths, minlength=patches + 1).tolist(),
    }


def text(values: dict[str, Any]) -> str:
    head = f"{values['tokenizer']} ({values['weights']}). {values['set']}."
    if values["weights"] == tokenizers.RANDOM:
        head += " **Random weights**: codebook use means nothing."
    measured = {k: v for k, v in values.items() if k in MEASURED}
    return head + "\n\n" + report.table(("measure", "value"), report.flat(measured))


def plot(values: dict[str, Any], path: Path) -> None:
    figure, axes = plots.pyplot().subplots(figsize=(6, 3.2), layout="constrained")
    counts = values["histogram"]
    axes.bar(range(len(counts)), counts, width=1.0)
    axes.axvline(values["codes_per_image"]["mean"], color="black", linestyle="--", label="mean")
    axes.set(xlabel=f"codes per image (of {values['patches']} patches)", ylabel="images")
    axes.legend()
    plots.save(figure, path)


def arguments() -> ArgumentParser:
    return cli.parser(
        __doc__,
        **tokenizers.OPTIONS,
        rho=(1 / 3, "the keep ratio that training aimed at"),
        jpeg_quality=(90, "of the JPEG files whose size is compared"),
        extremes=(12, "images with the fewest, and with the most codes, that are shown"),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))

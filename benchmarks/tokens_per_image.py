"""How many codes does a picture get, what do they cost in bits, and how is the codebook used?

For any tokenizer (see adapters.py); of ours, the selector alone decides (budget None). Writes tokens_per_image.md and
.json, a histogram tokens_per_image.png, and tokens_per_image_extremes.png: the pictures with the fewest and with the
most codes, each with its kept patches. A run that was killed goes on where it was.
"""

from __future__ import annotations

import io
import math
from argparse import Namespace
from functools import partial
from typing import Any

import adapters
import common
import picture_sets
import torch
from parts import Parts, joined, pixels_digest, progress
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from lavit_tok import VisualCodes
from lavit_tok.training.codebook import usage
from lavit_tok.visualize import kept_overlay, sheet

PERCENTILES = (5, 25, 50, 75, 95)


def jpeg_size(pixels: Tensor, quality: int) -> int:
    """Bytes of a uint8 [3 h w] picture as JPEG (4:2:0, as Pillow does by default)."""
    target = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(target, "JPEG", quality=quality)
    return target.tell()


def rank_correlation(first: Any, second: Any) -> float | None:
    """Spearman's rho; None where one side does not vary, so that there is nothing to correlate."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def statistics(
    codes: VisualCodes, patches: int, codebook_size: int, rho: float | None, jpeg: list[int]
) -> dict[str, Any]:
    """Everything this benchmark reports, from the codes alone and the pictures' JPEG sizes."""
    counts = codes.lengths.double()
    quantiles = torch.quantile(
        counts, torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    ).tolist()
    used = usage(codes.values, codebook_size)
    bits = counts * math.log2(codebook_size)
    keep = float(counts.mean()) / patches
    return {
        "images": len(codes),
        "patches": patches,
        "codes_per_image": {
            "mean": float(counts.mean()),
            "std": float(counts.std(correction=0)),
            "min": int(counts.min()),
            **{f"p{percent}": value for percent, value in zip(PERCENTILES, quantiles, strict=True)},
            "max": int(counts.max()),
        },
        "bits_per_image": {"mean": float(bits.mean()), "bits_per_code": math.log2(codebook_size)},
        "keep_ratio": {
            "measured": keep,
            "rho": rho,
            "difference": None if rho is None else keep - rho,
        },
        "spearman_with_jpeg_size": rank_correlation(codes.lengths.tolist(), jpeg),
        "codebook": {
            "size": codebook_size,
            "codes_seen": len(codes.values),
            "used_percent": 100 * used.used,
            "perplexity": used.perplexity,
            "perplexity_percent": 100 * used.perplexity / codebook_size,
            "unigram_entropy_bits": used.entropy_bits,
        },
        "histogram": torch.bincount(codes.lengths, minlength=patches + 1).tolist(),
    }


def histogram(values: dict[str, Any], path: Any) -> None:
    plt = common.pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    counts = values["histogram"]
    axes.bar(range(len(counts)), counts, width=1.0)
    axes.axvline(values["codes_per_image"]["mean"], color="black", linestyle="--", label="mean")
    axes.set(
        xlabel=f"codes an image (of {values['patches']} patches)",
        ylabel="images",
        xlim=(0, len(counts)),
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def text_histogram(counts: list[int], bins: int = 16, width: int = 40) -> str:
    """The histogram for readers of the text file: one line a bin of code counts."""
    step = max(1, math.ceil((len(counts) - 1) / bins))
    sums = [(low, min(low + step - 1, len(counts) - 1)) for low in range(1, len(counts), step)]
    totals = [sum(counts[low : high + 1]) for low, high in sums]
    top = max(1, *totals)
    label = [f"{low}" if low == high else f"{low}-{high}" for low, high in sums]
    lines = [
        f"{n:>9} {t:>6} {'#' * round(width * t / top)}" for n, t in zip(label, totals, strict=True)
    ]
    return "```\n" + "\n".join(lines) + "\n```"


def extremes(codes: VisualCodes, count: int) -> tuple[list[int], list[int]]:
    """Places of the pictures with the fewest and with the most codes; of equals, the earlier ones."""
    lengths = codes.lengths.tolist()
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    most = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = min(count, max(1, len(lengths) // 2))
    return order[:count], most[:count]


def contact_sheet(
    pixels: Tensor, codes: VisualCodes, count: int, grid: tuple[int, int]
) -> Image.Image:
    """Two double rows: pictures with the fewest codes and their kept patches, then those with the most."""
    assert codes.keep is not None
    rows, labels = [], []
    for name, places in zip(("fewest", "most"), extremes(codes, count), strict=True):
        shown = [Image.fromarray(pixels[i].permute(1, 2, 0).contiguous().numpy()) for i in places]
        side = max(64, shown[0].width)  # so that labels can be read under small pictures
        kept = [
            kept_overlay(image, codes.keep[i], grid) for image, i in zip(shown, places, strict=True)
        ]
        rows += [
            [image.resize((side, side), Image.Resampling.NEAREST) for image in line]
            for line in (shown, kept)
        ]
        labels += [[f"{name}: {int(codes.lengths[i])}" for i in places], [""] * len(places)]
    return sheet(rows, labels=labels)


def main(arguments: Namespace) -> dict[str, Any]:
    a = arguments
    tokenizer = adapters.load(a.tokenizer, a.device, a.image_size)
    pictures = picture_sets.load_pictures(
        a.data, tokenizer.image_size, a.split, a.limit, not a.squeeze
    )
    rho = a.rho if isinstance(tokenizer, adapters.Lavit) else None
    settings = {
        "script": "tokens_per_image",
        "tokenizer": tokenizer.identity,
        "pixels": pixels_digest(pictures.pixels),
        "batch_size": a.batch_size,
        "jpeg_quality": a.jpeg_quality,
        "where": common.provenance("tokens_per_image"),
    }
    parts = Parts(a.out, "tokens_per_image", settings)

    def part(images: Tensor) -> dict[str, Tensor]:
        codes = tokenizer.encode(images)
        sizes = torch.tensor([jpeg_size(p, a.jpeg_quality) for p in images])
        masks = {} if codes.keep is None else {"keep": codes.keep}
        return {"values": codes.values, "lengths": codes.lengths, "jpeg": sizes, **masks}

    batches = progress(list(pictures.batches(a.batch_size)), "encode")
    found = joined(
        [parts.tensors(f"codes-{i:05}", partial(part, images)) for i, images in enumerate(batches)]
    )
    codes = VisualCodes(
        found["values"], found["lengths"], found.get("keep"), tokenizer.codebook_size
    )
    jpeg = found["jpeg"].tolist()
    values = statistics(codes, tokenizer.most_codes, tokenizer.codebook_size, rho, jpeg)
    values |= {
        "tokenizer": tokenizer.name,
        "weights": tokenizer.weights,
        "image_size": tokenizer.image_size,
    }
    values |= {**pictures.record(), "jpeg_quality": a.jpeg_quality}
    few, many = extremes(codes, a.extremes)
    for name, places in (("fewest", few), ("most", many)):
        values[name] = [
            {"key": common.short(pictures.keys[i]), "codes": int(codes.lengths[i])} for i in places
        ]

    body = text(values)
    if pictures.groups:
        groups = by_group(codes, pictures.groups, values)
        body += "\n\n" + common.table(("source", "images", "codes an image, mean"), groups)
    body += common.rejected(pictures.rejects)
    body += "\n\n![histogram](tokens_per_image.png)\n\n" + text_histogram(values["histogram"])
    a.out.mkdir(parents=True, exist_ok=True)
    histogram(values, a.out / "tokens_per_image.png")
    side = round(tokenizer.most_codes**0.5)
    if codes.keep is not None and side**2 == tokenizer.most_codes:
        contact_sheet(pictures.pixels, codes, a.extremes, (side, side)).save(
            a.out / "tokens_per_image_extremes.png"
        )
        body += (
            "\n\n![the pictures with the fewest and with the most codes, and their kept patches]"
        )
        body += "(tokens_per_image_extremes.png)"
    common.write("tokens_per_image", a.out, "Codes an image", body, values)
    parts.done()
    return values


def text(values: dict[str, Any]) -> str:
    counts, book, keep = values["codes_per_image"], values["codebook"], values["keep_ratio"]
    order = [k for k in counts if k not in ("mean", "std")]
    rows = [
        ("codes an image, mean ± std", f"{counts['mean']:.2f} ± {counts['std']:.2f}"),
        (f"codes an image, {' / '.join(order)}", " / ".join(f"{counts[k]:g}" for k in order)),
        (
            "bits an image, mean",
            f"{values['bits_per_image']['mean']:.1f} (codes x log2 {book['size']})",
        ),
    ]
    if keep["rho"] is not None:
        ratio = (
            f"{keep['measured']:.4f}, rho {keep['rho']:.4f}, difference {keep['difference']:+.4f}"
        )
        rows.append(("keep ratio", ratio))
    quality = values["jpeg_quality"]
    rows += [
        (
            f"Spearman, code count with JPEG size (quality {quality})",
            values["spearman_with_jpeg_size"],
        ),
        (
            "codebook rows in use",
            f"{book['used_percent']:.1f} % of {book['size']}, by {book['codes_seen']} codes",
        ),
        (
            "codebook perplexity",
            f"{book['perplexity']:.1f} ({book['perplexity_percent']:.1f} % of K)",
        ),
        ("unigram entropy, bits a code", book["unigram_entropy_bits"]),
    ]
    head = f"{values['tokenizer']} ({values['weights']}). {values['set']}."
    if values["weights"] == adapters.RANDOM:
        head += " **Random weights**: counts and bits are the model's own, what concerns the codebook means nothing."
    return head + "\n\n" + common.table(("measure", "value"), rows)


def by_group(
    codes: VisualCodes, groups: list[str], values: dict[str, Any]
) -> list[tuple[str, int, float]]:
    """Mean code count of each source of a mixed set; also put into `values`."""
    rows = []
    for name in picture_sets.count_groups(groups):
        lengths = codes.lengths[torch.tensor([g == name for g in groups])]
        rows.append((name, len(lengths), float(lengths.double().mean())))
    values["by_source"] = {name: {"images": n, "mean": mean} for name, n, mean in rows}
    return rows


def arguments() -> Any:
    found = common.parser(__doc__)
    found.add_argument(
        "--rho", type=float, default=1 / 3, help="the keep ratio that training aimed at"
    )
    found.add_argument("--jpeg-quality", type=int, default=90)
    found.add_argument(
        "--extremes", type=common.positive, default=12, help="pictures a row of the contact sheet"
    )
    common.any_tokenizer(found)
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

"""How many codes does a picture get, what do they cost in bits, and how is the codebook used?

Writes tokens_per_image.md, .json and a histogram .png. Budget None: the selector alone decides.
"""

from __future__ import annotations

import io
import math
from argparse import Namespace
from typing import Any

import common
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from lavit_tok import VisualCodes
from lavit_tok.quantizer import usage


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


def statistics(codes: VisualCodes, patches: int, codebook_size: int, rho: float, jpeg: list[int]) -> dict[str, Any]:
    """Everything this benchmark reports, from the codes alone and the pictures' JPEG sizes."""
    counts = codes.lengths.double()
    quantiles = torch.quantile(counts, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
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
            "p5": quantiles[0],
            "p50": quantiles[1],
            "p95": quantiles[2],
            "max": int(counts.max()),
        },
        "bits_per_image": {"mean": float(bits.mean()), "bits_per_code": math.log2(codebook_size)},
        "keep_ratio": {"measured": keep, "rho": rho, "difference": keep - rho},
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
    axes.set(xlabel=f"codes an image (of {values['patches']} patches)", ylabel="images", xlim=(0, len(counts)))
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
    lines = [f"{n:>9} {t:>6} {'#' * round(width * t / top)}" for n, t in zip(label, totals, strict=True)]
    return "```\n" + "\n".join(lines) + "\n```"


def main(arguments: Namespace) -> dict[str, Any]:
    tokenizer = common.load_tokenizer(arguments)
    config = tokenizer.config
    pictures = common.load_pictures(arguments.data, config.image_size, arguments.split, arguments.limit)
    codes = VisualCodes.cat([tokenizer.encode(batch).to("cpu") for batch in pictures.batches(arguments.batch_size)])
    jpeg = [jpeg_size(p, arguments.jpeg_quality) for p in pictures.pixels]
    values = statistics(codes, config.num_patches, config.codebook_size, arguments.rho, jpeg)
    values |= {"set": pictures.describe(), "jpeg_quality": arguments.jpeg_quality}

    counts, book, keep = values["codes_per_image"], values["codebook"], values["keep_ratio"]
    rows = [
        ("codes an image, mean ± std", f"{counts['mean']:.2f} ± {counts['std']:.2f}"),
        ("codes an image, min / p5 / p50 / p95 / max", " / ".join(f"{counts[k]:g}" for k in list(counts)[2:])),
        ("bits an image, mean", f"{values['bits_per_image']['mean']:.1f} (codes x log2 {book['size']})"),
        ("keep ratio", f"{keep['measured']:.4f}, rho {keep['rho']:.4f}, difference {keep['difference']:+.4f}"),
        (f"Spearman, code count with JPEG size (quality {arguments.jpeg_quality})", values["spearman_with_jpeg_size"]),
        ("codebook rows in use", f"{book['used_percent']:.1f} % of {book['size']}, by {book['codes_seen']} codes"),
        ("codebook perplexity", f"{book['perplexity']:.1f} ({book['perplexity_percent']:.1f} % of K)"),
        ("unigram entropy, bits a code", book["unigram_entropy_bits"]),
    ]
    body = pictures.describe() + "\n\n" + common.table(("measure", "value"), rows)
    if pictures.groups:
        body += "\n\n" + common.table(
            ("source", "images", "codes an image, mean"), by_group(codes, pictures.groups, values)
        )
    body += "\n\n![histogram](tokens_per_image.png)\n\n" + text_histogram(values["histogram"])
    common.write("tokens_per_image", arguments.out, "Codes an image", body, values)
    histogram(values, arguments.out / "tokens_per_image.png")
    return values


def by_group(codes: VisualCodes, groups: list[str], values: dict[str, Any]) -> list[tuple[str, int, float]]:
    """Mean code count of each source of a mixed set; also put into `values`."""
    rows = []
    for name in common.count_groups(groups):
        lengths = codes.lengths[torch.tensor([g == name for g in groups])]
        rows.append((name, len(lengths), float(lengths.double().mean())))
    values["by_source"] = {name: {"images": n, "mean": mean} for name, n, mean in rows}
    return rows


def arguments() -> Any:
    found = common.parser(__doc__)
    found.add_argument("--rho", type=float, default=1 / 3, help="the keep ratio that training aimed at")
    found.add_argument("--jpeg-quality", type=int, default=90)
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

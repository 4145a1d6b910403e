"""What lm_quality.py writes: tables of ranks and bits, and sixteen captions with true and generated pictures."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import common
from PIL import Image as Picture
from torch import Tensor

from lavit_tok.visualize import sheet

TIMES_CHANCE, BITS_BELOW = 5, 0.15
"""The aims: top-5 over chance, and bits a code below the unigram entropy."""
SHOWN = 16


def text(v: dict[str, Any], a: Namespace) -> str:
    body = f"{v['set']}. Model {v['model']}, {v['parameters'] / 1e6:.1f} M weights; {json.dumps(v['sampling'])}.\n\n"
    if v["keys"]:
        body += f"{len(v['keys'])} different captions by seed {v['seed']}, one picture each; {v['seen_in_training']} "
        body += "of the captions stand in the train split too.\n\n"
    if "images" in v:
        body += images_text(v["images"], a) + "\n\n"
    if "captions" in v:
        body += captions_text(v, v["captions"]) + "\n\n"
    return body + (bits_text(v["bits"]) if "bits" in v else "")


def images_text(v: dict[str, Any], a: Namespace) -> str:
    def row(label: str, found: dict[str, Any] | None) -> tuple[str, ...]:
        if found is None:
            return label, "-", "-"
        cells = [found[k] for k in ("top1", "top5")]
        return label, *(common.plus_minus(c) if isinstance(c, dict) else f"{c:.4g}" for c in cells)

    rows = [
        row("generated pictures", v["generated"]),
        row("those of captions that are not in train", v["generated_unseen"]),
        row("ceiling: drawn from the true picture's codes", v["from_own_codes"]),
        row("ceiling: true pictures", v["true"]),
        row("chance", v["chance"]),
    ]
    body = f"## Text to image\n\nOwn caption among the nearest of {v['captions']}, by the teacher's space; mean ± std "
    body += f"over {a.seeds} seeds. Aim: top-5 at least {TIMES_CHANCE} x chance; it is {v['times_chance']:.2f} x.\n\n"
    body += common.table(("pictures", "top-1", "top-5"), rows)
    counts = v["codes_per_image"]
    body += f"\n\nCodes a picture: {common.plus_minus(counts['generated'])} generated, {counts['true']:.4g} true.\n\n"
    return (
        body
        + f"![true and generated pictures of {min(SHOWN, v['captions'])} captions]({a.name}.png)"
    )


def captions_text(all_values: dict[str, Any], v: dict[str, Any]) -> str:
    def row(label: str, found: dict[str, Any]) -> tuple[Any, ...]:
        unseen = found.get("unseen") or {}
        return label, found["top1"], found["top5"], *(unseen.get(k) for k in ("top1", "top5"))

    rows = [
        row("the picture, by the teacher's space", v["picture_by_scorer"]),
        row("the true caption, by sentence similarity", v["true_caption_by_sentence_similarity"]),
        row("ceiling: the picture by its true caption", v["ceiling_picture_by_true_caption"]),
        row("chance", v["chance"]),
    ]
    body = f"## Image to text\n\nWhat a generated caption identifies among {v['captions']}. Aim: top-5 at least "
    body += f"{TIMES_CHANCE} x chance; it is {v['times_chance']:.2f} x (the picture, by the teacher's space).\n\n"
    body += common.table(
        ("by the generated caption", "top-1", "top-5", "top-1, not in train", "top-5"), rows
    )
    body += f"\n\nExactly the true caption: {100 * v['exact']:.1f} %; mean similarity to it "
    body += (
        f"{v['similarity_to_true_caption']:.3f}; {v['different']} different captions were said.\n\n"
    )
    lines = list(zip(all_values["keys"], all_values["true_captions"], v["said"], strict=True))[
        :SHOWN
    ]
    return body + common.table(
        ("picture", "true caption", "generated caption"), [map(cell, line) for line in lines]
    )


def cell(text: str) -> str:
    """Text that fits into a cell of a markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def bits_text(v: dict[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = [
        (
            f"model, {name}",
            f"{v[name]['bits_per_code']:.3f}",
            f"{100 * v[name]['below_unigram']:.1f} %",
            f"{v[name]['bits_per_code_with_end']:.3f}",
        )
        for name in ("given the caption", "without it")
    ]
    rows.append(("unigram entropy of these codes", f"{v['unigram_entropy']:.3f}", "-", "-"))
    body = f"## Bits a code\n\n{v['codes']} codes of {v['images']} pictures, true codes before each. Aim: at least "
    body += f"{100 * BITS_BELOW:.0f} % below the unigram entropy, which is what the best model of single codes needs; "
    body += "of few codes (--limit, or a source) it comes out too low.\n\n"
    body += common.table(("", "bits a code", "below unigram", "with the image's end"), rows)
    if "by_source" in v:
        rows = [
            (
                n,
                s["codes"],
                *(f"{s[k]:.3f}" for k in ("given the caption", "without it", "unigram_entropy")),
            )
            for n, s in v["by_source"].items()
        ]
        body += "\n\n" + common.table(
            ("source", "codes", "given the caption", "without it", "unigram, of the source"), rows
        )
    return body


def contact_sheet(
    true: Tensor, made: Tensor, captions: Sequence[str], across: int = 4
) -> Picture.Image:
    """True and generated picture side by side, twice their size, `across` pairs a line, captions under them."""

    def large(pixels: Tensor) -> Picture.Image:
        image = Picture.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        return image.resize((2 * image.width, 2 * image.height), Picture.Resampling.NEAREST)

    flat = [large(x) for pair in zip(true, made, strict=True) for x in pair]
    labels = [label for caption in captions for label in (caption, "")]
    rows = range(0, len(flat), 2 * across)
    return sheet(
        [flat[i : i + 2 * across] for i in rows],
        ["true", "generated"] * across,
        [labels[i : i + 2 * across] for i in rows],
    )

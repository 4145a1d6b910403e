"""How many codes change when released weights are read with strict instead of compat attention?

    changed = share of the kept tokens whose code differs        (the keep mask is the same: no attention decides it)
    shift   = |z_strict - z_compat| of a token, z of unit norm in code space

The formulas part where scores are large: --query-scale multiplies the merger's queries, and so all scores, which shows
how far a model is from trouble. Pictures come from --data, or, without it, are noise. Writes strict_vs_compat.md and
.json.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

import common
import picture_sets
import torch

from lavit_tok import VisualTokenizer
from lavit_tok.checkpoints.released.loader import load_released

SHIFTS = ("shift", "largest_shift")


def open_tokenizer(arguments: Namespace) -> VisualTokenizer:
    if arguments.release is None:
        return common.load_tokenizer(arguments)
    options = {"num_heads": arguments.num_heads, "device": arguments.device, "continuous": False}
    return load_released(arguments.release, **options)[0]


def batches(arguments: Namespace, tokenizer: VisualTokenizer) -> tuple[Any, str]:
    size = tokenizer.config.image_size
    if arguments.data is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(
            256, (arguments.limit or 64, 3, size, size), generator=generator, dtype=torch.uint8
        )
        return noise.split(arguments.batch_size), f"{len(noise)} pictures of noise"
    pictures = picture_sets.load_pictures(arguments.data, size, arguments.split, arguments.limit)
    return pictures.batches(arguments.batch_size), pictures.describe()


@torch.no_grad()
def compare(tokenizer: VisualTokenizer, arguments: Namespace, scale: float) -> dict[str, float]:
    """Both formulas over all pictures, the merger's queries multiplied by `scale`."""
    merger = copy.deepcopy(tokenizer.merger)
    for block in merger.blocks:
        for attention in (block.self_attention, block.cross_attention):
            attention.query.weight *= scale
            attention.query.bias *= scale
    shifts, tokens, changed, kept, patches = [], 0, 0, 0, 0
    for images in batches(arguments, tokenizer)[0]:
        features = tokenizer.features(tokenizer.preprocess(images))
        keep = tokenizer.select(tokenizer.score(features))
        z, codes = {}, {}
        for formula in ("strict", "compat"):
            merger.formula = formula
            z[formula] = tokenizer.project(merger(features, keep))
            codes[formula] = tokenizer.quantize(z[formula], keep.sum(1)).values
        tokens, changed = (
            tokens + len(z["strict"]),
            changed + int((codes["strict"] != codes["compat"]).sum()),
        )
        kept, patches = kept + int(keep.sum()), patches + keep.numel()
        shifts.append((z["strict"] - z["compat"]).norm(dim=1))
    shift = torch.cat(shifts)
    found = {
        "query_scale": scale,
        "tokens": tokens,
        "kept_share": kept / patches,
        "changed": changed / tokens,
    }
    return {**found, "shift": float(shift.mean()), "largest_shift": float(shift.max())}


def main(arguments: Namespace) -> dict[str, Any]:
    tokenizer = open_tokenizer(arguments)
    runs = [compare(tokenizer, arguments, scale) for scale in arguments.query_scale]
    values = {"pictures": batches(arguments, tokenizer)[1], "runs": runs}
    head = ("queries times", "tokens", "kept", "codes that change", "mean shift", "largest shift")
    rows = []
    for r in runs:
        shares = (f"{r['kept_share']:.3f}", f"{r['changed']:.4f}")
        rows.append((r["query_scale"], r["tokens"], *shares, *(f"{r[k]:.1e}" for k in SHIFTS)))
    body = f"{values['pictures']}.\n\n" + common.table(head, rows)
    common.write("strict_vs_compat", arguments.out, "Strict against compat attention", body, values)
    return values


def arguments() -> Any:
    found = common.parser(__doc__, data=False)
    found.add_argument(
        "--release", help="directory of released LaVIT files; --tokenizer is used without it"
    )
    found.add_argument(
        "--num-heads", type=int, help="attention heads of the release, if not as published"
    )
    found.add_argument(
        "--data", help="image folder, parquet or arrow path, or Hub name; noise if not given"
    )
    found.add_argument("--split", help="test, else validation, else the first, if not given")
    found.add_argument("--limit", type=int, help="at most this many pictures, evenly spaced")
    found.add_argument(
        "--query-scale",
        type=float,
        nargs="+",
        default=[1.0],
        help="factors of the merger's queries",
    )
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

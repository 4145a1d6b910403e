"""How many codes change when released weights are read with strict instead of compat attention?

    changed = share of the kept tokens whose code differs        (the keep mask is the same: no attention decides it)
    shift   = mean over tokens of |z_strict - z_compat|, z of unit norm in code space

Pictures come from --data, or, without it, are noise: then the numbers say that the script works and no more. Writes
strict_vs_compat.md and .json.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import common
import torch
from torch import Tensor

from lavit_tok import VisualTokenizer
from lavit_tok.released import load_released


def open_tokenizer(arguments: Namespace) -> VisualTokenizer:
    if arguments.release is None:
        return common.load_tokenizer(arguments)
    options = {"num_heads": arguments.num_heads, "device": arguments.device, "continuous": False}
    return load_released(arguments.release, **options)[0]


def batches(arguments: Namespace, tokenizer: VisualTokenizer) -> tuple[Any, str]:
    size = tokenizer.config.image_size
    if arguments.data is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (arguments.limit or 64, 3, size, size), generator=generator, dtype=torch.uint8)
        return noise.split(arguments.batch_size), f"{len(noise)} pictures of noise"
    pictures = common.load_pictures(arguments.data, size, arguments.split, arguments.limit)
    return pictures.batches(arguments.batch_size), pictures.describe()


@torch.no_grad()
def main(arguments: Namespace) -> dict[str, Any]:
    tokenizer = open_tokenizer(arguments)
    tokens = changed = kept_share = count = 0.0
    shifts: list[Tensor] = []
    found, what = batches(arguments, tokenizer)
    for images in found:
        features = tokenizer.features(tokenizer.preprocess(images))
        keep = tokenizer.select(tokenizer.score(features))
        z, codes = {}, {}
        for formula in ("strict", "compat"):
            tokenizer.merger.formula = formula
            z[formula] = tokenizer.project(tokenizer.merge(features, keep))
            codes[formula] = tokenizer.quantize(z[formula], keep.sum(1)).values
        tokens += len(codes["strict"])
        changed += float((codes["strict"] != codes["compat"]).sum())
        shifts.append((z["strict"] - z["compat"]).norm(dim=1))
        kept_share += float(keep.double().mean()) * len(keep)
        count += len(keep)
    values = {
        "pictures": what,
        "tokens": int(tokens),
        "kept_share": kept_share / count,
        "changed": changed / tokens,
        "shift": float(torch.cat(shifts).mean()),
        "largest_shift": float(torch.cat(shifts).max()),
    }
    head = ("tokens", "kept", "codes that change", "mean shift", "largest shift")
    keys = ("kept_share", "changed", "shift", "largest_shift")
    body = f"{what}.\n\n" + common.table(head, [(values["tokens"], *(f"{values[k]:.4f}" for k in keys))])
    common.write("strict_vs_compat", arguments.out, "Strict against compat attention", body, values)
    return values


def arguments() -> Any:
    found = common.parser(__doc__, data=False)
    found.add_argument("--release", help="directory of released LaVIT files; --tokenizer is used without it")
    found.add_argument("--num-heads", type=int, help="attention heads of the release, if not as published")
    found.add_argument("--data", help="image folder, parquet or arrow path, or Hub name; noise if not given")
    found.add_argument("--split", help="test, else validation, else the first, if not given")
    found.add_argument("--limit", type=int, help="at most this many pictures, evenly spaced")
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

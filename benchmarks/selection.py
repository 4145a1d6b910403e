"""Is the learned selection worth having? It, random, evenly spread and largest-norm selection at the same budgets.

All spend the same number of codes on every image and use the same trained merger, codebook and reconstructor, so that
only the choice of patches differs. The even pattern is the one that a tokenizer with `dither` adds to its scores.
Distortion is the feature cosine, plain and centred (see metrics.py).
Two more curves show the learned scores spent across a batch, and the selector's own decision without a budget.
Writes selection.md, .json and the curve selection.png.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import common
import picture_sets
import torch
from metrics import feature_mean, plain_and_centred
from torch import Tensor

from lavit_tok import VisualTokenizer
from lavit_tok.encode.allocation import Budget, keep_by_budget, ordered_noise
from lavit_tok.encode.selector import keep_scores

LEARNED, ACROSS, OWN = "learned", "learned, across the batch", "learned, no budget"
NORM, EVEN, RANDOM = "top norm", "even pattern", "random"


def selections(
    features: Tensor, scores: Tensor, budgets: list[int], generators: list[torch.Generator]
) -> Iterator[tuple[str, int | None, int, Tensor]]:
    """(method, budget, seed, keep mask [b n]) of one batch."""
    patches = scores.shape[1]

    def keep(by: Tensor, budget: Budget) -> Tensor:
        return keep_by_budget(by, budget)

    yield OWN, None, 0, keep(scores, None)
    for budget in budgets:
        yield LEARNED, budget, 0, keep(scores, budget)
        yield ACROSS, budget, 0, keep(scores, budget / patches)
        yield NORM, budget, 0, keep(features.float().norm(dim=-1), budget)
        yield (
            EVEN,
            budget,
            0,
            keep(ordered_noise(patches).to(scores.device).expand_as(scores), budget),
        )
        for seed, generator in enumerate(generators):
            noise = torch.rand(scores.shape, generator=generator).to(scores.device)
            yield RANDOM, budget, seed, keep(noise, budget)


@torch.no_grad()
def measure(
    tokenizer: VisualTokenizer, batches: Any, mean: Tensor, budgets: list[int], seeds: int
) -> list[dict[str, Any]]:
    """One row for each method and budget: mean codes an image, both cosines and their spread over seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    found: dict[tuple[str, int | None], dict[int, dict[str, list[Tensor]]]] = {}
    for batch in batches:
        features = tokenizer.features(tokenizer.preprocess(batch))
        scores = keep_scores(tokenizer.score(features))
        for method, budget, seed, keep in selections(features, scores, budgets, generators):
            codes = tokenizer.quantize(
                tokenizer.project(tokenizer.merge(features, keep)), keep.sum(1)
            )
            values = plain_and_centred(features, tokenizer.reconstruct_features(codes), mean)
            runs = found.setdefault((method, budget), {}).setdefault(
                seed, {"codes": [], "plain": [], "centred": []}
            )
            runs["codes"].append(codes.lengths.double().cpu())
            runs["plain"].append(values["plain"].cpu())
            runs["centred"].append(values["centred"].cpu())
    rows = []
    for (method, budget), runs in found.items():
        means = {
            k: [float(torch.cat(r[k]).mean()) for r in runs.values()]
            for k in ("codes", "plain", "centred")
        }
        spreads = {name: common.spread(means[name]) for name in ("plain", "centred")}
        rows.append(
            {"method": method, "budget": budget, "codes_per_image": means["codes"][0], **spreads}
        )
    return rows


def curve(rows: list[dict[str, Any]], path: Any) -> None:
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, name in zip(axes, ("plain", "centred"), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = sorted(
                (r for r in rows if r["method"] == method), key=lambda r: r["codes_per_image"]
            )
            x, y = [r["codes_per_image"] for r in own], [1 - r[name]["mean"] for r in own]
            axis.errorbar(
                x, y, [r[name]["std"] for r in own], marker="o" if len(x) > 1 else "*", label=method
            )
        axis.set(xlabel="codes an image, mean", ylabel=f"1 - {name} cosine")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Namespace) -> dict[str, Any]:
    tokenizer = common.load_tokenizer(arguments)
    size, batch, patches = (
        tokenizer.config.image_size,
        arguments.batch_size,
        tokenizer.config.num_patches,
    )
    wrong = [b for b in arguments.budgets if not 1 <= b <= patches]
    if wrong:
        raise ValueError(f"--budgets: expected 1..{patches} codes an image, got {wrong}")
    pictures = picture_sets.load_pictures(arguments.data, size, arguments.split, arguments.limit)
    reference = picture_sets.reference_pictures(
        arguments.data, size, arguments.mean_pictures, pictures
    )
    mean = feature_mean(tokenizer, reference.batches(batch))
    rows = measure(tokenizer, pictures.batches(batch), mean, arguments.budgets, arguments.seeds)
    values = {
        "set": pictures.describe(),
        "mean_feature_over": reference.describe(),
        "patches": patches,
        "rows": rows,
    }

    def cell(value: dict[str, float]) -> str:
        return f"{value['mean']:.4f}" + (f" ± {value['std']:.4f}" if value["seeds"] > 1 else "")

    order = sorted(rows, key=lambda r: (r["budget"] is not None, r["budget"] or 0))
    lines = [
        (
            r["budget"] or "none",
            r["method"],
            f"{r['codes_per_image']:.2f}",
            cell(r["plain"]),
            cell(r["centred"]),
        )
        for r in order
    ]
    body = f"{values['set']}; {patches} patches. Mean feature over: {values['mean_feature_over']}. "
    body += f"Random: mean ± std over {arguments.seeds} seeds.\n\n"
    body += common.table(
        ("budget", "selection", "codes an image", "plain cosine", "centred cosine"), lines
    )
    body += "\n\n![distortion against mean codes](selection.png)"
    common.write("selection", arguments.out, "Selection", body, values)
    curve(rows, arguments.out / "selection.png")
    return values


def arguments() -> Any:
    found = common.parser(__doc__, limit=300)
    found.add_argument(
        "--budgets", type=int, nargs="+", default=[8, 16, 21, 32], help="codes an image"
    )
    found.add_argument("--seeds", type=int, default=3, help="seeds of the random selection")
    found.add_argument(
        "--mean-pictures",
        type=int,
        default=1024,
        help="pictures of the train split for the mean feature",
    )
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

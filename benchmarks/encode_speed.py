"""How close is strict encoding to its arithmetic floor?

    floor = FLOPs(encode) / FLOPs(bare)      ratio = time(encode) / time(bare)      overhead = ratio / floor

`encode` is tokenizer.encode_pixels with a fixed share of the patches kept; `bare` is tokenizer.features of the same
pixels in the same run. The two are timed in turns, warm, and the ratio is the median of the pairs' ratios, so that a
busy machine slows both sides; beside it stands the same of the process's CPU time, which other programs disturb less.
Matrix products, convolutions and attention are counted by torch's FLOP counter,
attention under the plain ("math") kernel, because the fused CPU kernel is not counted; masked entries count as work.
Random weights, except for --cases shipped: speed does not depend on what the numbers are, only on how many patches are
kept, which is why the budget is fixed.

Then ours stands beside what a user would pick instead, at the same resolution in the same run (--beside): images/s,
codes, weights, FLOPs, and with --memory each one's peak memory in a process of its own.
Writes encode_speed.md, .json and .png. Finished cases are kept if the run is killed.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from argparse import Namespace
from functools import partial
from typing import Any

import adapters
import common
import torch
from parts import Parts, progress
from speeds import Entry, add_memory, in_own_process, plot, side_by_side, table
from speeds import peak_gib as _peak
from timing import flops, interleaved
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lavit_tok import TokenizerConfig, VisualTokenizer

TARGET = 1.15
BATCHES = {"shipped": [1, 32], "small": [1, 32], "base": [8], "lavit": [1, 4, 16]}
"""Batch sizes of each case where none are given."""


def base_config(**changes: Any) -> TokenizerConfig:
    """CLIP ViT-B/16 at 224 pixels, 196 patches, with 4 merger blocks: the size of the base recipe."""
    encoder = {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    }
    sizes: dict[str, Any] = {
        "codebook_size": 8192,
        "code_dim": 32,
        "merger_depth": 4,
        "reconstructor_depth": 4,
    }
    return TokenizerConfig(encoder=encoder, num_heads=12, **{**sizes, **changes})


def fused_attention_is_counted(device: str) -> bool:
    """Whether this torch counts its fused attention; printed, since a count without it would flatter neither side."""
    x = torch.zeros(1, 1, 8, 4, device=device)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    return counter.get_total_flops() > 0


@torch.no_grad()
def measure(
    tokenizer: VisualTokenizer, batch: int, arguments: Namespace, formulas: list[str]
) -> list[dict[str, Any]]:
    """FLOPs, times and their ratios of one model at one batch size: a row for each formula of the merger."""
    config, device, keep = tokenizer.config, str(tokenizer.device), arguments.keep
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, generator=generator).to(
        device, tokenizer.dtype
    )

    def bare(count: int = batch) -> Tensor:
        return tokenizer.features(pixels[:count])

    def encode(formula: str) -> Any:
        tokenizer.merger.formula = formula  # type: ignore[assignment]
        return tokenizer.encode_pixels(pixels, budget=keep)

    def dense() -> Any:
        features = bare(1)
        mask = tokenizer.select(tokenizer.score(features), keep)
        return tokenizer.quantizer.codebook.nearest(
            tokenizer.project(tokenizer.merger.dense(features, mask)[mask])
        )

    encoders = [partial(encode, formula) for formula in formulas]
    one = {
        "bare": flops(partial(bare, 1)),
        "encode_all_rows": flops(dense),
    }  # the same for each image
    counts = [flops(call) for call in encoders]
    seconds = interleaved(
        [bare, *encoders], arguments.repeats, device, arguments.seconds, warm=arguments.warm
    )
    times = [statistics.median(wall for wall, _ in found) for found in seconds]
    kept = float(encode(formulas[0]).lengths.double().mean())
    runs = []
    for formula, count, time, pairs in zip(formulas, counts, times[1:], seconds[1:], strict=True):
        floor = count / batch / one["bare"]
        ratio, cpu_ratio = (
            statistics.median(e[i] / b[i] for b, e in zip(seconds[0], pairs, strict=True))
            for i in (0, 1)
        )
        runs.append(
            {
                "formula": formula,
                "batch": batch,
                "patches": config.num_patches,
                "kept_share": kept / config.num_patches,
                "gflops_per_image": {
                    "encode": count / batch / 1e9,
                    **{name: count / 1e9 for name, count in one.items()},
                },
                "seconds": {"bare": times[0], "encode": time},
                "images_per_second": {"bare": batch / times[0], "encode": batch / time},
                "floor": floor,
                "ratio": ratio,
                "overhead": ratio / floor,
                "cpu_overhead": cpu_ratio / floor,
                "repeats": len(pairs),
            }
        )
    return runs


def build(case: str, arguments: Namespace, dtype: torch.dtype) -> VisualTokenizer:
    if case == "shipped":
        return common.load_tokenizer(arguments).to(dtype=dtype)
    configs = {
        "small": TokenizerConfig,
        "base": base_config,
        "lavit": TokenizerConfig.lavit,
    }
    torch.manual_seed(0)
    return VisualTokenizer(configs[case]()).to(arguments.device, dtype)


# Memory, in a process of its own


def _memory(directory: str, dtype: torch.dtype, batch: int) -> dict[str, float]:
    found = {"imports_gib": _peak()}
    tokenizer = VisualTokenizer.from_pretrained(directory, dtype=dtype)
    found["loaded_gib"] = _peak()
    size = tokenizer.config.image_size
    tokenizer.encode_pixels(torch.randn(batch, 3, size, size, dtype=dtype), budget=1 / 3)
    return found | {"encoded_gib": _peak(), "batch": batch}


def peak_memory(directory: str, dtype: torch.dtype, batch: int) -> dict[str, float]:
    """Greatest resident memory after loading a model from disk, and after encoding a batch."""
    return in_own_process(_memory, directory, dtype, batch)


# Beside what a user would pick instead


@torch.no_grad()
def beside(case: str, tokenizer: VisualTokenizer, a: Namespace) -> list[dict[str, Any]]:
    """The bare encoder, ours and the other tokenizers at the same resolution: pixels in, codes out, in turns."""
    config, device = tokenizer.config, str(tokenizer.device)
    batch = a.beside_batch_size or (4 if case in ("shipped", "small") else 1)
    generator = torch.Generator().manual_seed(0)
    size = config.image_size
    images = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
    pixels = tokenizer.preprocess(images)
    kept = float(tokenizer.encode_pixels(pixels, a.keep).lengths.double().mean())
    weights = "shipped" if case == "shipped" else adapters.RANDOM
    encoder = adapters.count(tokenizer.encoder)
    total = encoder + adapters.count(tokenizer.selector, tokenizer.merger, tokenizer.quantizer)
    entries = [
        Entry(
            f"{case}: bare encoder",
            weights,
            batch,
            lambda: tokenizer.features(pixels),
            lambda: tokenizer.features(pixels[:1]),
            encoder,
        ),
        Entry(
            f"{case}: lavit-tok",
            weights,
            batch,
            lambda: tokenizer.encode_pixels(pixels, a.keep),
            lambda: tokenizer.encode_pixels(pixels[:1], a.keep),
            total,
            kept,
            kept * math.log2(config.codebook_size),
            beside=0,
        ),
    ]
    for name in a.beside:
        other = adapters.load(name, device, size)
        if other.image_size != size:
            raise ValueError(
                f"--beside {name}: expected pictures of {size} pixels, as {case} has, got {other.image_size}"
            )
        calls = [partial(other.encode, some) for some in (images, images[:1])]
        if isinstance(
            other, adapters.GridTokenizer
        ):  # without what goes before: pixels in, codes out, as ours above
            calls = [
                partial(other.tokens, some.to(device) / 127.5 - 1) for some in (images, images[:1])
            ]
        count = float(other.encode(images).lengths.double().mean())
        bits = count * math.log2(other.codebook_size)
        entries.append(
            Entry(
                other.name,
                other.weights,
                batch,
                *calls,
                other.parameters["encode"],
                count,
                bits,
                beside=1,
                load={"name": name, "device": device, "image_size": size},
            )
        )
    rows = side_by_side(entries, a.beside_repeats, device)
    with tempfile.TemporaryDirectory() as folder:
        rows[1]["load"] = {"name": folder, "device": device}
        if a.memory:
            tokenizer.save_pretrained(folder)
            add_memory("encode", rows)
    return [
        {"case": case, "image_size": size, **{k: v for k, v in row.items() if k != "load"}}
        for row in rows
    ]


# The script


def one_case(case: str, name: str, a: Namespace) -> dict[str, Any]:
    """All measurements of one case in one dtype."""
    dtype = getattr(torch, name)
    tokenizer = build(case, a, dtype)
    batches = a.batch_sizes or BATCHES[case]
    formulas = ["strict", "compat"] if case == "lavit" else [tokenizer.config.attention]
    found: dict[str, Any] = {"runs": [], "beside": []}
    for batch in batches:
        for run in measure(tokenizer, batch, a, formulas):
            found["runs"].append({"case": case, "dtype": name, **run})
            label = f"{case} {run['formula']} {name} batch {batch}"
            print(f"{label}: ratio {run['ratio']:.3f}, overhead {run['overhead']:.3f}", flush=True)
    if a.beside and name == "float32":
        found["beside"] = beside(case, tokenizer, a)
    if a.full or a.memory:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            weights = sum(p.nbytes for p in tokenizer.state_dict().values()) / 2**30
            del tokenizer  # two models of 8 GB need not be there at once
            found["runs"][-1]["peak_memory"] = {
                "weights_gib": weights,
                **peak_memory(folder, dtype, max(batches)),
            }
    return found


def main(arguments: Namespace) -> dict[str, Any]:
    a = arguments
    if a.full:
        a.cases, a.beside = ["lavit"], []
    name = "encode_speed_full" if a.full else "encode_speed"
    settings = common.given(a)
    parts = Parts(
        a.out, name, {"script": name, **settings, "where": common.provenance("encode_speed")}
    )
    todo = [(case, dtype) for dtype in a.dtypes for case in a.cases]
    found = [
        parts.values(f"{case}-{dtype}", partial(one_case, case, dtype, a))
        for case, dtype in progress(todo, "cases", len(todo))
    ]
    values = {
        "target": TARGET,
        "fused_attention_counted": fused_attention_is_counted(a.device),
        "runs": [run for one in found for run in one["runs"]],
        "beside": [row for one in found for row in one["beside"]],
    }
    a.out.mkdir(parents=True, exist_ok=True)
    if values["beside"]:
        plot(values["beside"], a.out / f"{name}.png", "encoding, same resolution within a case")
    common.write(name, a.out, "Encoding speed", text(values), values)
    parts.done()
    return values


def text(values: dict[str, Any]) -> str:
    rows = [
        (
            f"{r['case']} {r['formula']}, {r['dtype']}",
            r["batch"],
            f"{r['kept_share']:.3f}",
            *(f"{r['gflops_per_image'][k]:.3g}" for k in ("bare", "encode", "encode_all_rows")),
            *(f"{r['images_per_second'][k]:.3g}" for k in ("bare", "encode")),
            *(f"{r[k]:.3f}" for k in ("floor", "ratio", "overhead", "cpu_overhead")),
        )
        for r in values["runs"]
    ]
    head = (
        "model",
        "batch",
        "kept",
        "GFLOPs bare",
        "encode",
        "all rows",
        "images/s bare",
        "encode",
    )
    body = f"Target: overhead = (time ratio) / (FLOP ratio) at most {values['target']}. GFLOPs are for one image. "
    body += "'all rows' is what encoding would cost if the merger computed every patch.\n\n"
    body += common.table(
        (*head, "FLOP ratio", "time ratio", "overhead", "overhead, CPU time"), rows
    )
    counted = "counts" if values["fused_attention_counted"] else "does not count"
    body += f"\n\nThis torch {counted} fused attention here; both sides were counted under the math kernel. "
    least = min(r["repeats"] for r in values["runs"])
    body += f"Medians of interleaved rounds after warm ones; at least {least} rounds."
    memory = [
        (r["case"], r["dtype"], r["peak_memory"]) for r in values["runs"] if "peak_memory" in r
    ]
    if memory:
        head = (
            "model",
            "dtype",
            "weights, GiB",
            "after imports",
            "peak after loading",
            "peak after encoding",
            "batch",
        )
        names = ("weights_gib", "imports_gib", "loaded_gib", "encoded_gib", "batch")
        body += "\n\nPeak resident memory of a process:\n\n"
        body += common.table(
            head, [(case, dtype, *(m[name] for name in names)) for case, dtype, m in memory]
        )
    if values["beside"]:
        sizes = ", ".join(
            str(s) for s in dict.fromkeys(row["image_size"] for row in values["beside"])
        )
        body += f"\n\n## Beside other tokenizers, {sizes} pixels, float32\n\n" + table(
            values["beside"]
        )
        body += "\n\nPixels in, codes out. The others have random weights: speed, codes and FLOPs are their own. "
        body += "Weights, M: those that encoding uses. Emu3 codes a picture as four equal frames."
        body += "\n\n![images/s](encode_speed.png)"
    return body


def arguments() -> Any:
    found = common.parser(__doc__, data=False)
    cases = list(BATCHES)
    found.add_argument(
        "--cases",
        nargs="+",
        choices=cases,
        default=["small", "base"],
        help="small: the shipped sizes",
    )
    found.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    found.add_argument("--batch-sizes", type=int, nargs="+", help=f"by default {BATCHES}")
    found.add_argument(
        "--keep",
        type=float,
        default=1 / 3,
        help="share of the patches kept, spent across the batch",
    )
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--warm", type=int, default=2, help="rounds before those that count")
    found.add_argument(
        "--seconds", type=float, default=4.0, help="repeat at least this long, 100 times at most"
    )
    found.add_argument(
        "--memory", action="store_true", help="also the peak memory of loading and encoding"
    )
    found.add_argument(
        "--beside",
        nargs="*",
        default=list(adapters.KINDS),
        help="other tokenizers at the same resolution, float32: these, or module:function",
    )
    found.add_argument(
        "--beside-batch-size", type=common.positive, help="4 at the shipped size, else 1"
    )
    found.add_argument("--beside-repeats", type=common.positive, default=3)
    found.add_argument(
        "--full",
        action="store_true",
        help="the paper's size, strict and compat, at batch 1, 4 and 16",
    )
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

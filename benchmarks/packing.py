"""What packing is worth, what it must not change, and what Lightning with our code costs over a bare model.

    fill      share of the places of packed blocks that hold a document, over one epoch in the order of training
    speed     useful tokens/s, forward and backward, of packed blocks against padded batches of the very same rows
    loss      packed against each row alone, in float32
    overhead  a step as `lavit-lm fit` runs it against the bare transformers model on the same ids, same optimizer step

Everything is timed in turns, so that a busy machine slows both sides, and ratios are medians of the pairs' ratios. The
padded batches hold the very rows of the packed ones, as many batches, each padded to its longest row; in random order,
since packing lets long rows meet in a block, which nothing does without it. Beside them stand padded batches of rows of
like length, as many places each as a packed batch: the best that padding can do, at the price of the order.
The bare model gets the packed batch's ids, positions and labels from memory: it neither lays out, packs, builds masks
nor logs. Bare twice: with positions, which keep documents apart as ours does, and plain causal, which does not.
Model-FLOPs utilisation is 6 N useful tokens a second over a measured matrix product. Writes packing.md and .json.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from language_models import (
    SHAPES,
    add_source,
    autocast,
    flops_per_place,
    matmul_peak,
    shape,
    source,
)
from packing_overhead import overhead, useful
from timing import interleaved, ratio

from lavit_lm.sequences.packing import Packed, pack, pad
from lavit_lm.sequences.segments import TokenSequence
from lavit_lm.training.module import LanguageModeling
from lavit_lm.training.sampler import BlockOrder, Blocks, RaggedLayout, Samples
from lavit_tok import ShardError

FILL, SPEEDUP, LOSS, LIGHTNING, MFU = 0.98, 1.4, 1e-5, 0.9, 0.45
"""The aims."""
BLOCK = {"small": 512, "1b": 4096}

# Fill


def fill(layout: RaggedLayout, block: int, window: int) -> dict[str, Any]:
    """One epoch of blocks in the order of training."""
    order = BlockOrder(layout, block, 1, window)
    epoch = list(itertools.takewhile(lambda places: places[0][0] == 0, order))
    lengths = [len(layout.row(place)) for places in epoch for place in places]
    return {
        "block": block,
        "window": window,
        "rows": len(lengths),
        "too_long": len(order.too_long),
        "blocks": len(epoch),
        "used": sum(lengths),
        "fill": sum(lengths) / (block * len(epoch)),
        "row_length": {"mean": statistics.fmean(lengths), "max": max(lengths)},
    }


# Speed and loss


def batches_of_rows(layout: RaggedLayout, a: Namespace) -> list[list[list[TokenSequence]]]:
    """Rows of the first batches of training: for each batch its blocks, for each block its rows."""
    order = iter(BlockOrder(layout, a.block, a.batch_size, a.window))
    made = Blocks(layout, a.block)
    return [[made[next(order)] for _ in range(a.batch_size)] for _ in range(a.batches)]


def shuffled(rows: Sequence[TokenSequence], batches: int, seed: int) -> list[list[TokenSequence]]:
    """Rows in random order, dealt into as many batches."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[rows[i] for i in order[start::batches]] for start in range(min(batches, len(rows)))]


def like_lengths(rows: Sequence[TokenSequence], places: int) -> list[list[TokenSequence]]:
    """Rows sorted by length, cut into padded batches of at most this many places."""
    batches: list[list[TokenSequence]] = []
    for row in sorted(rows, key=len, reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > places:
            batches.append([])
        batches[-1].append(row)
    return batches


def speed(module: Any, groups: list[list[list[TokenSequence]]], a: Namespace) -> dict[str, Any]:
    """Seconds of forward and backward over the same rows in three forms, in turns."""
    model, objective, empty = module.model.train(), module.objective, module.processor.pad
    rows = [row for blocks in groups for block in blocks for row in block]
    forms = {
        "packed": [pack(blocks, a.block, empty) for blocks in groups],
        "padded": [pad(part, empty) for part in shuffled(rows, len(groups), a.seed)],
        "padded, like lengths": [
            pad(part, empty) for part in like_lengths(rows, a.batch_size * a.block)
        ],
    }
    forms = {name: [batch.to(a.device) for batch in batches] for name, batches in forms.items()}
    tokens = useful(forms["packed"])

    def descend(batches: list[Packed]) -> Callable[[], None]:
        def call() -> None:
            for batch in batches:
                with autocast(a.device, a.dtype):
                    loss = objective.total(model(batch, objective))
                loss.backward()
                model.zero_grad(set_to_none=True)

        return call

    times = interleaved(
        [descend(batches) for batches in forms.values()], a.repeats, a.device, a.seconds
    )
    walls = {name: [wall for wall, _ in found] for name, found in zip(forms, times, strict=True)}
    return {
        "rows": len(rows),
        "useful_tokens": tokens,
        "repeats": len(walls["packed"]),
        "forms": {
            name: {
                "batches": len(batches),
                "places": sum(batch.ids.numel() for batch in batches),
                "fill": useful(batches) / sum(batch.ids.numel() for batch in batches),
                "seconds": statistics.median(walls[name]),
                "useful_tokens_per_second": tokens / statistics.median(walls[name]),
                "packed_is_faster_by": ratio(walls[name], walls["packed"]),
            }
            for name, batches in forms.items()
        },
    }


@torch.no_grad()
def loss_difference(module: Any, blocks: list[list[TokenSequence]], a: Namespace) -> dict[str, Any]:
    """Mean losses in nats of a packed batch and of its rows one at a time, all in float32."""
    model, objective, empty = module.model.eval(), module.objective, module.processor.pad
    packed = model(pack(blocks, a.block, empty).to(a.device), objective)
    alone = [model(pad([row], empty).to(a.device), objective) for block in blocks for row in block]
    found: dict[str, Any] = {"rows": len(alone)}
    for name, losses in packed.items():
        count = int(losses.count)
        total = sum(float(one[name].total) for one in alone)
        if count:
            found[name] = {
                "targets": count,
                "packed": float(losses.total) / count,
                "alone": total / count,
            }
    found["difference"] = max(
        abs(v["packed"] - v["alone"]) for v in found.values() if isinstance(v, dict)
    )
    return found


# The script


def main(a: Namespace) -> dict[str, Any]:
    from lavit_tok import VisualTokenizer

    lm = shape(a.model)
    a.block = a.block or BLOCK.get(a.model, lm.get("max_position_embeddings", 512))
    codebook_size = VisualTokenizer.from_pretrained(a.tokenizer).config.codebook_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = source(a, folder, codebook_size)
        module = LanguageModeling(
            lm,
            rows.text_tokenizer,
            a.tokenizer,
            gradient_checkpointing=a.gradient_checkpointing,
            compile=a.compile,
            seed=a.seed,
        )
        if rows.fingerprint not in (None, module.fingerprint):
            raise ShardError(
                f"{a.shards}: made by another tokenizer than {a.tokenizer!r} (--tokenizer)"
            )
        module.configure_model()
        assert module.model is not None
        module.model.to(a.device)
        layout = RaggedLayout(Samples(rows.pairs), module.objective, module.processor, a.seed)
        per_place, with_attention = flops_per_place(module.model.causal, a.block)
        values: dict[str, Any] = {
            "rows": rows.described,
            "model": Path(a.model).name,
            "config": lm,
            "parameters": sum(p.numel() for p in module.model.parameters()),
            "vocabulary": module.model.causal.get_input_embeddings().num_embeddings,
            "dtype": a.dtype,
            "batch_size": a.batch_size,
            "fill": fill(layout, a.block, a.window),
        }
        print(f"fill {values['fill']['fill']:.4f} of {values['fill']['blocks']} blocks", flush=True)
        groups = batches_of_rows(layout, a)
        values["loss"] = loss_difference(module, groups[0], a)
        print(f"loss difference {values['loss']['difference']:.2e} nats", flush=True)
        values["speed"] = speed(module, groups, a)
        padded = values["speed"]["forms"]["padded"]["packed_is_faster_by"]
        print(f"packed over padded: {padded:.3f} times the useful tokens/s", flush=True)
        values["overhead"] = overhead(module, layout, a, folder)
        print(
            f"Lightning and our code over bare: {values['overhead']['share_of_bare']:.3f}",
            flush=True,
        )
        peak = matmul_peak(a.device, "float32" if a.dtype == "float32" else "bfloat16", a.matmul)
        rates = {
            "packed, forward and backward": values["speed"]["forms"]["packed"][
                "useful_tokens_per_second"
            ],
            "Lightning, whole step": values["overhead"]["useful_tokens_per_second"]["lightning"],
        }
        values["utilisation"] = {
            "matmul_peak": peak,
            "flops_per_place": per_place,
            "flops_per_place_with_attention": with_attention,
            "share": {name: rate * per_place / peak for name, rate in rates.items()},
        }
    common.write(a.name, a.out, "Packing", text(values), values)
    return values


def text(v: dict[str, Any]) -> str:
    f, s, o, u = v["fill"], v["speed"], v["overhead"], v["utilisation"]
    body = f"{v['rows']}. Model {v['model']}: {v['parameters'] / 1e6:.1f} M weights, vocabulary {v['vocabulary']}; "
    body += f"{v['dtype']}; {v['batch_size']} blocks of {f['block']} places a batch.\n\n"
    rows = [
        ("fill of one epoch's blocks", f"{f['fill']:.4f}", f"at least {FILL}"),
        (
            "useful tokens/s, packed over padded",
            f"{s['forms']['padded']['packed_is_faster_by']:.3f}",
            f"at least {SPEEDUP}",
        ),
        ("loss, packed against alone, nats", f"{v['loss']['difference']:.1e}", f"at most {LOSS:g}"),
        (
            "Lightning and our code, share of the bare model's speed",
            f"{o['share_of_bare']:.3f}",
            f"at least {LIGHTNING}",
        ),
        ("the same, bare model plain causal", f"{o['share_of_plain_causal']:.3f}", "-"),
        (
            "model-FLOPs utilisation, whole step",
            f"{u['share']['Lightning, whole step']:.3f}",
            f"{MFU} at 1b on an accelerator",
        ),
    ]
    body += common.table(("measure", "value", "aim"), rows)
    body += f"\n\n{f['rows']} rows, {f['row_length']['mean']:.1f} places on average, {f['row_length']['max']} at most, "
    body += f"in {f['blocks']} blocks, planned {f['window']} at a time; {f['too_long']} too long for a block.\n\n"
    head = (
        "form",
        "batches",
        "places",
        "fill",
        "seconds",
        "useful tokens/s",
        "packed is faster by",
    )
    lines = [
        (
            name,
            *(
                form[k]
                for k in ("batches", "places", "fill", "seconds", "useful_tokens_per_second")
            ),
            f"{form['packed_is_faster_by']:.3f}",
        )
        for name, form in s["forms"].items()
    ]
    body += common.table(head, lines)
    body += f"\n\nForward and backward over the same {s['rows']} rows; medians of {s['repeats']} turns.\n\n"
    lines = [(n, o["seconds"][n], o["useful_tokens_per_second"][n]) for n in o["seconds"]]
    body += common.table(("whole step", "seconds", "useful tokens/s"), lines)
    body += f"\n\nMedians of {o['steps']} steps, {o['num_workers']} loading processes; with optimizer step "
    body += "and clipping.\n\n"
    body += f"Utilisation: 6 N = {u['flops_per_place'] / 1e6:.1f} MFLOPs for a place; full attention would make it "
    body += f"{u['flops_per_place_with_attention'] / 1e6:.1f}. Measured matrix product: {u['matmul_peak'] / 1e12:.3g} "
    return body + "TFLOP/s."


def arguments() -> Any:
    found = common.parser(__doc__, data=False, batch_size=4)
    add_source(found)
    found.add_argument(
        "--model", default="small", help=f"{', '.join(SHAPES)}, a JSON config, or a recipe (*.yaml)"
    )
    found.add_argument(
        "--dtype",
        choices=["float32", "bf16"],
        default="float32",
        help="bf16: autocast over float32",
    )
    found.add_argument(
        "--block",
        type=common.positive,
        help=f"places of a block; {BLOCK}, else the model's context",
    )
    found.add_argument("--window", type=common.positive, default=4096, help="rows planned together")
    found.add_argument(
        "--batches", type=common.positive, default=4, help="packed batches that are timed"
    )
    found.add_argument(
        "--repeats", type=common.positive, default=5, help="turns of packed and padded"
    )
    found.add_argument("--seconds", type=float, default=0.0, help="turns for at least this long")
    found.add_argument(
        "--steps",
        type=common.positive,
        default=10,
        help="steps of Lightning, and of the bare model",
    )
    found.add_argument("--warm", type=int, default=2, help="steps before them that do not count")
    found.add_argument("--clip", type=float, default=1.0, help="gradient norm, on both sides")
    found.add_argument("--num-workers", type=int, default=0, help="loading processes")
    found.add_argument(
        "--checkpoint-blocks", action="store_true", help="recompute blocks in the backward pass"
    )
    found.add_argument(
        "--compile", action="store_true", help="torch.compile our LM (the bare one stays as it is)"
    )
    found.add_argument(
        "--matmul", type=common.positive, help="side of the matrices behind the peak"
    )
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--name", default="packing", help="of the result files")
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

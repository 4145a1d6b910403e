"""Four objectives on the same data with the same language model: which one learns what, how fast?

    recipes/lm/NAME.yaml  an LM of --width and --layers from random weights, --steps steps
    blocks VL-GPT                recipes/lm/vlgpt-tokenizer.yaml first Emu
    recipes/lm/emu-decoder.yaml after

Every model is trained by `lavit-lm fit` with its recipe, in a process of its own, and measured by
lm_quality.py on held-out images: do images generated for captions find their own captions? DaVinci
has a code for every patch and needs shards of its own. Finished models in --runs are not trained
again. Writes objectives.md, .json and .png.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import json
import subprocess
import time
from argparse import ArgumentParser, Namespace
from typing import Any

from benchmarks import lm_quality
from benchmarks.shared import cli, plots, report
from benchmarks.shared.provenance import ROOT

NAMES = ["lavit", "emu", "vlgpt", "davinci"]


def fit(recipe: str, seed: int, steps: int, out: Path, **options: Any) -> float:
    """Train by a recipe unless `out` exists; returns seconds per step, loading included."""
    if out.exists():
        return float("nan")
    options = {"model.out": out, "trainer.max_steps": steps, "model.seed": seed, **options}
    commands = {"vlgpt-tokenizer.yaml": "fit-tokenizer", "emu-decoder.yaml": "fit-decoder"}
    program = [sys.executable, "-m", "lavit_lm.cli", commands.get(recipe, "fit")]
    command = [*program, "-c", ROOT / "recipes" / "lm" / recipe]
    flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
    start = time.monotonic()
    subprocess.run([*map(str, command), f"--seed_everything={seed}", *flags], check=True)
    return (time.monotonic() - start) / steps


def train(name: str, seed: int, folder: Path, args: Namespace) -> dict[str, Any]:
    """Train the language model, and what precedes and follows it; returns its directories."""
    shape = {"model_type": "llama", "hidden_size": args.width, "num_hidden_layers": args.layers}
    shape |= {"intermediate_size": 8 * args.width // 3, "num_attention_heads": args.width // 64}
    shape |= {"max_position_embeddings": 512, "tie_word_embeddings": True}
    data = {"data.shards": args.grid_shards if name == "davinci" else args.shards}
    data |= {"data.block": args.block, "data.batch_size": args.blocks}
    extra: dict[str, Any] = {"model.lm": json.dumps(shape)}
    extra |= {"model.text_tokenizer": args.text_tokenizer, "model.visual_tokenizer": args.tokenizer}
    decoder: Any = args.decoder
    if name == "vlgpt":
        decoder = folder / "tokenizer"
        width = {"model.width": args.width, "data.data": args.data}
        fit("vlgpt-tokenizer.yaml", seed, args.first, decoder, **width)
        extra["model.objective.init_args.tokenizer"] = decoder
    seconds = fit(f"{name}.yaml", seed, args.steps, folder / "model", **extra, **data)
    if name == "emu":
        decoder, model = (
            folder / "decoder",
            {"model.model": folder / "model", "data.data": args.data},
        )
        fit("emu-decoder.yaml", seed, args.after, decoder, **model)
    return {"model": str(folder / "model"), "decoder": str(decoder), "seconds_per_step": seconds}


def run(name: str, seed: int, args: Namespace) -> dict[str, float]:
    """Train and measure one model, or read what an earlier run left of it."""
    folder = args.runs / f"{name}-{seed}"
    done = folder / "result.json"
    if not done.exists():
        trained = train(name, seed, folder, args)
        options = [
            "--data",
            args.data,
            "--model",
            trained["model"],
            "--decoder",
            trained["decoder"],
        ]
        options += ["--captions", args.captions, "--scorer", args.scorer, "--out", folder]
        options += ["--parts", "images", "--seeds", 1, "--seed", seed, "--device", args.device]
        parser = lm_quality.arguments()
        quality = lm_quality.main(parser.parse_args([str(option) for option in options]))
        numbers = {k: v["mean"] for k, v in quality["images"]["generated"].items()}
        done.write_text(json.dumps({"seconds per step": trained["seconds_per_step"], **numbers}))
    return json.loads(done.read_text())


def main(args: Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for name in args.objectives:
            runs.setdefault(name, []).append(run(name, seed, args))
    spreads = {name: report.spreads(found) for name, found in runs.items()}
    names = list(next(iter(spreads.values())))
    body = f"{args.steps} steps of {args.blocks} blocks of {args.block} positions; llama of "
    body += f"{args.layers} layers, width {args.width}, from random weights; images of "
    body += f"{args.captions} captions; {args.seeds} seeds. VL-GPT: {args.first} steps for its "
    body += f"tokenizer before. Emu: {args.after} for its decoder after.\n\n"
    rows = [(objective, *(found[n] for n in names)) for objective, found in spreads.items()]
    body += report.table(("objective", *names), rows) + "\n\n![objectives](objectives.png)"
    panels = {
        n: {o: [(i, found[n])] for i, (o, found) in enumerate(spreads.items())} for n in names
    }
    plots.curves(args.out / "objectives.png", panels, "objective")
    report.write("objectives", args, "Four objectives", body, {"runs": runs, **spreads})
    return runs


def arguments() -> ArgumentParser:
    return cli.parser(
        __doc__,
        tokenizer=("default", "'default', a directory or a Hub id"),
        decoder=("default", "pixel decoder of codes"),
        shards=(str, "of the data set, by lavit-tok shards --flip"),
        grid_shards=(str, "of the same, with --budget of all patches: DaVinci's"),
        text_tokenizer=(str, "folder that recipes/lm/text_tokenizer.py wrote"),
        scorer=(Path("runs/default/teacher"), "folder that recipes/default/teacher.py wrote"),
        objectives=(NAMES, "objectives to compare", NAMES),
        seeds=(3, "models of each objective"),
        steps=(400, "training steps of the language model"),
        first=(300, "steps of VL-GPT's tokenizer"),
        after=(300, "steps of Emu's decoder"),
        width=(192, "of the LM; a multiple of 64"),
        layers=(4, "of the LM"),
        block=(256, "positions of a block"),
        blocks=(16, "blocks of a step"),
        captions=(100, "captions that images are generated for"),
        runs=(Path("runs/objectives"), "folder of the trained models"),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))

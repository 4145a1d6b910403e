"""What is packing worth, and what does our training add to the bare model's time?

    fill      ratio of the positions of packed blocks that hold a token, over one epoch
    speed     useful tokens/s of forward and backward: packed blocks beside padded batches
    overhead  a step as `lavit-lm fit` runs it, beside the bare transformers model's

Padded batches hold the sequences of the packed ones, in as many batches and in random order, or
sorted by length with as many positions as a packed batch: the best that padding can do. The bare
model gets ids, positions and labels from memory, once with positions that keep documents apart as
ours does, and once plain causal. Timed in turns. Writes packing.md and .json.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import copy
import itertools
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import yaml
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from benchmarks.shared import cli, report, timing
from benchmarks.shared.training_steps import OURS, TimedSteps, fit
from lavit_lm.sequences.packing import PADDING, PackedBatch, pack, pad
from lavit_lm.sequences.token_sequence import TokenSequence
from lavit_lm.training.module import LanguageModeling
from lavit_lm.training.sampler import BlockDataset, BlockSampler, ExampleLayout, Examples
from lavit_tok import ShardError, Shards
from lavit_tok.training.data_module import ResumingLoader

AIMS = {"fill": 0.98, "speedup": 1.4, "overhead": 0.9}


def fill(layout: ExampleLayout, block: int, window: int) -> dict[str, Any]:
    """One epoch of blocks in the order of training."""
    order = BlockSampler(layout, block, 1, window)
    epoch = list(itertools.takewhile(lambda indices: indices[0][0] == 0, order))
    lengths = [layout.length(index)[0] for block in epoch for index in block]
    return {
        "block": block,
        "window": window,
        "sequences": len(lengths),
        "too_long": len(order.too_long),
        "blocks": len(epoch),
        "used": sum(lengths),
        "fill": sum(lengths) / (block * len(epoch)),
        "sequence_length": {"mean": statistics.fmean(lengths), "max": max(lengths)},
    }


def first_batches(layout: ExampleLayout, args: Namespace) -> list[list[list[TokenSequence]]]:
    """Sequences of each block of the first batches of training."""
    order = iter(BlockSampler(layout, args.block, args.batch_size, args.window))
    blocks = BlockDataset(layout, args.block)
    return [[blocks[next(order)] for _ in range(args.batch_size)] for _ in range(args.batches)]


def shuffled(sequences: Sequence[Any], batches: int, seed: int) -> list[list[Any]]:
    """Sequences in random order, dealt into as many batches."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    count = min(batches, len(sequences))
    return [[sequences[i] for i in order[start::batches]] for start in range(count)]


def similar_lengths(sequences: Sequence[Any], positions: int) -> list[list[Any]]:
    """Sequences sorted by length, cut into padded batches of at most this many positions."""
    batches: list[list[Any]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > positions:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def useful(batches: Sequence[PackedBatch]) -> int:
    """Positions that hold a token."""
    return sum(int((batch.documents != PADDING).sum()) for batch in batches)


def speed(module: Any, groups: list[list[list[TokenSequence]]], args: Namespace) -> dict[str, Any]:
    """Seconds of forward and backward over the same sequences in three forms, in turns."""
    model, objective, fill_id = module.model.train(), module.objective, module.processor.pad
    sequences = [one for blocks in groups for block in blocks for one in block]
    similar = similar_lengths(sequences, args.batch_size * args.block)
    forms = {
        "packed": [pack(blocks, args.block, fill_id) for blocks in groups],
        "padded": [pad(part, fill_id) for part in shuffled(sequences, len(groups), args.seed)],
        "padded, similar lengths": [pad(part, fill_id) for part in similar],
    }
    forms = {name: [b.to(args.device) for b in batches] for name, batches in forms.items()}
    tokens = useful(forms["packed"])

    def forward_backward(batches: list[PackedBatch]) -> None:
        for batch in batches:
            with autocast(args.device, args.dtype):
                loss = objective.total(objective.losses(model(batch), batch))
            loss.backward()
            model.zero_grad(set_to_none=True)

    calls = {name: partial(forward_backward, batches) for name, batches in forms.items()}
    times = timing.in_turns(calls, args.repeats)
    found = {}
    for name, batches in forms.items():
        positions = sum(batch.ids.numel() for batch in batches)
        found[name] = {
            "batches": len(batches),
            "positions": positions,
            "fill": useful(batches) / positions,
            "seconds": times[name].median,
            "useful_tokens_per_second": tokens / times[name].median,
            "packed_is_faster_by": timing.ratio(times[name], times["packed"]),
        }
    counts = {"sequences": len(sequences), "repeats": len(times["packed"].raw_times)}
    return {**counts, "useful_tokens": tokens, "forms": found}


class BareModel:
    """The transformers model alone: ids, positions and labels in, one optimizer step."""

    def __init__(self, module: Any, args: Namespace) -> None:
        self.model = copy.deepcopy(module.model.causal).to(args.device).train()
        self.args = args
        self.losses: list[float] = []
        # The learning rate of Lightning's first step.
        rate = module.optimizer_config.lr / (module.schedule_config.warmup_steps + 1)
        parameters, betas = self.model.parameters(), module.optimizer_config.betas
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, betas=betas)

    def step(self, documents: bool, batch: PackedBatch) -> None:
        """One step; with `documents`, restarted positions keep packed documents apart."""
        labels = batch.ids.masked_fill(~batch.predict, -100)
        inputs = {"position_ids": batch.positions} if documents else {}
        with autocast(self.args.device, self.args.dtype):
            # Without use_cache=False transformers would not see where documents begin.
            loss = self.model(batch.ids, labels=labels, use_cache=False, **inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))


def overhead(module: Any, layout: ExampleLayout, folder: Path, args: Namespace) -> dict[str, Any]:
    """Seconds of a whole step: Lightning with our code, as `fit` runs it, and the bare model."""
    blocks = BlockDataset(layout, args.block)
    order = BlockSampler(layout, args.block, args.batch_size, args.window)
    options = {"sampler": order, "drop_last": True, "collate_fn": blocks.collate}
    loader = ResumingLoader(blocks, args.batch_size, num_workers=args.num_workers, **options)
    bare, losses, counts = BareModel(module, args), [], []

    def after_step(module: Any, outputs: Any, batch: PackedBatch) -> None:
        losses.append(float(outputs["loss"]))
        counts.append(useful([batch]))

    baselines = {"bare": partial(bare.step, True), "bare, plain causal": partial(bare.step, False)}
    timed, steps = TimedSteps(baselines, after_step), args.warm + args.steps
    loggers = [TensorBoardLogger(folder, name="tensorboard"), CSVLogger(folder, name="csv")]
    precision = "32-true" if args.dtype == "float32" else "bf16-mixed"
    fit(module, loader, steps, args.device, timed, logger=loggers, precision=precision)
    times, tokens = timed.measurements(args.warm), statistics.fmean(counts[args.warm :])
    return {
        "steps": args.steps,
        "num_workers": args.num_workers,
        "useful_tokens_per_step": tokens,
        "first_loss": {OURS: losses[0], "bare": bare.losses[0]},
        "seconds": {name: found.median for name, found in times.items()},
        "useful_tokens_per_second": {n: tokens / found.median for n, found in times.items()},
        "speed_over_bare": timing.ratio(times["bare"], times[OURS]),
        "speed_over_plain_causal": timing.ratio(times["bare, plain causal"], times[OURS]),
    }


def lm_config(name: str) -> dict[str, Any]:
    """The `transformers` config of a JSON file, or of a recipe of lavit-lm (model.lm).

    Raises:
        ValueError: none of these.
    """
    try:
        content = yaml.safe_load(Path(name).read_text())  # JSON is YAML, too
        config = content["model"]["lm"] if "model" in content else content
        return {"model_type": config["model_type"], **config}
    except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        expected = "a JSON config with its model_type, or a recipe"
        raise ValueError(f"--model: expected {expected}, got {name!r}: {error!r}") from None


def autocast(device: str, dtype: str) -> Any:
    """What Lightning's "bf16-mixed" does, for models beside it; nothing for float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16")


def main(args: Namespace) -> dict[str, Any]:
    if not args.shards or not args.text_tokenizer:
        raise ValueError("expected --shards and --text-tokenizer")
    lm, shards = lm_config(args.model), Shards.open(args.shards, args.split)
    module = LanguageModeling(lm, args.text_tokenizer, args.tokenizer, seed=args.seed)
    if shards.fingerprint != module.fingerprint:
        raise ShardError(f"{args.shards}: made by another tokenizer than {args.tokenizer!r}")
    module.configure_model()
    assert module.model is not None
    module.model.to(args.device)
    pairs = Examples(shards.dataset())
    layout = ExampleLayout(pairs, module.objective, module.processor, args.seed)
    values: dict[str, Any] = {
        "records": f"{len(pairs)} records of split {args.split!r}",
        "model": Path(args.model).name,
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "fill": fill(layout, args.block, args.window),
        "speed": speed(module, first_batches(layout, args), args),
    }
    with tempfile.TemporaryDirectory() as folder:
        values["overhead"] = overhead(module, layout, Path(folder), args)
    report.write(args.name, args, "Packing", text(values), values)
    return values


def text(v: dict[str, Any]) -> str:
    f, s, o = v["fill"], v["speed"], v["overhead"]
    body = f"{v['records']}. Model {v['model']}: {v['parameters'] / 1e6:.1f} M weights; "
    body += f"{v['dtype']}; {v['batch_size']} blocks per batch.\n\n"
    speedup = s["forms"]["padded"]["packed_is_faster_by"]
    rows = [
        ("fill of one epoch's blocks", f["fill"], f"at least {AIMS['fill']}"),
        ("useful tokens/s, packed over padded", speedup, f"at least {AIMS['speedup']}"),
        ("our speed over the bare model's", o["speed_over_bare"], f"at least {AIMS['overhead']}"),
        ("the same, bare model plain causal", o["speed_over_plain_causal"], None),
    ]
    body += report.table(("measure", "value", "aim"), rows)
    body += "\n\n" + report.table(("blocks of one epoch", "value"), report.flat(f)) + "\n\n"
    names = list(s["forms"]["packed"])
    body += report.table(("form", *names), [(n, *form.values()) for n, form in s["forms"].items()])
    body += f"\n\nForward and backward over the same {s['sequences']} sequences; medians of "
    body += f"{s['repeats']} turns.\n\n"
    rows = [(n, o["seconds"][n], o["useful_tokens_per_second"][n]) for n in o["seconds"]]
    body += report.table(("whole step", "seconds", "useful tokens/s"), rows)
    body += f"\n\nMedians of {o['steps']} steps with optimizer and clipping, {o['num_workers']} "
    return body + "loading processes."


def arguments() -> ArgumentParser:
    return cli.parser(
        __doc__,
        data=False,
        batch_size=(4, "blocks per batch"),
        shards=(str, "folder that `lavit-tok shards` wrote"),
        split=("train", "of the shards"),
        text_tokenizer=(str, "directory or Hub id"),
        model=("recipes/lm/lavit.yaml", "a recipe of lavit-lm, or the JSON config of an LM"),
        dtype=("float32", "bf16: autocast over float32", ["float32", "bf16"]),
        tokenizer=("default", "of the shards: 'default', a directory or a Hub id"),
        block=(128, "positions of a block"),
        window=(4096, "sequences planned together"),
        batches=(4, "packed batches that are timed"),
        repeats=(5, "turns of packed and padded"),
        steps=(10, "steps of Lightning, and of the bare model"),
        warm=(2, "steps before them that do not count"),
        num_workers=(0, "loading processes"),
        seed=(0, "of order, weights and synthetic records"),
        name=("packing", "of the result files"),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))

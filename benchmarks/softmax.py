"""What does a training step cost with the softmax over all ids, and over those that can be there?

    hidden states -> head -> logits of all ids         -> cross-entropy     LaVIT()
                          -> logits of a rank's stage   -> cross-entropy     restricted_softmax=True

Steps with an optimizer, on images of 4 to 32 random nested codes with a text of 6 tokens, packed
as in training. Timed in turns. Writes softmax.md and .json.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.packing import autocast, lm_config
from benchmarks.shared import cli, report, timing
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.packing import PackedBatch, pack, plan_blocks
from lavit_lm.sequences.token_sequence import Role, SequenceBuilder, TokenSequence
from lavit_lm.vocabulary.text_tokenizer import TEXT_IDS
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary

LENGTHS = (4, 8, 12, 16, 16, 24, 32)
"""Numbers of codes, as frequent as here; the mean is that of images of the captioned data set."""
TOKENS = 6  # of a text


def sequence(v: VisualVocabulary, generator: torch.Generator) -> TokenSequence:
    """An image and a text of random ids, all predicted."""
    count = LENGTHS[int(torch.randint(len(LENGTHS), (), generator=generator))]
    count = min(count, v.max_codes or count)
    codes = v.to_ids(torch.randint(v.codebook_size, (count,), generator=generator)).tolist()
    text = torch.randint(3, TEXT_IDS, (TOKENS,), generator=generator).tolist()
    builder = SequenceBuilder().text([0]).add([v.begin], Role.BEGIN, predict=True)
    builder.add(codes, Role.VISUAL, predict=True).add([v.end], Role.END, predict=True)
    return builder.text(text, predict=True).build()


def batch_of(v: VisualVocabulary, args: Namespace) -> PackedBatch:
    """--batch-size blocks of --block positions."""
    generator = torch.Generator().manual_seed(args.seed)
    sequences = [sequence(v, generator) for _ in range(args.batch_size * args.block // 8)]
    blocks = plan_blocks([len(s) for s in sequences], args.block)[: args.batch_size]
    return pack([[sequences[i] for i in block] for block in blocks], args.block, 0)


def main(args: Namespace) -> dict[str, Any]:
    v = VisualVocabulary(TEXT_IDS, TEXT_IDS + 1, TEXT_IDS + 2, args.codebook_size, args.stages)
    config = {**lm_config(args.model), "vocab_size": v.stop}
    torch.manual_seed(args.seed)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(args.device).train()
    batch, objective = batch_of(v, args).to(args.device), LaVIT()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4)

    def step(model: SequenceModel) -> Tensor:
        with autocast(args.device, args.dtype):
            loss = objective.total(objective.losses(model(batch), batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    models = {
        "all ids": SequenceModel(lm),
        "ids that can be there": SequenceModel(lm, restricted=v),
    }
    calls = {name: partial(step, model) for name, model in models.items()}
    times = timing.in_turns(calls, args.repeats, args.warm)
    ratio = timing.ratio(*times.values())
    values = {
        "parameters": sum(p.numel() for p in lm.parameters()),
        "ids": v.stop,
        "positions": batch.ids.numel(),
        "targets": int(batch.predict.sum()),
        "seconds": {name: found.median for name, found in times.items()},
        "ratio": ratio,
    }
    body = f"Model {Path(args.model).name}: {values['parameters'] / 1e6:.1f} M weights, {v.stop} "
    body += f"ids; {args.dtype}; {values['positions']} positions, {values['targets']} targets, "
    body += f"{args.repeats} steps in turns.\n\n"
    rows = [(f"softmax over {name}", seconds) for name, seconds in values["seconds"].items()]
    body += report.table(("step", "seconds"), [*rows, ("ratio", ratio)])
    report.write("softmax", args, "Softmax over all ids, and over fewer", body, values)
    return values


def arguments() -> ArgumentParser:
    return cli.parser(
        __doc__,
        data=False,
        model=("recipes/lm/lavit.yaml", "a recipe of lavit-lm, or the JSON config of an LM"),
        codebook_size=(4096, "K of each stage"),
        stages=(8, "of the nested codes that have ids"),
        dtype=("float32", "bf16: autocast over float32", ["float32", "bf16"]),
        block=(128, "positions of a block"),
        repeats=(3, "steps of each"),
        warm=(1, "steps before them that do not count"),
        seed=(0, "of weights and sequences"),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))

"""What guidance, the cache and the constraint cost when pictures' codes are generated, beside `transformers`' own loop.

    unguided, guided             B prompts, one batch of B or 2 B rows, keys and values kept
    unguided, guided, uncached   the same, everything computed anew at each step
    transformers, guided         `generate` of the bare model from the same rows: any id, as many; its guidance runs the
                                 model twice a step
    constraint                   making the mask of allowed ids and applying it, alone

Every picture gets exactly --codes codes, so that all forms take the same steps; prompts have unequal lengths. The forms
take turns, ratios are medians of the pairs' ratios. With the same generators, cached and uncached must draw the same
codes. Random weights unless --model names a trained model: speed does not depend on what the numbers are. Finished
batch sizes are kept if the run is killed. Writes generate_speed.md, .json and .png.
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from language_models import LENGTHS, SHAPES, histogram, shape, synthetic
from parts import Parts, digest, progress
from timing import interleaved, ratio
from torch import Tensor

import lavit_lm
import lavit_tok
from lavit_lm import MultimodalLM
from lavit_lm.generation.sampling import GenerationConstraint
from lavit_lm.models.kv_state import left_padded
from lavit_lm.sequences.packing import FREE
from lavit_lm.training.module import LanguageModeling
from lavit_lm.vocabulary.text_tokenizer import train_text_tokenizer
from lavit_tok import VisualTokenizer

GUIDED = 1.3
"""The aim: guided over unguided, at most."""
TEXT_IDS = 4096


def build(a: Namespace, captions: list[str]) -> MultimodalLM:
    """A trained model, or one of a stated shape with random weights and a text tokenizer learnt from the captions."""
    dtype = getattr(torch, a.dtype)
    if a.model == "default" or (Path(a.model) / "lavit_lm.json").exists():
        return MultimodalLM.from_pretrained(
            a.model, visual_tokenizer=a.tokenizer, decoder=None, dtype=dtype, device=a.device
        )
    name = a.tokenizer or "default"
    with tempfile.TemporaryDirectory() as folder:
        train_text_tokenizer(captions, TEXT_IDS).save_pretrained(folder)
        module = LanguageModeling(shape(a.model), folder, name, seed=a.seed)
        module.configure_model()
        visual = VisualTokenizer.from_pretrained(name, device=a.device)
        assert module.model is not None
        return MultimodalLM(module.model.to(a.device, dtype), module.processor, visual)


def measure(lm: MultimodalLM, prompts: list[str], a: Namespace) -> dict[str, Any]:
    """Times of one batch size, and whether cached and uncached drew the same codes."""
    found: dict[str, list[list[int]]] = {}

    def generate(name: str, guidance: float, cached: bool) -> Callable[[], None]:
        def call() -> None:
            generators = [torch.Generator().manual_seed(a.seed + i) for i in range(len(prompts))]
            codes = lm.generate_codes_batch(
                prompts,
                guidance,
                generators,
                min_codes=a.codes,
                max_codes=a.codes,
                top_k=a.top_k,
                use_cache=cached,
            )
            found[name] = codes.to_list()

        return call

    forms = {"unguided": (1.0, True), "guided": (a.guidance, True)}
    if not a.cached_only:
        forms |= {"unguided, uncached": (1.0, False), "guided, uncached": (a.guidance, False)}
    calls: dict[str, Callable[[], Any]] = {
        name: generate(name, *how) for name, how in forms.items()
    }
    calls |= {
        "transformers": bare(lm, prompts, 1.0, a),
        "transformers, guided": bare(lm, prompts, a.guidance, a),
    }
    times = interleaved(list(calls.values()), a.repeats, a.device, a.seconds, warm=1)
    walls = {name: [wall for wall, _ in each] for name, each in zip(calls, times, strict=True)}
    seconds = {name: statistics.median(each) for name, each in walls.items()}
    values: dict[str, Any] = {
        "batch": len(prompts),
        "codes": a.codes,
        "repeats": len(walls["unguided"]),
        "seconds": seconds,
        "codes_per_second": {
            name: len(prompts) * a.codes / value for name, value in seconds.items()
        },
        "guided_over_unguided": ratio(walls["guided"], walls["unguided"]),
        "over_transformers": {
            "unguided": ratio(walls["unguided"], walls["transformers"]),
            "guided": ratio(walls["guided"], walls["transformers, guided"]),
        },
        "constraint": constraint(lm, len(prompts), a)
        | {"step": seconds["unguided"] / (a.codes + 1)},
    }
    values["constraint"]["share"] = values["constraint"]["seconds"] / values["constraint"]["step"]
    if not a.cached_only:
        for name in ("unguided", "guided"):
            values[f"uncached_over_cached_{name}"] = ratio(walls[f"{name}, uncached"], walls[name])
            values[f"cached_equals_uncached_{name}"] = found[name] == found[f"{name}, uncached"]
            values[f"equal_codes_{name}"] = equal_share(found[name], found[f"{name}, uncached"])
    return values


def bare(
    lm: MultimodalLM, prompts: list[str], guidance: float, a: Namespace
) -> Callable[[], Tensor]:
    """`transformers`' own sampling loop from the same rows, as a user without this library would call it."""
    rows, free = (
        [lm.prompts.for_image(prompt) for prompt in prompts],
        lm.prompts.sequence([], "image"),
    )
    ids, _, _, documents = left_padded(rows, lm.processor.pad)
    given = {
        "input_ids": ids.to(lm.device),
        "attention_mask": (documents != FREE).long().to(lm.device),
    }
    options: dict[str, Any] = {
        "min_new_tokens": a.codes,
        "max_new_tokens": a.codes,
        "do_sample": True,
    }
    options |= {"top_k": a.top_k, "pad_token_id": lm.processor.pad}
    if guidance != 1:
        options |= {
            "guidance_scale": guidance,
            "negative_prompt_ids": free.ids.expand(len(rows), -1).to(lm.device),
        }

    def call() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(a.seed)
            return lm.model.causal.generate(**given, **options)[:, ids.shape[1] :]

    return call


def equal_share(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of codes that are equal; rows are equally long."""
    return float((torch.tensor(a) == torch.tensor(b)).double().mean())


def constraint(lm: MultimodalLM, batch: int, a: Namespace, repeats: int = 200) -> dict[str, float]:
    """Seconds a step for the mask of allowed ids and its use, and once a call for what they are made from."""
    size, device = lm.model.causal.get_output_embeddings().out_features, lm.device
    rule, logits = (
        GenerationConstraint("image", 1, a.codes),
        torch.zeros(batch, size, device=device),
    )
    stops = torch.tensor(rule.stop_ids(lm.processor), device=device)
    words = rule.content_mask(lm.processor, size, device)

    def once() -> Tensor:
        return rule.content_mask(lm.processor, size, device)

    def each_step() -> Tensor:
        return logits.masked_fill(~rule.allowed(words, stops, 1), -torch.inf)

    first, steps = (
        [w for w, _ in times] for times in interleaved([once, each_step], repeats, a.device)
    )
    return {"seconds": statistics.median(steps), "seconds_once": statistics.median(first)}


# The script


def main(a: Namespace) -> dict[str, Any]:
    pairs = synthetic(max(2048, *a.batch_sizes), histogram(LENGTHS), 2, a.seed)
    captions = [pair["caption"] for pair in pairs]
    lm = build(a, captions)
    patches = lm.visual_tokenizer.config.num_patches
    if a.codes > patches:
        raise ValueError(
            f"--codes: expected 1..{patches}, as many as a picture has patches, got {a.codes}"
        )
    settings = common.given(a)
    where = common.provenance("generate_speed", packages=(lavit_tok, lavit_lm))
    parts = Parts(a.out, a.name, settings | {"weights": digest(lm.model), "where": where})
    sizes = progress(a.batch_sizes, "batch sizes", len(a.batch_sizes))
    runs = [
        parts.values(f"batch-{size}", partial(measure, lm, captions[:size], a)) for size in sizes
    ]
    parameters = sum(p.numel() for p in lm.model.parameters())
    values = {
        "model": Path(a.model).name,
        "parameters": parameters,
        "dtype": a.dtype,
        "guidance": a.guidance,
        "target": GUIDED,
        "runs": runs,
    }
    plot(runs, a.out / f"{a.name}.png")
    common.write(a.name, a.out, "Generating codes", text(values, a), values)
    parts.done()
    return values


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Codes a second of every form, by batch size."""
    plt = common.pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for name in runs[0]["seconds"]:
        style = {"color": "0.5"} if name.startswith("transformers") else {}
        marks = {
            "linestyle": "--" if "guided" in name.split(", ") else "-",
            "marker": "x" if "uncached" in name else "o",
        }
        values = [r["codes_per_second"][name] for r in runs]
        axis.plot([r["batch"] for r in runs], values, label=name, **style, **marks)
    axis.set_xticks([r["batch"] for r in runs], [str(r["batch"]) for r in runs])
    axis.set(xlabel="pictures at a time", ylabel="codes/s", yscale="log")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def text(v: dict[str, Any], a: Namespace) -> str:
    body = f"Model {v['model']}, {v['parameters'] / 1e6:.1f} M weights, {v['dtype']}; {v['runs'][0]['codes']} codes a "
    body += (
        f"picture, guidance {v['guidance']:g}. Aim: guided over unguided at most {v['target']}.\n\n"
    )
    rows = [
        (
            r["batch"],
            *(r["seconds"][k] for k in ("unguided", "guided")),
            f"{r['guided_over_unguided']:.3f}",
            *(r["codes_per_second"][k] for k in ("unguided", "guided")),
        )
        for r in v["runs"]
    ]
    head = (
        "batch",
        "seconds unguided",
        "guided",
        "guided over unguided",
        "codes/s unguided",
        "guided",
    )
    body += common.table(head, rows)
    if "unguided, uncached" in v["runs"][0]["seconds"]:
        head = (
            "batch",
            "uncached over cached, unguided",
            "guided",
            "equal codes, unguided",
            "guided",
        )
        rows = [
            (
                r["batch"],
                *(f"{r[f'uncached_over_cached_{k}']:.2f}" for k in ("unguided", "guided")),
                *(f"{100 * r[f'equal_codes_{k}']:.2f} %" for k in ("unguided", "guided")),
            )
            for r in v["runs"]
        ]
        body += "\n\n" + common.table(head, rows)
    head = ("batch", "over transformers' own loop, unguided", "guided")
    rows = [
        (r["batch"], *(f"{r['over_transformers'][k]:.3f}" for k in ("unguided", "guided")))
        for r in v["runs"]
    ]
    body += "\n\n" + common.table(head, rows)
    head = ("batch", "constraint, ms a step", "a step, ms", "share", "once a call, ms")
    rows = [
        (
            r["batch"],
            *(f"{1000 * r['constraint'][k]:.3f}" for k in ("seconds", "step")),
            f"{100 * r['constraint']['share']:.1f} %",
            f"{1000 * r['constraint']['seconds_once']:.3f}",
        )
        for r in v["runs"]
    ]
    body += "\n\n" + common.table(head, rows)
    body += f"\n\nMedians of {min(r['repeats'] for r in v['runs'])} turns after one that does not count."
    return body + f"\n\n![codes/s]({a.name}.png)"


def arguments() -> Any:
    found = common.parser(__doc__, data=False, tokenizer=False)
    found.add_argument(
        "--model",
        default="small",
        help=f"'default', a directory, {', '.join(SHAPES)} or a JSON config",
    )
    found.add_argument("--tokenizer", help="visual tokenizer, if not the one that the model names")
    found.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the weights",
    )
    found.add_argument(
        "--batch-sizes",
        type=common.positive,
        nargs="+",
        default=[1, 8, 32],
        help="prompts at a time",
    )
    found.add_argument("--codes", type=common.positive, default=20, help="codes a picture")
    found.add_argument("--guidance", type=float, default=3.0)
    found.add_argument("--top-k", type=common.positive, default=50)
    found.add_argument("--repeats", type=common.positive, default=5)
    found.add_argument("--seconds", type=float, default=0.0, help="turns for at least this long")
    found.add_argument(
        "--cached-only", action="store_true", help="leave out the uncached forms, which are slow"
    )
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--name", default="generate_speed", help="of the result files")
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

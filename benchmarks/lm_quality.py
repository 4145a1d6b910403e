"""Does the language model generate what a caption describes, and how well does it predict codes?

    images  caption -> codes or vectors -> image: is its own caption the nearest one, how near is
            it, and how far are the images from the true ones; several seeds
    bits    -log2 p(code) after its caption, and without it, beside the codes' unigram entropy

Every image has a caption that no other has. Nearness is measured in the space of --scorer;
distances are FID only with --inception. Baselines: the true images, images decoded from their own
codes, and for distances as many other true images. Writes lm_quality.md, .json, and true beside
generated images as lm_quality.png. A stopped run continues where it was.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import json
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared import cli, datasets, metrics, plots, protocol, report
from benchmarks.shared.cache import Stages, generator_for
from benchmarks.shared.provenance import recipe
from lavit_lm import MultimodalLM
from lavit_lm.models.losses import target_nats
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.packing import pad
from lavit_lm.sequences.segments import ImageSegment, TextSegment
from lavit_lm.sequences.token_sequence import Role
from lavit_tok import VisualCodes, VisualImageProcessor
from lavit_tok.training.codebook import usage

PARTS = ["images", "bits"]
COCO = 30_000
AMONG = 100
SHOWN = 16
MODEL: dict[str, tuple[Any, ...]] = {
    "model": ("default", "'default', a directory or a Hub id"),
    "visual_tokenizer": (str, "by default the one that the model names"),
    "scorer": (Path, "folder that recipes/default/scorer.py wrote: what do captions identify?"),
}
SAMPLING: dict[str, tuple[Any, ...]] = {
    "decoder": ("default", "'default', a directory or a Hub id"),
    "guidance": (3.0, "guidance scale of the language model, where it generates codes"),
    "top_k": (50, "of sampling codes"),
    "top_p": (float, "of sampling codes"),
    "temperature": (1.0, "of sampling codes"),
    "best_of": (1, "images per caption, of which the one is kept that makes it most probable"),
    "steps": (20, "decoding steps"),
    "decoder_guidance": (2.0, "guidance scale of the decoder"),
    "mode": (str, "mean or sample, of the decoder; by default its own"),
}
AIMS = {"top-5 over chance": 5, "bits below unigram entropy": 0.15}


def choose(captions: Sequence[str], count: int, seed: int, exclude: Any = ()) -> list[int]:
    """Indices of `count` images by the seed, whose captions all differ.

    Raises:
        ValueError: fewer different captions.
    """
    by_caption: dict[str, list[int]] = {}
    for index, caption in enumerate(captions):
        if caption.strip() and datasets.normalized(caption) not in exclude:
            by_caption.setdefault(caption, []).append(index)
    if len(by_caption) < count:
        expected = f"expected at most the {len(by_caption)} different captions"
        raise ValueError(f"--captions: {expected} there are, got {count}")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(sorted(by_caption), size=count, replace=False).tolist()
    return [int(rng.choice(by_caption[caption])) for caption in chosen]


class ImageGenerator:
    """Generates images of captions; each depends on (seed, image key) alone."""

    def __init__(self, lm: MultimodalLM, args: Namespace, size: int, stages: Stages) -> None:
        self.lm, self.args, self.stages = lm, args, stages
        self.processor = VisualImageProcessor(size, "center_crop")
        self.decoding = {"num_inference_steps": args.steps, "guidance_scale": args.decoder_guidance}
        if args.mode:
            self.decoding["mode"] = args.mode

    def __call__(self, captions: list[str], keys: list[str], seed: int) -> dict[str, Tensor]:
        """uint8 images [n 3 S S], and how many codes each has (0 for vectors)."""
        args, lm = self.args, self.lm
        if lm.objective.image_output.kind == "codes":
            n = args.best_of
            numbers: list[tuple[int, ...]] = [(), *((i,) for i in range(1, n))]
            draws = [generator_for("codes", seed, k, *i) for k in keys for i in numbers]
            sampling = {n: getattr(args, n) for n in ("top_k", "top_p", "temperature")}
            repeated = [caption for caption in captions for _ in range(n)]
            codes = lm.generate_codes_batch(repeated, args.guidance, draws, **sampling)
            if n > 1:
                found = self.decode(codes, [f"{key} {i}" for key in keys for i in range(n)], seed)
                shown = [found["images"][i : i + n] for i in range(0, len(codes), n)]
                pairs = enumerate(zip(shown, captions, strict=True))
                best = [i * n + lm.rerank(of, caption)[0] for i, (of, caption) in pairs]
                return {name: values[best] for name, values in found.items()}
            return self.decode(codes, keys, seed)
        return self.decode(lm.generate_vectors_batch(captions), keys, seed)

    def of(self, given: list[str] | VisualCodes, keys: list[str], seed: int) -> dict[str, Tensor]:
        """Images generated from captions, or decoded from codes, in batches; each is a stage."""

        def compute(batch: list[int]) -> dict[str, Tensor]:
            own = [keys[i] for i in batch]
            if isinstance(given, VisualCodes):
                return self.decode(given.take(batch), own, seed)
            return self([given[i] for i in batch], own, seed)

        stage = f"{'decode' if isinstance(given, VisualCodes) else 'generate'} {seed}"
        return self.stages.tensors(stage, range(len(keys)), self.args.batch_size, compute)

    def decode(self, outputs: Any, keys: Sequence[str], seed: int) -> dict[str, Tensor]:
        noise = [generator_for("noise", seed, key) for key in keys]
        images = self.lm.decode_images(outputs.to(self.lm.device), noise, **self.decoding)
        lengths = getattr(outputs, "lengths", torch.zeros(len(images), dtype=torch.int64))
        return {"images": self.processor.to_uint8(images), "codes": lengths.cpu()}


class Judge:
    """Numbers of images with their captions: nearness to them, and distances to true images."""

    def __init__(self, args: Namespace, lm: Any, true: Tensor, captions: list[str]) -> None:
        spaces = metrics.feature_spaces(lm.visual_tokenizer, args.inception, args.device)
        space = "the visual tokenizer's encoder space"
        self.spaces = {protocol.distance_name(k, "FID", space): s for k, s in spaces.items()}
        self.scorer: Any = None
        if args.scorer:
            self.scorer = recipe("default/scorer.py").load_scorer(args.scorer, args.device)
        self.text = self.scorer.embed(captions) if self.scorer else torch.zeros(0)
        self.true = self.features(true)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        parts = images.split(64)
        return {name: torch.cat([s(part) for part in parts]) for name, s in self.spaces.items()}

    def nearness(self, images: Tensor) -> dict[str, float]:
        """Is the own caption the nearest of the first AMONG, and how near is it?"""
        if self.scorer is None:
            return {}
        vectors, text = self.scorer.describe(images), self.text
        hits = self.scorer.identified(vectors[:AMONG], text[:AMONG])
        numbers = {f"own caption among {min(AMONG, len(text))}, {k}": v for k, v in hits.items()}
        cosine = float((vectors * text).sum(1).mean())
        return numbers | {"100 x cosine with the own caption": 100 * cosine}

    def distances(self, images: Tensor) -> dict[str, float]:
        found = self.features(images)
        return {name: metrics.frechet(self.true[name], found[name]) for name in found}

    def __call__(self, images: Tensor) -> dict[str, float]:
        return self.nearness(images) | self.distances(images)


def encode(lm: MultimodalLM, pixels: Tensor) -> VisualCodes:
    """The codes of images that have ids."""
    budget = lm.objective.image_output.encode_budget(lm.visual_tokenizer.config.num_patches)
    codes = lm.visual_tokenizer.encode(pixels, budget=budget).to("cpu")
    most = lm.processor.vocabulary.max_codes
    return codes if most is None else codes.truncate(most)


def measure_images(
    lm: MultimodalLM, data: datasets.ImageSet, indices: list[int], stages: Stages, args: Namespace
) -> tuple[dict[str, Any], Tensor]:
    """Numbers of every seed with their baselines, and the first seed's images."""
    captions, keys = [data.captions[i] for i in indices], [data.keys[i] for i in indices]
    pixels, count = data.pixels[indices], len(indices)
    if args.inception:
        protocol.refuse_few(count, args.force)
    judge = Judge(args, lm, pixels, captions)
    generator = ImageGenerator(lm, args, pixels.shape[-1], stages)
    codes = encode(lm, pixels) if lm.objective.image_output.kind == "codes" else None
    runs: dict[str, list[Any]] = {"generated": [], "from_own_codes": []}
    first: Any = None

    for seed in range(args.seeds):
        made = generator.of(captions, keys, seed)
        images, lengths = made["images"], made["codes"].double()
        runs["generated"].append(judge(images) | {"codes per image": float(lengths.mean())})
        first = images if first is None else first
        if codes is not None:
            runs["from_own_codes"].append(judge(generator.of(codes, keys, seed)["images"]))
    others = sorted(set(range(len(data))) - set(indices))[:count]
    true = judge.nearness(pixels)
    if len(others) == count:  # a distance that no model is expected to be far below
        true |= judge.distances(data.pixels[others])
    checks = {
        "the images are not declared to be coco-val2014": args.set_name != "coco-val2014",
        f"{count} captions, not {COCO}, and all different": True,
        f"{len(data.rejects)} unreadable images left out": bool(data.rejects),
        "another feature space than Inception's": not args.inception,
    }
    departures = [text for text, departs in checks.items() if departs]
    values = {name: report.spreads(numbers) for name, numbers in runs.items()}
    return {"captions": count, **values, "true": true, "departures": departures}, first


@torch.no_grad()
def code_nats(
    lm: MultimodalLM, codes: VisualCodes, captions: Sequence[str] | None, batch_size: int
) -> Tensor:
    """-log p in nats, float64 [images 2]: sums over each image's codes, and of the id that ends it.

    Probabilities are as in training: over the whole vocabulary, or over what can be at a position.

    Args:
        captions: prompts of the images; None for images without a prompt.
    """
    layout, generator = LaVIT("text_first", prompt_drop=0.0).layout, torch.Generator()
    sequences = []
    for i in range(len(codes)):
        prompt = [] if captions is None else [TextSegment(captions[i])]
        image = ImageSegment(codes[i].cpu())
        sequences.append(layout([*prompt, image], lm.processor, generator, str(i)))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # little padding
    nats = torch.zeros(len(sequences), 2, dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad([sequences[i] for i in chosen], lm.processor.pad).to(lm.device)
        targets = (batch.roles == Role.VISUAL) | (batch.roles == Role.END)
        losses, at = target_nats(lm.model(batch), replace(batch, predict=targets))
        losses = losses.double().cpu()
        element = torch.div(at, batch.ids.shape[1], rounding_mode="floor").cpu()
        is_end = (batch.roles.flatten()[at] == Role.END).long().cpu()
        nats.index_put_((torch.tensor(chosen)[element], is_end), losses, accumulate=True)
    return nats


def measure_bits(
    lm: MultimodalLM, data: datasets.ImageSet, stages: Stages, args: Namespace
) -> dict[str, Any]:
    """Bits per code of all images that have a caption, and of each source of a mixed set."""
    size, indices = lm.visual_tokenizer.config.codebook_size, data.with_caption()
    pixels = data.pixels[indices].split(args.batch_size)
    codes = VisualCodes.cat([encode(lm, part) for part in pixels])
    prompts = {"given the caption": [data.captions[i] for i in indices], "without it": None}
    nats = {}
    for name, captions in prompts.items():
        compute = partial(code_nats, lm, codes, captions, args.batch_size)
        nats[name] = stages(f"nats {name}", compute)

    def numbers(chosen: list[int]) -> dict[str, Any]:
        some = codes.take(chosen)
        total, v = int(some.lengths.sum()), lm.processor.vocabulary
        ids = torch.cat([v.to_ids(one) for one in some]) - v.first
        stage, tables = torch.div(ids, size, rounding_mode="floor"), max(1, v.stages)
        # of codes given their stage
        unigram = usage(ids, tables * size).entropy_bits - usage(stage, tables).entropy_bits
        found: dict[str, Any] = {"images": len(chosen), "codes": total, "unigram_entropy": unigram}
        for name, values in nats.items():
            per_code = float(values[chosen, 0].sum()) / total / math.log(2)
            found[name] = {
                "bits_per_code": per_code,
                "below_unigram": 1 - per_code / unigram if unigram else float("nan"),
                "bits_per_code_with_end": float(values[chosen].sum()) / total / math.log(2),
            }
        return found

    result = numbers(list(range(len(indices))))
    groups = data.groups(indices)
    if groups:
        result["by_source"] = {name: numbers(chosen) for name, chosen in groups.items()}
    return result


def load(args: Namespace, decoder: str | None) -> tuple[Any, datasets.ImageSet, dict[str, Any]]:
    """The model, the images at the size of its tokenizer, and what a result states of both."""
    options = {"visual_tokenizer": args.visual_tokenizer, "decoder": decoder}
    lm = MultimodalLM.from_pretrained(args.model, device=args.device, **options)
    crop = lm.visual_tokenizer.image_processor.resize_mode == "center_crop"
    size = lm.visual_tokenizer.config.image_size
    data = datasets.load_images(args.data, size, args.split, args.limit, crop)
    about = {**data.record(), "model": Path(args.model).name}
    return lm, data, about | {"parameters": sum(p.numel() for p in lm.model.parameters())}


def main(args: Namespace) -> dict[str, Any]:
    lm, data, about = load(args, args.decoder if "images" in args.parts else None)
    known = datasets.training_captions(args.data)
    indices = []
    if args.parts != ["bits"]:
        exclude = known if args.unseen else frozenset()
        indices = choose(data.captions, args.captions, args.seed, exclude)
    decoder = lm.decoder if "images" in args.parts else None
    stages = Stages(args, args.name, lm.model, lm.visual_tokenizer, decoder, data.pixels)
    values: dict[str, Any] = {
        **about,
        "sampling": {name: getattr(args, name) for name in SAMPLING if name != "decoder"},
        "seed": args.seed,
        "seen_in_training": sum(datasets.normalized(data.captions[i]) in known for i in indices),
    }
    if "bits" in args.parts:
        values["bits"] = measure_bits(lm, data, stages, args)
    if "images" in args.parts:
        values["images"], first = measure_images(lm, data, indices, stages, args)
        shown, path = indices[:SHOWN], args.out / f"{args.name}.png"
        labels = [data.captions[i] for i in shown]
        plots.pairs(path, data.pixels[shown], first[:SHOWN], ("true", "generated"), labels)
    report.write(args.name, args, "Language model quality", text(values, args), values)
    stages.done()
    return values


def text(v: dict[str, Any], args: Namespace) -> str:
    body = f"{v['set']}. Model {v['model']}, {v['parameters'] / 1e6:.1f} M weights; "
    body += f"{json.dumps(v['sampling'])}. Captions by seed {v['seed']}; the train split has "
    body += f"{v['seen_in_training']} of them, too. Aims: {json.dumps(AIMS)}."
    if "images" in args.parts:  # otherwise their number is stored there
        found = v["images"]
        columns = [found[k] for k in ("generated", "from_own_codes", "true")]
        rows = [(name, *(column.get(name) for column in columns)) for name in columns[0]]
        labels = "generated", "from the true codes", "true images"
        body += f"\n\n## Images of {found['captions']} captions\n\nMean ± std over {args.seeds} "
        body += "seeds; a distance of true images is that of as many others of the set.\n\n"
        body += report.table(("measure", *labels), rows)
        chance = 1 / min(AMONG, found["captions"])
        body += f"\n\nChance: {chance:.3g} for top-1, five times that for top-5."
        if found["departures"]:
            body += " Not comparable with published FID: " + "; ".join(found["departures"]) + "."
        body += f"\n\n![true and generated images]({args.name}.png)"
    if "bits" in v:
        found, names = v["bits"], ("given the caption", "without it")
        groups = {"all": found, **found.get("by_source", {})}
        bits = {g: [x[n]["bits_per_code"] for n in names] for g, x in groups.items()}
        rows = [(g, x["codes"], *bits[g], x["unigram_entropy"]) for g, x in groups.items()]
        heads = ("source", "codes", *names, "unigram entropy of these codes")
        body += "\n\n## Bits per code\n\n" + report.table(heads, rows)
        body += f"\n\nGiven the caption {100 * found[names[0]]['below_unigram']:.1f} % below the "
        body += "unigram entropy, which comes out too low for few codes."
    return body + report.rejected(v["rejects"])


def arguments() -> ArgumentParser:
    return cli.parser(
        __doc__,
        batch_size=(50, "captions or images per batch"),
        **MODEL,
        **SAMPLING,
        parts=(PARTS, "what is measured", PARTS),
        captions=(100, "captions that images are generated for"),
        unseen=(False, "only captions that the train split does not have"),
        seed=(0, "of the choice of captions"),
        seeds=(3, "seeds of the images"),
        inception=(Path, "Inception-v3 weights of torch-fidelity, for FID"),
        set_name=(str, "what the images are", ["coco-val2014"]),
        force=(False, f"FID even under {protocol.FID_MIN_IMAGES} images"),
        name=("lm_quality", "of the result files"),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))

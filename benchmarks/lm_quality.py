"""Does the language model draw what a caption says, and say what a picture shows? On pictures held out from training.

    images    caption -> codes -> picture -> scorer: is its own caption among the nearest five of all? Several seeds
    captions  picture -> caption -> is its own picture, and its own true caption, among the nearest five of all?
    bits      -log2 p(code) with its caption before it, and without, against the unigram entropy of the same codes

The captions are distinct, one picture each. Some of them may be captions of training pictures too ("a photo of a bag"):
how many is said, and the rest are scored apart. Ceilings: what the true pictures score, and pictures drawn from their
own codes, by the same decoder. caption_space.py says what scores. Writes lm_quality.md, .json and, of sixteen captions,
true and generated pictures in lm_quality.png.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import painting
import picture_sets
import torch
from caption_space import Scorer, embed, ranks, top
from lm_quality_report import SHOWN, contact_sheet, text
from PIL import Image as Picture
from torch import Tensor
from torch.nn import functional as F

from lavit_lm import MultimodalLM
from lavit_lm.models.losses import sources
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.packing import pad
from lavit_lm.sequences.segments import ImageSegment, Role, TextSegment
from lavit_tok import VisualCodes
from lavit_tok.data.image_sources import load_splits

PARTS = ("images", "captions", "bits")

# What is asked


def choose(
    captions: Sequence[str], count: int, seed: int, never: frozenset[str] = frozenset()
) -> list[int]:
    """Places of `count` different captions, and for each one of its pictures, by chance.

    Raises:
        ValueError: fewer captions than that.
    """
    places: dict[str, list[int]] = {}
    for place, caption in enumerate(captions):
        if caption.strip() and caption not in never:
            places.setdefault(caption, []).append(place)
    if len(places) < count:
        raise ValueError(
            f"--captions: expected at most the {len(places)} different captions there are, got {count}"
        )
    rng = np.random.default_rng(seed)
    chosen = rng.choice(sorted(places), size=count, replace=False).tolist()
    return [int(rng.choice(places[caption])) for caption in chosen]


def training_captions(data: str) -> frozenset[str]:
    """All captions of the train split; none if there is no such split."""
    rows = load_splits(data).get("train")
    return (
        frozenset()
        if rows is None or "caption" not in rows.column_names
        else frozenset(rows["caption"])
    )


# Bits


@torch.no_grad()
def code_nats(
    lm: MultimodalLM, codes: VisualCodes, captions: Sequence[str] | None, batch_size: int
) -> Tensor:
    """-log p in nats, float64 [images 2]: sums over each image's codes, and of the id that ends it.

    `captions` stand before the images; None gives the stream without a prompt. Probabilities are over the whole
    vocabulary, as in training.
    """
    layout, generator = LaVIT("text_first", prompt_drop=0.0).layout, torch.Generator()
    rows = []
    for i in range(len(codes)):
        before = [] if captions is None else [TextSegment(captions[i])]
        rows.append(
            layout([*before, ImageSegment(codes[i].cpu())], lm.processor, generator, str(i))
        )
    order = sorted(
        range(len(rows)), key=lambda i: len(rows[i])
    )  # of like lengths together, so that little is padding
    found = torch.zeros(len(rows), 2, dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad([rows[i] for i in chosen], lm.processor.pad).to(lm.device)
        before, at = sources(batch, (batch.roles == Role.VISUAL) | (batch.roles == Role.END))
        logits = lm.model.head(lm.model.see(batch).states.flatten(0, 1)[before]).float()
        nats = F.cross_entropy(logits, batch.ids.flatten()[at], reduction="none").double().cpu()
        row = torch.tensor(chosen)[torch.div(at, batch.ids.shape[1], rounding_mode="floor").cpu()]
        found.index_put_(
            (row, (batch.roles.flatten()[at] == Role.END).long().cpu()), nats, accumulate=True
        )
    return found


def entropy(codes: VisualCodes) -> float:
    """Of the codes' own shares, in bits: what a model that knows nothing but these shares would need for each code."""
    counts = codes.values.bincount().double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())


def bits(
    lm: MultimodalLM, pictures: picture_sets.Pictures, codes: VisualCodes, a: Namespace
) -> dict[str, Any]:
    """Bits a code of all pictures that have a caption, and of each source of a mixed set."""
    said = [i for i, caption in enumerate(pictures.captions) if caption.strip()]
    codes, captions = codes.take(said), [pictures.captions[i] for i in said]
    count, total = len(said), int(codes.lengths.sum())
    nats = {
        "given the caption": code_nats(lm, codes, captions, a.batch_size),
        "without it": code_nats(lm, codes, None, a.batch_size),
    }
    unigram = entropy(codes)
    values: dict[str, Any] = {"images": count, "codes": total, "unigram_entropy": unigram}
    for name, found in nats.items():
        per_code = float(found[:, 0].sum()) / total / math.log(2)
        values[name] = {
            "bits_per_code": per_code,
            "below_unigram": 1 - per_code / unigram if unigram else float("nan"),
            "bits_per_code_with_end": float(found.sum()) / total / math.log(2),
            "bits_per_end": float(found[:, 1].mean()) / math.log(2),
        }
    if pictures.groups:
        groups = [pictures.groups[i] for i in said]
        values["by_source"] = {
            group: {
                "codes": int(codes.lengths[where].sum()),
                "unigram_entropy": entropy(codes.take(where.nonzero().flatten().tolist())),
                **{
                    name: float(found[where, 0].sum())
                    / int(codes.lengths[where].sum())
                    / math.log(2)
                    for name, found in nats.items()
                },
            }
            for group in picture_sets.count_groups(groups)
            for where in [torch.tensor([g == group for g in groups])]
        }
    return values


# Pictures and captions


def generate(lm: MultimodalLM, captions: Sequence[str], seed: int, a: Namespace) -> VisualCodes:
    """Codes of a picture for each caption, each from its own generator, whatever the batch size."""
    parts = []
    for start in range(0, len(captions), a.batch_size):
        prompts = captions[start : start + a.batch_size]
        generators = [
            torch.Generator().manual_seed(seed * len(captions) + start + i)
            for i in range(len(prompts))
        ]
        parts.append(
            lm.generate_codes_batch(
                prompts,
                a.guidance,
                generators,
                top_k=a.top_k,
                top_p=a.top_p,
                temperature=a.temperature,
            )
        )
        print(
            f"seed {seed}: codes of {start + len(prompts)} of {len(captions)} captions", flush=True
        )
    return VisualCodes.cat([part.to("cpu") for part in parts])


def drawn(lm: MultimodalLM, codes: VisualCodes, size: int, seed: int, a: Namespace) -> Tensor:
    """Pictures of all codes, uint8 [n 3 S S]; each picture has its own noise, whatever the batch size."""
    options = {
        "num_inference_steps": a.steps,
        "guidance_scale": a.decoder_guidance,
        "output_type": "pt",
    }
    parts = []
    for start in range(0, len(codes), a.batch_size):
        places = range(start, min(start + a.batch_size, len(codes)))
        noise = [torch.Generator().manual_seed(seed * len(codes) + i) for i in places]
        images = (
            lm.decoder(codes.take(places).to(a.device), generator=noise, **options)
            .images.float()
            .cpu()
        )
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        parts.append(images.clamp(0, 1))
    return (torch.cat(parts) * 255).round().to(torch.uint8)


def images(
    lm: MultimodalLM,
    scorer: Scorer,
    pictures: Tensor,
    codes: VisualCodes,
    captions: list[str],
    seen: Tensor,
    a: Any,
) -> tuple[dict[str, Any], Tensor]:
    """Is a picture's own caption among the nearest? Scores of every seed, ceilings, and the first seed's pictures."""
    text, size, count = embed(captions), pictures.shape[-1], len(captions)
    runs: list[dict[str, Any]] = []
    own: list[dict[str, float]] = []
    first = None
    for seed in range(a.seeds):
        made = generate(lm, captions, seed, a)
        shown = drawn(lm, made, size, seed, a)
        found = ranks(scorer.describe(shown), text)
        runs.append(top(found) | {"codes_per_image": float(made.lengths.double().mean())})
        runs[-1] |= {"unseen": top(found, ~seen), "ranks": found.tolist(), "codes": made.to_list()}
        own.append(top(ranks(scorer.describe(drawn(lm, codes, size, seed, a)), text)))
        first = shown if first is None else first
        print(
            f"seed {seed}: top-1 {runs[-1]['top1']:.3f}, top-5 {runs[-1]['top5']:.3f}", flush=True
        )
    assert first is not None

    def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: common.spread([row[name] for row in rows]) for name in ("top1", "top5")}

    values = {
        "captions": count,
        "chance": {"top1": 1 / count, "top5": min(5, count) / count},
        "generated": over_seeds(runs),
        "generated_unseen": over_seeds([r["unseen"] for r in runs])
        if bool((~seen).any())
        else None,
        "from_own_codes": over_seeds(own),
        "true": top(ranks(scorer.describe(pictures), text)),
        "codes_per_image": {
            "generated": common.spread([r["codes_per_image"] for r in runs]),
            "true": float(codes.lengths.double().mean()),
        },
        "per_seed": runs,
    }
    values["times_chance"] = values["generated"]["top5"]["mean"] / values["chance"]["top5"]
    return values, first


def captions_of(
    lm: MultimodalLM,
    scorer: Scorer,
    pictures: Tensor,
    captions: list[str],
    seen: Tensor,
    a: Namespace,
) -> tuple[dict[str, Any], list[str]]:
    """Does a generated caption identify its picture, and its true caption? Greedy, so there is one run."""
    said: list[str] = []
    for part in pictures.split(a.batch_size):
        said += lm.caption(
            [Picture.fromarray(p.permute(1, 2, 0).numpy()) for p in part], a.max_tokens
        )
        print(f"captions of {len(said)} of {len(pictures)} pictures", flush=True)
    vectors, true, shown = embed(said), embed(captions), scorer.describe(pictures)
    by_text, by_image = ranks(vectors, true), ranks(vectors, shown)
    exact = torch.tensor([same(a, b) for a, b in zip(said, captions, strict=True)])
    count = len(captions)
    values = {
        "captions": count,
        "chance": {"top1": 1 / count, "top5": min(5, count) / count},
        "true_caption_by_sentence_similarity": top(by_text) | {"unseen": top(by_text, ~seen)},
        "picture_by_scorer": top(by_image) | {"unseen": top(by_image, ~seen)},
        "ceiling_picture_by_true_caption": top(ranks(true, shown)),
        "similarity_to_true_caption": float((vectors * true).sum(1).mean()),
        "exact": float(exact.double().mean()),
        "exact_unseen": float(exact[~seen].double().mean()) if bool((~seen).any()) else None,
        "different": len(set(said)),
        "said": said,
    }
    values["times_chance"] = values["picture_by_scorer"]["top5"] / values["chance"]["top5"]
    return values, said


def same(a: str, b: str) -> bool:
    return " ".join(a.lower().split()) == " ".join(b.lower().split())


# The script


def main(a: Namespace) -> dict[str, Any]:
    parts = [part for part in PARTS if part in a.parts]
    lm = MultimodalLM.from_pretrained(
        a.model, visual_tokenizer=a.visual_tokenizer, decoder=a.decoder, device=a.device
    )
    asked = set(parts) & {"images", "captions"}
    scorer = Scorer(a.scorer, a.device) if asked else None
    config = lm.visual_tokenizer.config
    crop = lm.visual_tokenizer.image_processor.resize_mode == "center_crop"
    pictures = picture_sets.load_pictures(a.data, config.image_size, a.split, a.limit, crop)
    known = training_captions(a.data)
    places = (
        choose(pictures.captions, a.captions, a.seed, known if a.unseen else frozenset())
        if asked
        else []
    )
    chosen, captions = pictures.pixels[places], [pictures.captions[i] for i in places]
    keys, seen = (
        [pictures.keys[i] for i in places],
        torch.tensor([c in known for c in captions], dtype=torch.bool),
    )
    if asked:  # what is missing is said now, not after a long run
        embed(captions[:1])
    if "images" in parts:
        print(f"decoder: {type(lm.decoder).__name__}", flush=True)
    used = range(len(pictures)) if "bits" in parts else places
    codes = VisualCodes.cat(
        [
            lm.visual_tokenizer.encode(pictures.pixels[list(part)]).to("cpu")
            for part in chunks(used, a)
        ]
    )
    values: dict[str, Any] = {
        "set": pictures.describe(),
        "model": Path(a.model).name,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "seed": a.seed,
        "seen_in_training": int(seen.sum()),
        "keys": keys,
        "true_captions": captions,
        "sampling": {
            k: getattr(a, k) for k in ("guidance", "top_k", "top_p", "temperature", "steps")
        },
    }
    values["sampling"]["decoder_guidance"] = a.decoder_guidance
    if "bits" in parts:
        values["bits"] = bits(lm, pictures, codes, a)
        print(
            f"bits a code: {values['bits']['given the caption']['bits_per_code']:.3f}", flush=True
        )
        codes = codes.take(places) if asked else codes
    a.out.mkdir(parents=True, exist_ok=True)
    if scorer and "captions" in parts:
        values["captions"], _ = captions_of(lm, scorer, chosen, captions, seen, a)
    if scorer and "images" in parts:
        values["images"], first = images(lm, scorer, chosen, codes, captions, seen, a)
        contact_sheet(chosen[:SHOWN], first[:SHOWN], captions[:SHOWN]).save(a.out / f"{a.name}.png")
    common.write(
        a.name, a.out, "Language model: held-out captions and pictures", text(values, a), values
    )
    return values


def chunks(places: Sequence[int], a: Namespace) -> list[Sequence[int]]:
    return [places[i : i + a.batch_size] for i in range(0, len(places), a.batch_size)]


def arguments() -> Any:
    found = common.parser(__doc__, tokenizer=False, batch_size=50)
    painting.add_painter(found)
    found.add_argument(
        "--scorer",
        default="runs/default/teacher",
        help="folder that recipes/default/teacher.py wrote",
    )
    found.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure"
    )
    found.add_argument(
        "--captions", type=common.positive, default=100, help="different captions, one picture each"
    )
    found.add_argument(
        "--unseen", action="store_true", help="only captions that the train split does not have"
    )
    found.add_argument("--seed", type=int, default=0, help="of the choice of captions")
    found.add_argument(
        "--seeds", type=common.positive, default=3, help="seeds of the generated pictures"
    )
    found.add_argument(
        "--max-tokens", type=common.positive, default=48, help="of a generated caption"
    )
    found.add_argument("--name", default="lm_quality", help="of the result files")
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

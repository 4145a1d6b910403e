"""Captions and next frames of held-out clips by a model that predicts vectors (Emu, VL-GPT).

    captions   log p(caption | frames) of N clips' captions: the rank of the own one
    motions    the same among the captions of one clip that differ in the motion only
    next       the vectors generated after the frames but the last, beside those of the last frame

Captions are ranked after all frames, after the frames in another order, and after the first frame
alone: what the order of frames adds. "Over the prior" divides by the probability of the caption
without frames. Vectors are compared by their cosine with the true ones, less the mean vector of all
frames, beside the cosine of the frame before them ("repeated"). Each seed takes other clips.

    python recipes/lm/clips.py --model runs/lm/emu-clips --data data/clips

Hardware: one CPU core. Expected: docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lavit_lm import MultimodalLM

THEN = "then"
"""That of recipes/data/clips.py."""
BATCH = 25
Line = dict[str, Any]


def frames_of(line: Line, data: Path) -> list[Any]:
    return [data / file for file in line["segments"][0]["frames"]]


def caption_of(line: Line) -> str:
    return str(line["segments"][1]["text"])


def hits(scores: Float[Tensor, "n k"], own: Sequence[int]) -> dict[str, float]:
    """How often the own text is the first, and among the first five."""
    at = torch.tensor(own)[:, None]
    rank = (scores > scores.gather(1, at)).sum(1)
    return {"top-1": float((rank < 1).double().mean()), "top-5": float((rank < 5).double().mean())}


def orders(frames: list[Any], draw: random.Random) -> dict[str, list[Any]]:
    """The prompts that captions are ranked after."""
    shuffled = frames
    while len(frames) > 1 and shuffled == frames:
        shuffled = draw.sample(frames, len(frames))
    return {"frames": frames, "shuffled": shuffled, "first frame": frames[:1]}


def measure_captions(
    lm: MultimodalLM, clips: list[list[Any]], captions: list[str], draw: random.Random
) -> dict[str, dict[str, float]]:
    """Hits of every order of the frames, and of it over the prior."""
    prior = lm.rank([], captions)
    scores: dict[str, list[Tensor]] = {}
    for frames in clips:
        for name, prompt in orders(frames, draw).items():
            scores.setdefault(name, []).append(lm.rank(prompt, captions))
    own, found = range(len(clips)), {}
    for name, rows in scores.items():
        found[name] = hits(torch.stack(rows), own)
        found[f"{name}, over the prior"] = hits(torch.stack(rows) - prior, own)
    found["chance"] = {"top-1": 1 / len(clips), "top-5": min(1.0, 5 / len(clips))}
    return found


def measure_motions(
    lm: MultimodalLM, clips: list[list[Any]], lines: list[Line], draw: random.Random
) -> dict[str, float]:
    """How often the own motion is the most probable one, in captions that are otherwise equal."""
    motions = sorted({line["motion"] for line in lines if "changing" not in line["motion"]})
    right: dict[str, list[float]] = {}
    for frames, line in zip(clips, lines, strict=True):
        if line["motion"] in motions:
            own, caption = motions.index(line["motion"]), caption_of(line)
            texts = [caption.replace(line["motion"], motion) for motion in motions]
            for name, prompt in orders(frames, draw).items():
                scores = lm.rank(prompt, texts)[None]
                right.setdefault(name, []).append(hits(scores, [own])["top-1"])
    if not right:
        return {}
    return {**{n: sum(v) / len(v) for n, v in right.items()}, "chance": 1 / len(motions)}


@torch.no_grad()
def vectors_of(lm: MultimodalLM, images: list[Any]) -> Float[Tensor, "b n d"]:
    """The vectors that the model reads of images."""
    pixels = lm.visual_tokenizer.image_processor.to_uint8(images)
    keep = torch.zeros(0, 0, dtype=torch.bool)
    bridge: Any = lm.model.bridge
    return bridge(pixels, keep).view(len(images), -1, lm.model.causal.config.hidden_size)


def measure_next(
    lm: MultimodalLM, clips: list[list[Any]], captions: list[str], draw: random.Random
) -> dict[str, dict[str, float]]:
    """Cosines with the vectors of the last frame, and how often they exceed those of repeating."""
    known = [vectors_of(lm, frames[:-1]) for frames in clips]
    true = torch.cat([vectors_of(lm, frames[-1:]) for frames in clips])
    center = torch.cat(known).mean(0)
    prompts = {
        "generated": [[*frames[:-1], THEN] for frames in clips],
        "generated, given the caption": [
            [*frames[:-1], caption] for frames, caption in zip(clips, captions, strict=True)
        ],
        "generated, frames shuffled": [
            [*orders(frames[:-1], draw)["shuffled"], THEN] for frames in clips
        ],
        "generated, last frame only": [[frames[-2], THEN] for frames in clips],
    }
    made = {"repeated": torch.stack([one[-1] for one in known])}
    for name, parts in prompts.items():
        batches = [parts[i : i + BATCH] for i in range(0, len(parts), BATCH)]
        made[name] = torch.cat([lm.generate_vectors_batch(batch) for batch in batches])
    cosine = {
        name: F.cosine_similarity((v - center).flatten(1), (true - center).flatten(1))
        for name, v in made.items()
    }
    return {
        name: {
            "cosine": float(values.mean()),
            "nearer than repeated": float((values > cosine["repeated"]).double().mean()),
            "cosine, not centered": float(
                F.cosine_similarity(made[name].flatten(1), true.flatten(1)).mean()
            ),
            "squared error": float((made[name] - true).square().mean()),
        }
        for name, values in cosine.items()
    }


def measure(lm: MultimodalLM, data: Path, lines: list[Line], count: int, seed: int) -> Any:
    """All numbers of at most so many clips, whose captions all differ."""
    draw = random.Random(seed)
    by_caption = {caption_of(line): line for line in draw.sample(lines, len(lines))}
    chosen = list(by_caption.values())[:count]
    captions, clips = [caption_of(line) for line in chosen], [frames_of(o, data) for o in chosen]
    found = {
        "clips": len(clips),
        "captions": measure_captions(lm, clips, captions, draw),
        "next": measure_next(lm, clips, captions, draw),
    }
    if all("motion" in line for line in chosen):
        found["motions"] = measure_motions(lm, clips, chosen, draw)
    return found


def spread(values: list[Any]) -> Any:
    """[mean, standard deviation] of numbers over the seeds, wherever they are nested."""
    if isinstance(values[0], dict):
        return {name: spread([value[name] for value in values]) for name in values[0]}
    numbers = torch.tensor(values, dtype=torch.float64)
    return [round(float(x), 4) for x in (numbers.mean(), numbers.std(unbiased=False))]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--data", type=Path, required=True, help="folder of recipes/data/clips.py")
    parser.add_argument("--split", default="test", help="of the clips")
    parser.add_argument("--clips", type=int, default=100, help="of each kind and seed")
    parser.add_argument("--seeds", type=int, default=3, help="choices of clips")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    args = parser.parse_args(argv)
    lm = MultimodalLM.from_pretrained(args.model, decoder=None)
    lines = [
        json.loads(line)
        for line in (args.data / f"{args.split}.jsonl").read_text().split("\n")
        if line
    ]
    kinds = {"made": [x for x in lines if x["source"] == "made"]}
    kinds["real"] = [x for x in lines if x["source"] != "made"]
    found = {}
    for kind, own in kinds.items():
        if own:
            runs = [measure(lm, args.data, own, args.clips, seed) for seed in range(args.seeds)]
            found[kind] = spread(runs)
            print(kind, json.dumps(found[kind], indent=2), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()

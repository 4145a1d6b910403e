"""What reconstruction_run.py keeps of one batch: codes and cosines at a point of the curve, scores of what is drawn."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import metrics
import numpy as np
import protocol
import torch
from torch import Tensor

from lavit_tok import VisualCodes, VisualTokenizer
from lavit_tok.encode.allocation import Budget, keep_by_budget
from lavit_tok.encode.selector import keep_scores

LEARNED, RANDOM, NORM = "learned", "random", "top norm"
Point = tuple[str, int | None]
"""A way to choose patches, and how many; (LEARNED, None) is the selector's own decision."""
OWN: Point = (LEARNED, None)


# Codes


def noise_of(seed: int, place: int) -> torch.Generator:
    """The source of chance for one picture: the same whatever the batch, the subset or the order."""
    word = np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word) >> 1)


def keep_mask(
    tokenizer: VisualTokenizer, features: Tensor, point: Point, seed: int, places: Sequence[int]
) -> Tensor:
    """bool [b n]: the patches that are coded at this point of the curve."""
    method, budget = point
    scores = keep_scores(tokenizer.score(features))
    by: Tensor = scores
    if method == NORM:
        by = features.float().norm(dim=-1)
    if method == RANDOM:
        rows = [torch.rand(scores.shape[1], generator=noise_of(seed, place)) for place in places]
        by = torch.stack(rows).to(scores.device)
    chosen: Budget = budget
    return keep_by_budget(by, chosen)


@torch.no_grad()
def coded(
    tokenizer: VisualTokenizer,
    images: Tensor,
    point: Point,
    seed: int,
    places: Sequence[int],
    mean: Tensor,
) -> dict[str, Tensor]:
    """Codes of a batch at one point of the curve, and each picture's cosines; floors beside the own decision."""
    features = tokenizer.features(tokenizer.preprocess(images))
    keep = keep_mask(tokenizer, features, point, seed, places)
    codes = tokenizer.quantize(tokenizer.project(tokenizer.merge(features, keep)), keep.sum(1))
    measure = metrics.cosines if point == OWN else metrics.plain_and_centred
    return {"values": codes.values, "lengths": codes.lengths} | measure(
        features, tokenizer.reconstruct_features(codes), mean
    )


def as_codes(found: dict[str, Tensor], size: int) -> VisualCodes:
    return VisualCodes(found["values"], found["lengths"], codebook_size=size)


# Pixels


def drawn_part(
    tokenizer: adapters.ImageTokenizer,
    codes: VisualCodes,
    sources: Tensor,
    places: Sequence[int],
    seed: int,
    spaces: dict[str, Callable[[Tensor], Tensor]],
    lpips: Any,
    shown: bool,
) -> dict[str, Tensor]:
    """One batch drawn with one seed: each picture's scores, its thumbnail, its features, and itself if it is shown."""
    drawn = tokenizer.decode(codes, [noise_of(seed, place) for place in places])
    floats, originals = drawn.float() / 255, sources.float() / 255
    found = metrics.psnr_ssim(floats, originals) | {"thumbnail": metrics.thumbnails(floats)}
    found |= {f"space {i}": space(drawn) for i, space in enumerate(spaces.values())}
    if lpips is not None:
        found["lpips"] = metrics.lpips(lpips, floats, originals)
    return found | ({"drawn": drawn} if shown else {})


def scores(
    found: dict[str, Tensor],
    rows: Tensor,
    thumbnails: Tensor,
    real: Sequence[Tensor],
    names: Sequence[str],
) -> dict[str, float]:
    """The figures of one seed, over some of its pictures.

    Args:
        found: what drawn_part gave, of all drawn pictures.
        rows: int64 [n], which of them.
        thumbnails: [m d], of the sources among which retrieval searches; the rows' own come first.
        real, names: the sources' features in each space, and what the distance there is called.
    """
    pairs = [name for name in ("psnr", "ssim", "lpips") if name in found]
    values = {name: float(found[name][rows].double().mean()) for name in pairs}
    values["retrieval"] = float(
        metrics.found_own(found["thumbnail"][rows], thumbnails).double().mean()
    )
    for i, (sources, name) in enumerate(zip(real, names, strict=True)):
        values[name] = metrics.frechet_of_features(sources[rows], found[f"space {i}"][rows])
    return values


def feature_spaces(
    a: Namespace, tokenizer: adapters.ImageTokenizer
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is asked for, by name; "rFID True" and "rFID False" for Inception with antialiasing and without."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in a.spaces:
        kind, _, weights = name.partition(":")
        if name == "encoder":
            own = isinstance(tokenizer, adapters.Lavit)
            encoder = (
                tokenizer.tokenizer
                if own
                else VisualTokenizer.from_pretrained("default", device=a.device)
            )  # type: ignore[attr-defined]
            found["the tokenizer's encoder space" if own else "the shipped encoder's space"] = (
                metrics.EncoderSpace(encoder)
            )
        else:
            found[f"{kind} space ({Path(weights).name})"] = metrics.VisionSpace(kind, weights).to(
                a.device
            )
    for antialias in (True, False) if a.inception else ():
        network = metrics.inception(a.inception, antialias).to(a.device)
        found[f"rFID {antialias}"] = partial(_on, network, a.device)
    return found


@torch.no_grad()
def _on(network: Callable[[Tensor], Tensor], device: str, images: Tensor) -> Tensor:
    return network(images.to(device)).cpu()


def space_name(space: str, done: protocol.Done) -> str:
    if space.startswith("rFID "):
        return protocol.rfid_name(space == "rFID True", done)
    return protocol.frechet_name(space, done)


def kind_of(space: str) -> dict[str, Any]:
    rfid = space.startswith("rFID ")
    return {
        "kind": "rFID" if rfid else "Frechet",
        "antialias": space.endswith("True") if rfid else None,
    }


def label(point: Point) -> str:
    return point[0] if point[1] is None else f"{point[0]} {point[1]}"

"""The stages of reconstruction.py, each as parts that are kept until the result is written.

    pictures -codes-> codes and cosines, batch by batch, at every point of the curve
             -draw->  scores, thumbnails and features of every drawn picture, for every seed
             -scores-> the figures of a seed, over all drawn pictures or over the curve's

What is kept of a picture is small (its scores, 768 thumbnail numbers, one vector a feature space), so that 50,000 of
them fit, and every figure can be taken over any subset.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import common
import metrics
import numpy as np
import picture_sets
import protocol
import torch
from parts import Parts, joined, pixels_digest, progress
from torch import Tensor

from lavit_tok import VisualCodes, VisualTokenizer
from lavit_tok.selector import Budget, keep_by_budget, keep_scores

LEARNED, RANDOM, NORM = "learned", "random", "top norm"
Point = tuple[str, int | None]
"""A way to choose patches, and how many; (LEARNED, None) is the selector's own decision."""
OWN: Point = (LEARNED, None)


# Codes


def noise_of(seed: int, place: int) -> torch.Generator:
    """The source of chance for one picture: the same whatever the batch, the subset or the order."""
    word = np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word) >> 1)


def keep_mask(tokenizer: VisualTokenizer, features: Tensor, point: Point, seed: int, places: Sequence[int]) -> Tensor:
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
    tokenizer: VisualTokenizer, images: Tensor, point: Point, seed: int, places: Sequence[int], mean: Tensor
) -> dict[str, Tensor]:
    """Codes of a batch at one point of the curve, and each picture's cosines; floors beside the own decision."""
    features = tokenizer.features(tokenizer.preprocess(images))
    keep = keep_mask(tokenizer, features, point, seed, places)
    codes = tokenizer.quantize(tokenizer.project(tokenizer.merge(features, keep)), keep.sum(1))
    measure = metrics.cosines if point == OWN else metrics.plain_and_centred
    return {"values": codes.values, "lengths": codes.lengths} | measure(features, tokenizer.reconstruct(codes), mean)


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
    found: dict[str, Tensor], rows: Tensor, thumbnails: Tensor, real: Sequence[Tensor], names: Sequence[str]
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
    values["retrieval"] = float(metrics.found_own(found["thumbnail"][rows], thumbnails).double().mean())
    for i, (sources, name) in enumerate(zip(real, names, strict=True)):
        values[name] = metrics.frechet_of_features(sources[rows], found[f"space {i}"][rows])
    return values


def feature_spaces(a: Namespace, tokenizer: adapters.ImageTokenizer) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is asked for, by name; "rFID True" and "rFID False" for Inception with antialiasing and without."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in a.spaces:
        kind, _, weights = name.partition(":")
        if name == "encoder":
            own = isinstance(tokenizer, adapters.Lavit)
            encoder = tokenizer.tokenizer if own else VisualTokenizer.from_pretrained("default", device=a.device)  # type: ignore[attr-defined]
            found["the tokenizer's encoder space" if own else "the shipped encoder's space"] = metrics.EncoderSpace(
                encoder
            )
        else:
            found[f"{kind} space ({Path(weights).name})"] = metrics.VisionSpace(kind, weights).to(a.device)
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


# The run: every stage as parts, so that it can be killed


class Run:
    """One measurement: its pictures, its tokenizer and what is finished of it."""

    def __init__(self, a: Namespace) -> None:
        self.a = a
        self.tokenizer = adapters.load(a.tokenizer, a.device, a.image_size, a.decoder, a.steps, a.guidance)
        self.pictures = picture_sets.load_pictures(a.data, self.tokenizer.image_size, a.split, a.limit, not a.squeeze)
        self.own = self.tokenizer.tokenizer if isinstance(self.tokenizer, adapters.Lavit) else None
        if self.tokenizer.decodes and a.inception:
            protocol.refuse_few(min(a.pictures, len(self.pictures)), a.force)
        if not self.own and not self.tokenizer.decodes:
            raise ValueError(f"{a.tokenizer}: it has neither our features nor a decoder, so nothing can be measured")
        settings = {k: str(v) for k, v in vars(a).items() if k not in ("out", "threads")}
        content = {"tokenizer": self.tokenizer.identity, "pixels": pixels_digest(self.pictures.pixels)}
        self.parts = Parts(a.out, "reconstruction", settings | content | {"where": common.provenance("reconstruction")})

    def budgets(self) -> list[int]:
        """As asked for, or an eighth, a quarter, a third and a half of the patches."""
        patches = self.tokenizer.most_codes
        found = self.a.budgets if self.a.budgets is not None else sorted({max(1, patches // k) for k in (8, 4, 3, 2)})
        wrong = [b for b in found if not 1 <= b <= patches]
        if wrong:
            raise ValueError(f"--budgets: expected 1..{patches} codes an image, got {wrong}")
        return found if self.own else []

    def mean_feature(self) -> Tensor:
        assert self.own is not None
        a, own = self.a, self.own
        reference = picture_sets.reference_pictures(a.data, own.config.image_size, a.mean_pictures, self.pictures)
        self.reference = reference.describe()
        batches = reference.batches(a.batch_size)
        return self.parts.tensors("mean", lambda: {"mean": metrics.feature_mean(own, batches)})["mean"]

    def places(self) -> tuple[list[int], list[int]]:
        """(places of the drawn pictures, of the further ones among which a source is sought), each evenly spaced."""
        count = min(self.a.pictures, len(self.pictures))
        candidates = common.evenly(max(count, self.a.sources), len(self.pictures))
        places = [candidates[i] for i in common.evenly(count, len(candidates))]
        drawn = set(places)
        return places, [i for i in candidates if i not in drawn]

    def batches(self, places: Sequence[int]) -> list[list[int]]:
        size = self.a.batch_size
        return [list(places[i : i + size]) for i in range(0, len(places), size)]

    def codes(
        self, point: Point, seed: int, places: Sequence[int], what: str, mean: Tensor | None
    ) -> dict[str, Tensor]:
        """Codes and, of ours, cosines of the pictures at these places."""

        def part(batch: list[int]) -> dict[str, Tensor]:
            images = self.pictures.pixels[batch]
            if self.own is not None and mean is not None:
                return coded(self.own, images, point, seed, batch, mean)
            codes = self.tokenizer.encode(images)
            return {"values": codes.values, "lengths": codes.lengths}

        name = f"codes-{what}"
        todo = progress(self.batches(places), name)
        return joined([self.parts.tensors(f"{name}-{i:05}", partial(part, b)) for i, b in enumerate(todo)])

    def draw(self, codes: VisualCodes, seed: int, places: Sequence[int], what: str, first: bool) -> dict[str, Tensor]:
        """Scores of the pictures drawn from these codes, one for each place."""
        found, start = [], 0
        for i, batch in enumerate(progress(self.batches(places), f"draw-{what}, seed {seed}")):
            some = codes.take(range(start, start + len(batch)))
            start += len(batch)
            sources = self.pictures.pixels[batch]
            compute = partial(
                drawn_part, self.tokenizer, some, sources, batch, seed, self.spaces, self.lpips, first and i == 0
            )
            found.append(self.parts.tensors(f"draw-{what}-{seed}-{i:05}", compute))
        self.shown = found[0].pop("drawn") if first else self.shown
        return joined(found)

    def real_features(self, places: Sequence[int]) -> list[Tensor]:
        """The sources' features in every space."""

        def part(batch: list[int]) -> dict[str, Tensor]:
            return {f"{i}": space(self.pictures.pixels[batch]) for i, space in enumerate(self.spaces.values())}

        if not self.spaces:
            return []
        todo = progress(self.batches(places), "source features")
        found = joined([self.parts.tensors(f"real-{i:05}", partial(part, b)) for i, b in enumerate(todo)])
        return [found[f"{i}"] for i in range(len(self.spaces))]

    def done_with(self, count: int) -> protocol.Done:
        """How figures over `count` pictures were made."""
        a, pictures = self.a, self.pictures
        random = self.tokenizer.weights == adapters.RANDOM
        bad = len(pictures.rejects)
        return protocol.Done(count, self.tokenizer.image_size, pictures.cropped, bad, a.set_name, random)

    def pixels(
        self, own_codes: VisualCodes, curve: Sequence[int], points: Sequence[Point], mean: Any
    ) -> dict[str, Any]:
        """Every seed's figures at the own decision, and those of the curve's points over the curve's pictures."""
        a, pictures = self.a, self.pictures
        places, others = self.places()
        count = len(places)
        self.spaces = feature_spaces(a, self.tokenizer)
        self.lpips = metrics.lpips_metric() if a.lpips else None
        self.shown: Tensor | None = None
        searched = torch.cat([metrics.thumbnails(pictures.pixels[[i]].float() / 255) for i in places + others])
        done = self.done_with(count)
        names = [space_name(space, done) for space in self.spaces]
        real = self.real_features(places)
        codes = own_codes.take(places)
        everything = torch.arange(count)
        runs, found = [], {}
        for seed in range(a.seeds):
            found[seed] = self.draw(codes, seed, places, "own", seed == 0)
            runs.append(scores(found[seed], everything, searched, real, names))
            print(f"seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in runs[-1].items()), flush=True)
        self.sources = pictures.pixels[places[: a.batch_size]]
        settings = {"pictures": count, "sources": len(searched), "seeds": a.seeds}
        own = {"steps": a.steps, "guidance": a.guidance} if self.own is not None else {}
        departures = {"departures": done.departures(), "against_published": done.against_published()}
        kinds = [kind_of(space) for space in self.spaces]
        distances = [
            {"name": n, **k, "value": common.spread([r[n] for r in runs])} for n, k in zip(names, kinds, strict=True)
        ]
        summary = {name: common.spread([r[name] for r in runs]) for name in runs[0]}
        values = {**settings, **own, **departures, "per_seed": runs, "summary": summary, "distances": distances}
        values["codes_per_image"] = float(codes.lengths.double().mean())
        row_of = {place: row for row, place in enumerate(places)}
        rows = [row_of[place] for place in curve]
        if points:
            values["curve"] = self.curve_pixels(points, places, torch.tensor(rows), found, searched, real, mean)
        return values

    def curve_pixels(
        self,
        points: Sequence[Point],
        places: list[int],
        rows: Tensor,
        own: dict[int, dict[str, Tensor]],
        searched: Tensor,
        real: list[Tensor],
        mean: Tensor,
    ) -> list[dict[str, Any]]:
        """PSNR, SSIM, retrieval (and distances, over enough pictures) at every point, over places[rows]."""
        some = [places[i] for i in rows.tolist()]
        enough = len(some) >= protocol.FID_LEAST
        other = torch.ones(len(searched), dtype=torch.bool).index_fill(0, rows, False)
        ordered = torch.cat([searched[rows], searched[other]])  # the rows' own come first, as retrieval expects
        subset = [features[rows] for features in real] if enough else []
        names = [space_name(space, self.done_with(len(some))) for space in self.spaces] if enough else []
        table, everything = [], torch.arange(len(some))
        for point in points:
            runs = []
            for seed in range(self.a.seeds):
                if point == OWN:
                    drawn = {key: value[rows] for key, value in own[seed].items()}
                else:
                    what = label(point).replace(" ", "_")
                    codes = self.codes(point, seed, some, f"{what}-{seed}" if point[0] == RANDOM else what, mean)
                    drawn = self.draw(as_codes(codes, self.tokenizer.codebook_size), seed, some, what, False)
                runs.append(scores(drawn, everything, ordered, subset, names))
            table.append(
                {"method": point[0], "budget": point[1]} | {k: common.spread([r[k] for r in runs]) for k in runs[0]}
            )
        return table


def kind_of(space: str) -> dict[str, Any]:
    rfid = space.startswith("rFID ")
    return {"kind": "rFID" if rfid else "Frechet", "antialias": space.endswith("True") if rfid else None}


def label(point: Point) -> str:
    return point[0] if point[1] is None else f"{point[0]} {point[1]}"


def curve_features(
    run: Run, points: Sequence[Point], curve: Sequence[int], own: Any, mean: Tensor
) -> list[dict[str, Any]]:
    """Mean codes and both cosines at every point, over the curve's pictures."""
    table = []
    for point in points:
        seeds = range(run.a.seeds) if point[0] == RANDOM else (0,)
        runs = []
        for seed in seeds:
            if point == OWN:
                found = {key: own[key][list(curve)] for key in ("lengths", "plain", "centred")}
            else:
                what = label(point).replace(" ", "_")
                found = run.codes(point, seed, curve, f"{what}-{seed}" if point[0] == RANDOM else what, mean)
            runs.append({key: float(found[key].double().mean()) for key in ("lengths", "plain", "centred")})
        row = {key: common.spread([r[key] for r in runs]) for key in ("plain", "centred")}
        table.append({"method": point[0], "budget": point[1], "codes_per_image": runs[0]["lengths"], **row})
    return table

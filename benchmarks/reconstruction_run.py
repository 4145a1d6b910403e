"""The stages of reconstruction.py, each as parts that are kept until the result is written.

    pictures -codes-> codes and cosines, batch by batch, at every point of the curve
             -draw->  scores, thumbnails and features of every drawn picture, for every seed
             -scores-> the figures of a seed, over all drawn pictures or over the curve's

What is kept of a picture is small (its scores, 768 thumbnail numbers, one vector a feature space), so that 50,000 of
them fit, and every figure can be taken over any subset.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import adapters
import common
import metrics
import picture_sets
import protocol
import torch
from parts import Parts, joined, pixels_digest, progress
from reconstruction_parts import (
    OWN,
    RANDOM,
    Point,
    as_codes,
    coded,
    drawn_part,
    feature_spaces,
    kind_of,
    label,
    scores,
    space_name,
)
from torch import Tensor

from lavit_tok import VisualCodes


class Run:
    """One measurement: its pictures, its tokenizer and what is finished of it."""

    def __init__(self, a: Namespace) -> None:
        self.a = a
        self.tokenizer = adapters.load(
            a.tokenizer, a.device, a.image_size, a.decoder, a.steps, a.guidance
        )
        self.images = picture_sets.load_pictures(
            a.data, self.tokenizer.image_size, a.split, a.limit, not a.squeeze
        )
        self.own = self.tokenizer.tokenizer if isinstance(self.tokenizer, adapters.Lavit) else None
        if self.tokenizer.decodes and a.inception:
            protocol.refuse_few(min(a.images, len(self.images)), a.force)
        if not self.own and not self.tokenizer.decodes:
            raise ValueError(
                f"{a.tokenizer}: it has neither our features nor a decoder, so nothing can be measured"
            )
        settings = common.given(a)
        content = {
            "tokenizer": self.tokenizer.identity,
            "pixels": pixels_digest(self.images.pixels),
        }
        self.parts = Parts(
            a.out,
            "reconstruction",
            settings | content | {"where": common.provenance("reconstruction")},
        )

    def budgets(self) -> list[int]:
        """As asked for, or an eighth, a quarter, a third and a half of the patches."""
        patches = self.tokenizer.most_codes
        found = (
            self.a.budgets
            if self.a.budgets is not None
            else sorted({max(1, patches // k) for k in (8, 4, 3, 2)})
        )
        wrong = [b for b in found if not 1 <= b <= patches]
        if wrong:
            raise ValueError(f"--budgets: expected 1..{patches} codes an image, got {wrong}")
        return found if self.own else []

    def mean_feature(self) -> Tensor:
        assert self.own is not None
        a, own = self.a, self.own
        reference = picture_sets.reference_pictures(
            a.data, own.config.image_size, a.mean_pictures, self.images
        )
        self.reference = reference.describe()
        batches = reference.batches(a.batch_size)
        return self.parts.tensors("mean", lambda: {"mean": metrics.feature_mean(own, batches)})[
            "mean"
        ]

    def places(self) -> tuple[list[int], list[int]]:
        """(places of the drawn pictures, of the further ones among which a source is sought), each evenly spaced."""
        count = min(self.a.images, len(self.images))
        candidates = common.evenly(max(count, self.a.sources), len(self.images))
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
            images = self.images.pixels[batch]
            if self.own is not None and mean is not None:
                return coded(self.own, images, point, seed, batch, mean)
            codes = self.tokenizer.encode(images)
            return {"values": codes.values, "lengths": codes.lengths}

        name = f"codes-{what}"
        todo = progress(self.batches(places), name)
        return joined(
            [self.parts.tensors(f"{name}-{i:05}", partial(part, b)) for i, b in enumerate(todo)]
        )

    def draw(
        self, codes: VisualCodes, seed: int, places: Sequence[int], what: str, first: bool
    ) -> dict[str, Tensor]:
        """Scores of the pictures drawn from these codes, one for each place."""
        found, start = [], 0
        for i, batch in enumerate(progress(self.batches(places), f"draw-{what}, seed {seed}")):
            some = codes.take(range(start, start + len(batch)))
            start += len(batch)
            sources = self.images.pixels[batch]
            compute = partial(
                drawn_part,
                self.tokenizer,
                some,
                sources,
                batch,
                seed,
                self.spaces,
                self.lpips,
                first and i == 0,
            )
            found.append(self.parts.tensors(f"draw-{what}-{seed}-{i:05}", compute))
        self.shown = found[0].pop("drawn") if first else self.shown
        return joined(found)

    def real_features(self, places: Sequence[int]) -> list[Tensor]:
        """The sources' features in every space."""

        def part(batch: list[int]) -> dict[str, Tensor]:
            return {
                f"{i}": space(self.images.pixels[batch])
                for i, space in enumerate(self.spaces.values())
            }

        if not self.spaces:
            return []
        todo = progress(self.batches(places), "source features")
        found = joined(
            [self.parts.tensors(f"real-{i:05}", partial(part, b)) for i, b in enumerate(todo)]
        )
        return [found[f"{i}"] for i in range(len(self.spaces))]

    def done_with(self, count: int) -> protocol.Done:
        """How figures over `count` pictures were made."""
        a, pictures = self.a, self.images
        random = self.tokenizer.weights == adapters.RANDOM
        bad = len(pictures.rejects)
        return protocol.Done(
            count, self.tokenizer.image_size, pictures.cropped, bad, a.set_name, random
        )

    def pixels(
        self, own_codes: VisualCodes, curve: Sequence[int], points: Sequence[Point], mean: Any
    ) -> dict[str, Any]:
        """Every seed's figures at the own decision, and those of the curve's points over the curve's pictures."""
        a, pictures = self.a, self.images
        places, others = self.places()
        count = len(places)
        self.spaces = feature_spaces(a, self.tokenizer)
        self.lpips = metrics.lpips_metric() if a.lpips else None
        self.shown: Tensor | None = None
        searched = torch.cat(
            [metrics.thumbnails(pictures.pixels[[i]].float() / 255) for i in places + others]
        )
        done = self.done_with(count)
        names = [space_name(space, done) for space in self.spaces]
        real = self.real_features(places)
        codes = own_codes.take(places)
        everything = torch.arange(count)
        runs, found = [], {}
        for seed in range(a.seeds):
            found[seed] = self.draw(codes, seed, places, "own", seed == 0)
            runs.append(scores(found[seed], everything, searched, real, names))
            print(
                f"seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in runs[-1].items()),
                flush=True,
            )
        self.sources = pictures.pixels[places[: a.batch_size]]
        settings = {"pictures": count, "sources": len(searched), "seeds": a.seeds}
        own = {"steps": a.steps, "guidance": a.guidance} if self.own is not None else {}
        departures = {
            "departures": done.departures(),
            "against_published": done.against_published(),
        }
        kinds = [kind_of(space) for space in self.spaces]
        distances = [
            {"name": n, **k, "value": common.spread([r[n] for r in runs])}
            for n, k in zip(names, kinds, strict=True)
        ]
        summary = {name: common.spread([r[name] for r in runs]) for name in runs[0]}
        values = {
            **settings,
            **own,
            **departures,
            "per_seed": runs,
            "summary": summary,
            "distances": distances,
        }
        values["codes_per_image"] = float(codes.lengths.double().mean())
        row_of = {place: row for row, place in enumerate(places)}
        rows = [row_of[place] for place in curve]
        if points:
            values["curve"] = self.curve_pixels(
                points, places, torch.tensor(rows), found, searched, real, mean
            )
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
        ordered = torch.cat(
            [searched[rows], searched[other]]
        )  # the rows' own come first, as retrieval expects
        subset = [features[rows] for features in real] if enough else []
        names = (
            [space_name(space, self.done_with(len(some))) for space in self.spaces]
            if enough
            else []
        )
        table, everything = [], torch.arange(len(some))
        for point in points:
            runs = []
            for seed in range(self.a.seeds):
                if point == OWN:
                    drawn = {key: value[rows] for key, value in own[seed].items()}
                else:
                    what = label(point).replace(" ", "_")
                    codes = self.codes(
                        point, seed, some, f"{what}-{seed}" if point[0] == RANDOM else what, mean
                    )
                    drawn = self.draw(
                        as_codes(codes, self.tokenizer.codebook_size), seed, some, what, False
                    )
                runs.append(scores(drawn, everything, ordered, subset, names))
            table.append(
                {"method": point[0], "budget": point[1]}
                | {k: common.spread([r[k] for r in runs]) for k in runs[0]}
            )
        return table


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
                found = run.codes(
                    point, seed, curve, f"{what}-{seed}" if point[0] == RANDOM else what, mean
                )
            runs.append(
                {key: float(found[key].double().mean()) for key in ("lengths", "plain", "centred")}
            )
        row = {key: common.spread([r[key] for r in runs]) for key in ("plain", "centred")}
        table.append(
            {"method": point[0], "budget": point[1], "codes_per_image": runs[0]["lengths"], **row}
        )
    return table

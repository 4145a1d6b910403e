"""How much of a picture do its codes hold, as features and as pixels, and how does that grow with the codes spent?

    features: cosine of reconstruct(encode(x)) with the encoder's own features, plain and centred, beside two floors
    pixels:   PSNR, SSIM, retrieval of the source, Frechet distances, LPIPS on request; several seeds of the decoder
    curve:    both at several budgets, beside random and largest-norm selection of as many patches

Features and curve are of our tokenizer alone; pixels of any that decodes (see adapters.py). A plain cosine flatters,
because all features share a large mean: predicting that mean alone already scores high. The centred cosine subtracts it
from both sides. The name of each Frechet distance says what space it is in and how it departs from the protocol.

Writes reconstruction.md, .json, a sheet of pairs reconstruction.png and reconstruction_curve.png. A run that was killed
goes on where it was: codes, pictures' scores and features are kept batch by batch until the result is written.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import common
import metrics
import numpy as np
import protocol
import torch
from parts import Parts, joined, pixels_digest, progress
from PIL import Image
from torch import Tensor

from lavit_tok import VisualCodes, VisualTokenizer
from lavit_tok.selector import Budget, keep_by_budget, keep_scores
from lavit_tok.visualize import sheet

LEARNED, RANDOM, NORM = "learned", "random", "top norm"
PUBLISHED = Path(__file__).parent / "published.json"
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


def pairs_sheet(sources: Tensor, drawn: Tensor, pairs: int = 32, across: int = 8) -> Image.Image:
    """Source and drawn picture side by side, `across` pairs a line."""
    flat = [
        Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())
        for pair in zip(sources[:pairs], drawn[:pairs], strict=False)
        for x in pair
    ]
    return sheet([flat[i : i + 2 * across] for i in range(0, len(flat), 2 * across)], ["source", "drawn"] * across)


# The run: every stage as parts, so that it can be killed


class Run:
    """One measurement: its pictures, its tokenizer and what is finished of it."""

    def __init__(self, a: Namespace) -> None:
        self.a = a
        self.tokenizer = adapters.load(a.tokenizer, a.device, a.image_size, a.decoder, a.steps, a.guidance)
        self.pictures = common.load_pictures(a.data, self.tokenizer.image_size, a.split, a.limit, not a.squeeze)
        self.own = self.tokenizer.tokenizer if isinstance(self.tokenizer, adapters.Lavit) else None
        if self.tokenizer.decodes and a.inception:
            protocol.refuse_few(min(a.pictures, len(self.pictures)), a.force)
        if not self.own and not self.tokenizer.decodes:
            raise ValueError(f"{a.tokenizer}: it has neither our features nor a decoder, so nothing can be measured")
        settings = {k: str(v) for k, v in vars(a).items() if k not in ("out", "threads")}
        content = {"tokenizer": self.tokenizer.identity, "pixels": pixels_digest(self.pictures.pixels)}
        self.parts = Parts(a.out, "reconstruction", settings | content | {"where": common.provenance()})

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
        reference = common.reference_pictures(a.data, own.config.image_size, a.mean_pictures, self.pictures)
        self.reference = reference.describe()
        batches = reference.batches(a.batch_size)
        return self.parts.tensors("mean", lambda: {"mean": metrics.feature_mean(own, batches)})["mean"]

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
        count = min(a.pictures, len(pictures))
        candidates = common.evenly(max(count, a.sources), len(pictures))
        places = [candidates[i] for i in common.evenly(count, len(candidates))]
        others = [i for i in candidates if i not in set(places)]
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
        rows = [places.index(i) for i in curve if i in set(places)]
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
        others = torch.tensor([i for i in range(len(searched)) if i not in set(rows.tolist())], dtype=torch.long)
        ordered = torch.cat([searched[rows], searched[others]])  # the rows' own come first, as retrieval expects
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


def main(arguments: Namespace) -> dict[str, Any]:
    a, run = arguments, Run(arguments)
    everything = list(range(len(run.pictures)))
    points = [OWN, *((method, b) for method in (LEARNED, RANDOM, NORM) for b in run.budgets())] if run.own else []
    mean = run.mean_feature() if run.own else None
    found = run.codes(OWN, 0, everything, "own", mean)
    codes = as_codes(found, run.tokenizer.codebook_size)
    values: dict[str, Any] = run.pictures.record()
    values |= {
        "tokenizer": run.tokenizer.name,
        "weights": run.tokenizer.weights,
        "image_size": run.tokenizer.image_size,
    }
    values["codes_per_image"] = float(codes.lengths.double().mean())
    body = f"{run.tokenizer.name} ({run.tokenizer.weights}). {values['set']}; "
    body += f"{values['codes_per_image']:.1f} codes an image on average." + run.pictures.named_rejects()
    a.out.mkdir(parents=True, exist_ok=True)
    # The curve's pictures are some of the drawn ones, so that its first point needs no new drawing.
    drawn = min(a.pictures, len(run.pictures))
    candidates = common.evenly(max(drawn, a.sources), len(run.pictures))
    places = [candidates[i] for i in common.evenly(drawn, len(candidates))]
    curve = [places[i] for i in common.evenly(min(a.curve_pictures, drawn), drawn)]
    if mean is not None:
        values |= {"mean_feature_over": run.reference, "features": summarised(found)}
        values["curve"] = {"pictures": len(curve), "features": curve_features(run, points, curve, found, mean)}
        body += "\n\n" + feature_text(values)
    if run.tokenizer.decodes:
        values["pixels"] = run.pixels(codes, curve, points, mean)
        if "curve" in values:
            values["curve"]["pixels"] = values["pixels"].pop("curve")
        assert run.shown is not None
        pairs_sheet(run.sources, run.shown).save(a.out / "reconstruction.png")
    if "curve" in values:
        plot(values["curve"], a.out / "reconstruction_curve.png")
        body += "\n\n" + curve_text(values["curve"])
    if run.tokenizer.decodes:
        body += "\n\n" + pixel_text(values["pixels"])
    common.write("reconstruction", a.out, "Reconstruction", body, values)
    run.parts.done()
    return values


# What comes out


def summarised(found: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over images of every cosine."""
    names = [name for name in found if name not in ("values", "lengths")]
    values = {n: {"mean": float(found[n].mean()), "std": float(found[n].std(correction=0))} for n in names}
    return values | {"centred_floor_set_mean": {"mean": 0.0, "std": 0.0}}


def feature_text(values: dict[str, Any]) -> str:
    def row(label: str, plain: str, centred: str) -> tuple[str, str, str]:
        cells = [values["features"][name] for name in (plain, centred)]
        return label, *(f"{c['mean']:.4f} ± {c['std']:.4f}" for c in cells)

    rows = [
        row("reconstruct(encode(x))", "plain", "centred"),
        row("floor: each image's own mean feature", "plain_floor_image_mean", "centred_floor_image_mean"),
        row("floor: the data set's mean feature", "plain_floor_set_mean", "centred_floor_set_mean"),
    ]
    text = "## Features\n\n" + common.table(("cosine with the encoder's features", "plain", "centred"), rows)
    return (
        text + f"\n\nMean over patches, then mean ± std over images. Mean feature over: {values['mean_feature_over']}."
    )


def curve_text(curve: dict[str, Any]) -> str:
    """One line for each way to choose patches and each budget."""
    pixels = curve.get("pixels") or [{}] * len(curve["features"])
    names = [n for n in pixels[0] if n not in ("method", "budget")]
    rows = []
    for feature, pixel in zip(curve["features"], pixels, strict=True):
        start = (feature["budget"] or "none", feature["method"], f"{feature['codes_per_image']:.2f}")
        cells = [
            common.plus_minus(feature[n]) if feature[n]["seeds"] > 1 else f"{feature[n]['mean']:.4f}"
            for n in ("plain", "centred")
        ]
        rows.append((*start, *cells, *(common.plus_minus(pixel[n]) for n in names)))
    head = ("budget", "selection", "codes an image", "plain cosine", "centred cosine", *names)
    text = f"## Distortion against codes\n\n{curve['pictures']} pictures, the same for every line; ± over seeds.\n\n"
    return text + common.table(head, rows) + "\n\n![distortion against mean codes](reconstruction_curve.png)"


def plot(curve: dict[str, Any], path: Path) -> None:
    """Distortion falls from left to right: 1 - centred cosine, and the drawn pictures' error where there are any."""
    plt = common.pyplot()
    panels = [("1 - centred cosine", lambda f, p: (1 - f["centred"]["mean"], f["centred"]["std"]))]
    if curve.get("pixels"):
        panels.append(("PSNR, dB", lambda f, p: (p["psnr"]["mean"], p["psnr"]["std"])))
        panels.append(("retrieval, top-1", lambda f, p: (p["retrieval"]["mean"], p["retrieval"]["std"])))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained", squeeze=False)
    lines = list(zip(curve["features"], curve.get("pixels") or curve["features"], strict=True))
    for axis, (name, value) in zip(axes[0], panels, strict=True):
        for method in (LEARNED, RANDOM, NORM):
            own = sorted(
                (x for x in lines if x[0]["method"] == method and x[0]["budget"]), key=lambda x: x[0]["budget"]
            )
            if own:
                x, y = [f["codes_per_image"] for f, _ in own], [value(f, p) for f, p in own]
                axis.errorbar(x, [m for m, _ in y], [s for _, s in y], marker="o", label=method)
        f, p = lines[0]
        axis.errorbar(
            [f["codes_per_image"]], *([v] for v in value(f, p)), marker="*", markersize=12, label="own decision"
        )
        axis.set(xlabel="codes an image, mean", ylabel=name)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pixel_text(pixels: dict[str, Any]) -> str:
    names = {
        "psnr": "PSNR, dB (data_range=1)",
        "ssim": "SSIM (data_range=1)",
        "lpips": "LPIPS (AlexNet)",
        "retrieval": f"retrieval, top-1 among {pixels['sources']} in 16x16 RGB (chance {1 / pixels['sources']:.4f})",
    }
    rows = [(names.get(name, name), common.plus_minus(value)) for name, value in pixels["summary"].items()]
    if "lpips" not in pixels["summary"]:
        rows.append(("LPIPS", "not measured: --lpips, with torchvision and its weights at hand"))
    if not any(d["kind"] == "rFID" for d in pixels["distances"]):
        rows.append(("rFID", "not measured: --inception, with torch-fidelity's Inception-v3 weights"))
    text = "## Pixels\n\n" + common.table(("measure", f"mean ± std over {pixels['seeds']} seeds"), rows)
    text += f"\n\n{pixels['pictures']} pictures"
    text += f", {pixels['steps']} steps, guidance {pixels['guidance']:g}. " if "steps" in pixels else ". "
    text += "The reference is the same crops.\n\n![pairs](reconstruction.png)\n\n## Published\n\n"
    text += "rFID on ImageNet-256 by the authors' own account, of another protocol than this run's: "
    text += (
        "; ".join(pixels["against_published"]) + ".\n\n"
        if pixels["against_published"]
        else "the same set and size.\n\n"
    )
    lines = [(p["tokenizer"], p["rfid"], p["tokens"]) for p in json.loads(PUBLISHED.read_text())["figures"]]
    return text + common.table(("tokenizer", "rFID", "tokens an image"), lines)


def arguments() -> Any:
    found = common.parser(__doc__)
    found.add_argument("--decoder", help="of ours: 'default', a directory or a Hub id; without, only features")
    found.add_argument("--pictures", type=common.positive, default=200, help="how many are drawn, evenly spaced")
    found.add_argument("--sources", type=common.positive, default=500, help="pictures among which a source is sought")
    found.add_argument("--seeds", type=common.positive, default=3, help="of the decoder's noise and of random choice")
    found.add_argument("--steps", type=common.positive, default=25)
    found.add_argument("--guidance", type=float, default=3.0)
    found.add_argument("--budgets", type=int, nargs="*", help="codes an image on the curve; 1/8 to 1/2 of the patches")
    found.add_argument("--curve-pictures", type=common.positive, default=100, help="some of the drawn ones")
    found.add_argument("--mean-pictures", type=common.positive, default=1024, help="of the train split, for the mean")
    found.add_argument("--inception", type=Path, help="Inception-v3 weights of torch-fidelity, for rFID")
    found.add_argument(
        "--spaces",
        nargs="*",
        default=["encoder"],
        help="of Frechet distances: encoder, clip:DIR, dinov2:DIR, siglip:DIR",
    )
    found.add_argument("--lpips", action="store_true", help="also LPIPS; needs torchvision and its AlexNet weights")
    found.add_argument("--set-name", choices=sorted(protocol.SETS), help="what the pictures are; the count is checked")
    found.add_argument("--force", action="store_true", help=f"rFID even under {protocol.FID_LEAST} pictures")
    common.any_tokenizer(found)
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

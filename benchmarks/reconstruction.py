"""How much of an image do its codes hold, as features and as pixels, against the codes spent?

    features  cosine of reconstructed features with the encoder's, plain and centered, with floors
    pixels    PSNR, SSIM, LPIPS, retrieval of the source, Frechet distances; several decoder seeds
    curve     both at several budgets, beside other selections of as many patches

Features and curve are of our tokenizer alone, pixels of any that decodes (shared/tokenizers.py).
Writes reconstruction.md, .json, pairs of images reconstruction.png, and reconstruction_curve.png. A
stopped run continues where it was.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.shared import cli, datasets, metrics, plots, protocol, report, tokenizers
from benchmarks.shared.cache import Stages, generator_for
from lavit_tok import VisualCodes, VisualTokenizer
from lavit_tok.data.splits import load_splits
from lavit_tok.encode.allocation import keep_by_budget, ordered_noise
from lavit_tok.encode.selector import keep_scores

LEARNED, RANDOM, NORM, EVEN = "learned", "random", "top norm", "even pattern"
ACROSS = "learned, across the batch"
SELECTIONS = [LEARNED, RANDOM, NORM, EVEN, ACROSS]
COSINES = ("plain", "centered")


class Point(NamedTuple):
    """How patches are selected, and how many; None: the selector decides."""

    selection: str
    budget: int | None

    def requested(self, patches: int) -> int | float | None:
        """The `budget` of VisualTokenizer.encode."""
        return self.budget / patches if self.budget and self.selection == ACROSS else self.budget


OWN = Point(LEARNED, None)


def keep_mask(
    tokenizer: VisualTokenizer, features: Tensor, point: Point, seed: int, indices: Sequence[int]
) -> Tensor:
    """bool [b n]: the patches that are coded at this point of the curve."""
    scores = keep_scores(tokenizer.score(features))
    patches = scores.shape[1]
    if point.selection == NORM:
        scores = features.float().norm(dim=-1)
    if point.selection == RANDOM:  # the same for an image in any batch
        draws = [torch.rand(patches, generator=generator_for(RANDOM, seed, i)) for i in indices]
        scores = torch.stack(draws).to(scores.device)
    if point.selection == EVEN:
        scores = ordered_noise(patches).to(scores).expand_as(scores)
    return keep_by_budget(scores, point.requested(patches))  # type: ignore[arg-type]


class Run:
    """One measurement: its images, its tokenizer and its finished stages."""

    def __init__(self, args: Namespace) -> None:
        options = (args.device, args.image_size, args.decoder, args.steps, args.guidance)
        self.args, self.tokenizer = args, tokenizers.load(args.tokenizer, *options)
        ours = isinstance(self.tokenizer, tokenizers.Lavit)
        self.own: Any = self.tokenizer.tokenizer if ours else None  # type: ignore[attr-defined]
        self.size, self.decodes = self.tokenizer.image_size, self.tokenizer.decodes
        if not ours and not self.decodes:
            raise ValueError(f"{args.tokenizer}: without features and decoder there is no measure")
        split, crop = args.split, not args.squeeze
        self.images = datasets.load_images(args.data, self.size, split, args.limit, crop)
        count = min(args.decoded, len(self.images))
        if self.decodes and args.inception:
            protocol.refuse_few(count, args.force)
        self.stages = Stages(args, "reconstruction", self.tokenizer.identity, self.images.pixels)
        # Decoded images first, then the further ones among which a source is searched for.
        candidates = datasets.evenly_spaced(max(count, args.sources), len(self.images))
        self.decoded = [candidates[i] for i in datasets.evenly_spaced(count, len(candidates))]
        self.searched = self.decoded + sorted(set(candidates) - set(self.decoded))
        bad, random = len(self.images.rejects), self.tokenizer.weights == tokenizers.RANDOM
        self.protocol = protocol.Protocol(count, self.size, crop, bad, args.set_name, random)
        self.shown: Any = None

    def points(self) -> list[Point]:
        """The selector's own decision, then every selection at every budget."""
        patches, chosen = self.tokenizer.max_codes, self.args.budgets
        budgets = chosen or sorted({max(1, patches // k) for k in (8, 4, 3, 2)})
        wrong = [b for b in budgets if not 1 <= b <= patches]
        if wrong:
            raise ValueError(f"--budgets: expected 1..{patches} codes per image, got {wrong}")
        selections = self.args.selections if self.own else []
        if self.own and self.own.nested:  # their order of patches is fixed
            selections = [s for s in selections if s in (LEARNED, ACROSS)]
        return [OWN, *(Point(s, b) for s in selections for b in budgets)]

    def use_mean_feature(self) -> str:
        """Compute the mean feature of the train split, if there is one; returns its images."""
        args, images = self.args, self.images
        if "train" in load_splits(args.data):
            size, limit = self.size, args.mean_images
            images = datasets.load_images(args.data, size, "train", limit, images.cropped)
        batches = images.pixels.split(args.batch_size)
        self.mean = self.stages("mean", partial(metrics.feature_mean, self.own, batches))
        return images.describe()

    def codes(self, point: Point, seed: int, indices: Sequence[int]) -> dict[str, Tensor]:
        """Codes of images and, of ours, cosines, with floors at the selector's own decision."""

        @torch.no_grad()
        def encode(batch: list[int]) -> dict[str, Tensor]:
            images, tokenizer = self.images.pixels[batch], self.own
            if tokenizer is None:
                codes = self.tokenizer.encode(images)
                return {"values": codes.values, "lengths": codes.lengths}
            features = tokenizer.features(tokenizer.preprocess(images))
            if tokenizer.nested:
                codes = tokenizer.encode(images, point.requested(features.shape[1]))
            else:
                keep = keep_mask(tokenizer, features, point, seed, batch)
                codes = tokenizer.encode_kept(features, keep)
            reconstructed = tokenizer.reconstruct_features(codes)
            found = metrics.cosines(features, reconstructed, self.mean)
            found |= metrics.cosine_floors(features, self.mean) if point == OWN else {}
            found |= {"values": codes.values, "lengths": codes.lengths}
            return {name: value.cpu() for name, value in found.items()}

        stage = f"encode {point} {seed}"
        return self.stages.tensors(stage, indices, self.args.batch_size, encode)

    def decode(self, point: Point, codes: VisualCodes, seed: int) -> dict[str, Tensor]:
        """Scores, thumbnail and features of each decoded image."""

        def score(batch: list[int]) -> dict[str, Tensor]:
            indices = [self.decoded[i] for i in batch]
            noise = [generator_for("noise", seed, i) for i in indices]
            images = self.tokenizer.decode(codes.take(batch), noise)
            pixels, sources = images.float() / 255, self.images.pixels[indices].float() / 255
            scores = metrics.psnr_ssim(pixels, sources)
            if self.lpips is not None:
                scores["lpips"] = self.lpips(pixels, sources)
            scores["thumbnail"] = metrics.thumbnails(pixels)
            shown = {"images": images} if point == OWN and seed == 0 and batch[0] == 0 else {}
            return scores | {name: space(images) for name, space in self.spaces.items()} | shown

        items, size = range(len(self.decoded)), self.args.batch_size
        found = self.stages.tensors(f"decode {point} {seed}", items, size, score)
        self.shown = found.pop("images", self.shown)
        return found

    def prepare_pixels(self) -> None:
        """Feature spaces, LPIPS, and the sources' thumbnails and features."""
        args, default = self.args, VisualTokenizer.from_pretrained
        encoder = self.own or default("default", device=args.device)
        space = "the tokenizer's encoder space" if self.own else "the shipped encoder's space"
        spaces = metrics.feature_spaces(encoder, args.inception, args.device)
        names = {x: self.protocol.distance_name(space, x) for x in spaces}
        self.spaces = {names[x]: spaces[x] for x in spaces}
        self.antialias = {names[x]: x for x in spaces}
        self.lpips = metrics.lpips_metric() if args.lpips else None
        pixels = [self.images.pixels[[i]].float() / 255 for i in self.searched]
        self.thumbnails = torch.cat([metrics.thumbnails(image) for image in pixels])

        def features(batch: list[int]) -> dict[str, Tensor]:
            return {name: space(self.images.pixels[batch]) for name, space in self.spaces.items()}

        self.real = self.stages.tensors("sources", self.decoded, args.batch_size, features)

    def numbers(self, point: Point, found: dict[str, Tensor], seed: int) -> dict[str, float]:
        """The numbers of one seed at one point, over the decoded images."""
        means = {name: found[name] for name in ("lengths", *COSINES) if name in found}
        if self.decodes:
            size = self.tokenizer.codebook_size
            codes = VisualCodes(found["values"], found["lengths"], codebook_size=size)
            scores = self.decode(point, codes, seed)
            means |= {name: scores[name] for name in ("psnr", "ssim", "lpips") if name in scores}
            means["retrieval"] = metrics.retrieved(scores["thumbnail"], self.thumbnails)
        numbers = {name: float(value.double().mean()) for name, value in means.items()}
        for name in self.spaces if self.decodes else ():
            numbers[name] = metrics.frechet(self.real[name], scores[name])
        return numbers


def main(args: Namespace) -> dict[str, Any]:
    run = Run(args)
    tokenizer, values = run.tokenizer, run.images.record()
    values |= {name: getattr(tokenizer, name) for name in ("weights", "image_size")}
    values |= {"tokenizer": tokenizer.name, "seeds": args.seeds}
    points = run.points()
    if run.own:
        values["mean_feature_over"] = run.use_mean_feature()
    everything = run.codes(OWN, 0, range(len(run.images)))
    values["codes_per_image"] = float(everything["lengths"].double().mean())
    values["features"] = {
        name: {"mean": float(v.mean()), "std": float(v.std(correction=0))}
        for name, v in everything.items()
        if name.startswith(COSINES)
    }
    if run.decodes:
        run.prepare_pixels()
    curve = []
    for point in points:
        runs = []
        for seed in range(args.seeds):  # only random selection has other codes with another seed
            codes = run.codes(point, seed if point.selection == RANDOM else 0, run.decoded)
            runs.append(run.numbers(point, codes, seed))
        curve.append({**point._asdict(), **report.spreads(runs)})
    values["curve"] = {"images": len(run.decoded), "points": curve}
    if run.decodes:
        values["pixels"] = pixel_values(run, curve[0])
        sources, shown = run.images.pixels[run.decoded[:32]], run.shown[:32]
        path = args.out / "reconstruction.png"
        plots.pairs(path, sources[: len(shown)], shown, ("source", "decoded"))
    plot(curve, args.out / "reconstruction_curve.png")
    report.write("reconstruction", args, "Reconstruction", text(values), values)
    run.stages.done()
    return values


def pixel_values(run: Run, own: dict[str, Any]) -> dict[str, Any]:
    """What compare.py reads: distances at the selector's own decision, and how they were made."""
    distances = []
    for name, x in run.antialias.items():
        kind = "Frechet" if x is None else "rFID"
        distances.append({"name": name, "kind": kind, "antialias": x, "value": own[name]})
    options = {"steps": run.args.steps, "guidance": run.args.guidance} if run.own else {}
    return {
        "images": len(run.decoded),
        "sources": len(run.searched),
        "codes_per_image": own["lengths"]["mean"],
        **options,
        "departures": run.protocol.departures(),
        "against_published": run.protocol.against_published(),
        "distances": distances,
    }


def text(values: dict[str, Any]) -> str:
    curve, pixels = values["curve"], values.get("pixels", {})
    body = f"{values['tokenizer']} ({values['weights']}). {values['set']}; "
    body += f"{values['codes_per_image']:.1f} codes per image on average."
    body += report.rejected(values["rejects"])
    if values["features"]:
        rows = [(name.replace("_", " "), value) for name, value in values["features"].items()]
        body += "\n\n## Features\n\n" + report.table(("cosine with the features", "value"), rows)
        body += "\n\nMean over patches, then mean ± std over images. Mean feature over: "
        body += f"{values['mean_feature_over']}."
    names = [name for name in curve["points"][0] if name not in Point._fields]
    rows = [(p["budget"], p["selection"], *(p[n] for n in names)) for p in curve["points"]]
    body += f"\n\n## Distortion against codes\n\n{curve['images']} images, the same in every line; "
    body += f"± over {values['seeds']} seeds. The first line is the selector's own decision.\n\n"
    body += report.table(("budget", "selection", "codes per image", *names[1:]), rows)
    body += "\n\n![distortion against mean codes](reconstruction_curve.png)"
    if pixels:
        how = "{steps} steps, guidance {guidance:g}".format(**pixels) if "steps" in pixels else ""
        body += f"\n\nPSNR and SSIM with data_range=1; retrieval: top-1 among {pixels['sources']} "
        body += f"sources in 16x16 RGB. {how}. The reference is the same crops. "
        body += "LPIPS needs --lpips, rFID --inception."
        reasons = "; ".join(pixels["against_published"])
        body += f" Not comparable with published numbers: {reasons}." if reasons else ""
        body += " Published numbers: `compare.py`.\n\n![pairs](reconstruction.png)"
    return body


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Each measure against codes per image, a curve for each selection."""
    names = {"centered": "centered cosine", "psnr": "PSNR, dB", "retrieval": "retrieval, top-1"}
    panels: dict[str, Any] = {}
    for name in (name for name in names if name in points[0]):
        lines = panels.setdefault(names[name], {})
        for point in points:
            label = point["selection"] if point["budget"] else "own decision"
            lines.setdefault(label, []).append((point["lengths"]["mean"], point[name]))
    plots.curves(path, panels, "codes per image, mean")


def arguments() -> ArgumentParser:
    sets = sorted(protocol.SETS)
    return cli.parser(
        __doc__,
        **tokenizers.OPTIONS,
        decoder=(str, "of ours: 'default', a directory or a Hub id; without, only features"),
        decoded=(200, "images of the curve, evenly spaced"),
        sources=(500, "images among which a source is searched for"),
        seeds=(3, "seeds of the decoder's noise and of random selection"),
        steps=(25, "decoding steps"),
        guidance=(3.0, "guidance scale of the decoder"),
        budgets=([int], "codes per image on the curve; 1/8 to 1/2 of the patches by default"),
        selections=([LEARNED, RANDOM, NORM], "selections on the curve", SELECTIONS),
        mean_images=(1024, "of the train split, for the mean feature"),
        inception=(Path, "Inception-v3 weights of torch-fidelity, for rFID"),
        lpips=(False, "also LPIPS; needs torchvision and its AlexNet weights"),
        set_name=(str, "what the images are; the count is checked", sets),
        force=(False, f"FID even under {protocol.FID_MIN_IMAGES} images"),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))

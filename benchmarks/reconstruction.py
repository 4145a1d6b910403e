"""How much of a picture do its codes hold, as features and as pixels?

    features: cosine of reconstruct(encode(x)) with the encoder's own features, plain and centred, beside two floors
    pixels:   PSNR, SSIM, retrieval of the source, a Frechet distance; several seeds. Needs --decoder

A plain cosine flatters, because all features share a large mean: predicting that mean alone already scores high. The
centred cosine subtracts it from both sides. Writes reconstruction.md, .json and a sheet of pairs, reconstruction.png.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import common
import torch
from common import draw, to_uint8
from metrics import EncoderSpace, cosines, feature_mean, frechet, lpips, pixel_scores
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from lavit_tok import VisualCodes, VisualTokenizer
from lavit_tok.visualize import sheet

FID_LEAST, FID_USUAL = 2048, 10_000
PUBLISHED = (
    ("TiTok", "2.21 / 1.70 / 1.71", "32 / 64 / 128"),
    ("FlexTok", "1.61 / 1.45", "1-256, set by the user"),
    ("One-D-Piece", "1.08", "256"),
    ("LlamaGen", "2.19", "256"),
    ("IBQ", "1.37", "256"),
    ("VFMTok", "0.89", "256"),
    ("UniTok", "0.41", "256 x 8"),
    ("Cosmos DI16", "4.57", "256"),
    ("Show-o", "3.50", "256"),
    ("AdaTok", "1.50", "about 118 on average, adaptive for each image"),
    ("NesTok", "3.49 / 2.10 / 1.39 / 0.98", "32 / 64 / 128 / 256"),
    ("LaVIT, SEED, Tar, X-Omni", "none published", "-"),
)
"""rFID on ImageNet-256 as their authors give it. Another data set, size and feature space than a run here."""


@torch.no_grad()
def measure_features(tokenizer: VisualTokenizer, batches: Any, mean: Tensor) -> tuple[dict[str, Any], VisualCodes]:
    """Mean and standard deviation over images of every cosine, and the codes of all pictures."""
    found: dict[str, list[Tensor]] = {}
    codes = []
    for batch in batches:
        pixels = tokenizer.preprocess(batch)
        features = tokenizer.features(pixels)
        keep = tokenizer.select(tokenizer.score(features))  # encode_pixels, without running the encoder twice
        coded = tokenizer.quantize(tokenizer.project(tokenizer.merge(features, keep)), keep.sum(1))
        for name, value in cosines(features, tokenizer.reconstruct(coded), mean).items():
            found.setdefault(name, []).append(value.cpu())
        codes.append(coded.to("cpu"))
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    values: dict[str, Any] = {
        n: {"mean": float(v.mean()), "std": float(v.std(correction=0))} for n, v in joined.items()
    }
    values["centred_floor_set_mean"] = {"mean": 0.0, "std": 0.0}
    return values, VisualCodes.cat(codes)


def distances(tokenizer: VisualTokenizer, a: Namespace, sources: Tensor, drawn: Tensor) -> dict[str, Any]:
    """rFID where Inception weights are given, else the Frechet distance in the encoder's space, which is no FID."""
    few = "" if len(drawn) >= FID_USUAL else f" over only {len(drawn)} pictures (comparable from {FID_USUAL} on)"
    if not a.inception:
        value = frechet(FrechetInceptionDistance(EncoderSpace(tokenizer)), sources, drawn, a.batch_size)
        return {f"Frechet distance in the tokenizer's encoder space (not FID){few}": value}
    found = {}
    for antialias in (True, False):
        metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=a.inception, antialias=antialias)
        name = f"rFID, torchmetrics Inception-v3 2048-d, antialias={antialias}{few}"
        found[name] = frechet(metric, sources, drawn, a.batch_size)
    return found


def pairs_sheet(sources: Tensor, drawn: Tensor, pairs: int = 32, across: int = 8) -> Image.Image:
    """Source and drawn picture side by side, `across` pairs a line."""
    flat = [
        Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())
        for pair in zip(sources[:pairs], drawn[:pairs], strict=True)
        for x in pair
    ]
    return sheet([flat[i : i + 2 * across] for i in range(0, len(flat), 2 * across)], ["source", "drawn"] * across)


def measure_pixels(tokenizer: VisualTokenizer, codes: VisualCodes, pictures: common.Pictures, a: Namespace) -> Any:
    """Every seed's scores, their mean and spread, and the pictures of the first seed."""
    from lavit_tok import PixelDecoder

    count = min(a.pictures, len(pictures))
    if a.inception and count < FID_LEAST and not a.force:
        raise ValueError(
            f"rFID over {count} pictures means nothing: give at least {FID_LEAST} (--pictures), or --force"
        )
    candidates = common.evenly(max(count, a.sources), len(pictures))
    places = [candidates[i] for i in common.evenly(count, len(candidates))]
    others = [i for i in candidates if i not in set(places)]
    sources = pictures.pixels[places]
    searched = pictures.pixels[places + others].float() / 255
    decoder = PixelDecoder.from_pretrained(a.decoder).to(a.device)
    decoder.set_progress_bar_config(disable=True)
    runs: list[dict[str, float]] = []
    first = None
    for seed in range(a.seeds):
        drawn = draw(
            decoder, codes.take(places), pictures.pixels.shape[-1], seed, a.batch_size, a.device, a.steps, a.guidance
        )
        scores = pixel_scores(drawn, searched) | ({"lpips": lpips(drawn, searched[:count])} if a.lpips else {})
        runs.append(scores | distances(tokenizer, a, sources, to_uint8(drawn)))
        first = to_uint8(drawn) if first is None else first
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in runs[-1].items()), flush=True)
    summary = {name: common.spread([r[name] for r in runs]) for name in runs[0]}
    settings = {"pictures": count, "sources": len(searched), "steps": a.steps, "guidance": a.guidance, "seeds": a.seeds}
    return {**settings, "per_seed": runs, "summary": summary}, sources, first


# The script


def main(arguments: Namespace) -> dict[str, Any]:
    tokenizer = common.load_tokenizer(arguments)
    size, batch = tokenizer.config.image_size, arguments.batch_size
    pictures = common.load_pictures(arguments.data, size, arguments.split, arguments.limit)
    reference = common.reference_pictures(arguments.data, size, arguments.mean_pictures, pictures)
    mean = feature_mean(tokenizer, reference.batches(batch))
    features, codes = measure_features(tokenizer, pictures.batches(batch), mean)
    values: dict[str, Any] = {"set": pictures.describe(), "mean_feature_over": reference.describe()}
    values |= {"codes_per_image": float(codes.lengths.double().mean()), "features": features}
    body = f"{values['set']}; {values['codes_per_image']:.1f} codes an image on average.\n\n" + feature_text(values)
    if arguments.decoder:
        pixels, sources, drawn = measure_pixels(tokenizer, codes, pictures, arguments)
        values["pixels"] = pixels
        body += "\n\n" + pixel_text(pixels)
        arguments.out.mkdir(parents=True, exist_ok=True)
        pairs_sheet(sources, drawn).save(arguments.out / "reconstruction.png")
    common.write("reconstruction", arguments.out, "Reconstruction", body, values)
    return values


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
    text = "## Pixels\n\n" + common.table(("measure", f"mean ± std over {pixels['seeds']} seeds"), rows)
    text += f"\n\n{pixels['pictures']} pictures, {pixels['steps']} steps, guidance {pixels['guidance']:g}. "
    text += "The reference is the same crops.\n\n![pairs](reconstruction.png)\n\n## Published, not comparable\n\n"
    text += "rFID on ImageNet-256 by the authors' own account; our pictures, size and feature space are others.\n\n"
    return text + common.table(("tokenizer", "rFID", "tokens an image"), PUBLISHED)


def arguments() -> Any:
    found = common.parser(__doc__)
    found.add_argument("--decoder", help="'default', a directory or a Hub id; without it only features are measured")
    found.add_argument("--pictures", type=int, default=200, help="how many are drawn, evenly spaced over the set")
    found.add_argument("--sources", type=int, default=500, help="pictures among which a drawn one's source is sought")
    found.add_argument("--seeds", type=int, default=3, help="seeds of the decoder's noise")
    found.add_argument("--steps", type=int, default=25)
    found.add_argument("--guidance", type=float, default=3.0)
    found.add_argument(
        "--mean-pictures", type=int, default=1024, help="pictures of the train split for the mean feature"
    )
    found.add_argument("--inception", type=Path, help="Inception-v3 weights of torch-fidelity, for rFID")
    found.add_argument("--lpips", action="store_true", help="also LPIPS; needs torchvision and its AlexNet weights")
    found.add_argument("--force", action="store_true", help=f"rFID even under {FID_LEAST} pictures")
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

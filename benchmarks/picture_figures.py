"""What text_to_image.py measures of made pictures: distances to the true ones, nearness to their captions."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import caption_sets
import metrics
import torch
from caption_space import ranks, top
from figures import SHOWN
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lavit_lm import MultimodalLM
from lavit_tok.encode.image_processor import VisualImageProcessor


class Reference:
    """True pictures as the protocol cuts them: features of each space, and thumbnails to show.

    Args:
        places: of the set. Pictures that cannot be read are in no figure, nor are those made of their captions.
    """

    def __init__(
        self,
        found: caption_sets.CaptionSet,
        places: Sequence[int],
        spaces: Any,
        scorers: Any,
        a: Namespace,
    ):
        self.rejects: list[dict[str, str]] = []
        self.good: list[int] = []
        """Which of the places have a picture."""
        self.shown: dict[int, Image.Image] = {}
        pixels = self._read(found, places, a)
        self.features, self.described = described(
            pixels, len(places), spaces, scorers, "reference", a.batch_size
        )
        if not self.good:
            raise ValueError(
                f"{found.name}: not one usable picture of {len(places)}, the first: {self.rejects[0]}"
            )

    def _read(
        self, found: caption_sets.CaptionSet, places: Sequence[int], a: Namespace
    ) -> Iterator[Tensor]:
        for number, place in enumerate(places):
            picture, reject = found.open(place)
            if picture is None:
                self.rejects.append(reject or {})
                continue
            self.good.append(number)
            mode = "square" if a.squeeze else "center_crop"
            pixels = VisualImageProcessor(a.size, mode).resize(picture)
            if len(self.shown) < SHOWN:
                self.shown[number] = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            yield pixels


@torch.no_grad()
def described(
    pixels: Iterator[Tensor], count: int, spaces: Any, scorers: Any, what: str, batch_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features [n d] of every space and vectors [n e] of every scorer, of pictures that come one by one."""
    features: dict[str, list[Tensor]] = {name: [] for name in spaces}
    vectors: dict[str, list[Tensor]] = {name: [] for name in scorers}

    def take(batch: list[Tensor]) -> None:
        images = torch.stack(batch)
        for name, space in spaces.items():
            features[name].append(space(images).cpu())
        for name, scorer in scorers.items():
            vectors[name].append(scorer.describe(images))

    batch: list[Tensor] = []
    for one in tqdm(pixels, total=count, desc=what, unit=" pictures"):
        batch.append(one)
        if len(batch) == batch_size:
            take(batch)
            batch = []
    if batch:
        take(batch)
    joined = [
        {name: torch.cat(parts) for name, parts in found.items() if parts}
        for found in (features, vectors)
    ]
    return joined[0], joined[1]


def spaces_of(lm: MultimodalLM, a: Namespace) -> dict[str, Any]:
    """Feature spaces by the name of their distance."""
    if not a.inception:
        return {
            "Frechet distance in the visual tokenizer's encoder space (not FID)": metrics.EncoderSpace(
                lm.visual_tokenizer
            )
        }
    name = "FID, torchmetrics Inception-v3 2048-d, antialias="
    return {
        f"{name}{antialias}": metrics.inception(a.inception, antialias)
        for antialias in (True, False)
    }


def made_figures(
    features: dict[str, Tensor],
    vectors: dict[str, Tensor],
    against: dict[str, Tensor],
    texts: Any,
    spread: list[int],
) -> dict[str, float]:
    """Distances to the reference, and nearness to the captions.

    Args:
        texts: vectors [n e] of the pictures' captions, by scorer.
        spread: places of pictures whose captions all differ, among which the own one is sought.
    """
    values = {
        name: metrics.frechet_of_features(against[name], found) for name, found in features.items()
    }
    for name, found in vectors.items():
        values[f"{name}: 100 x cosine with the own caption"] = 100 * float(
            (found * texts[name]).sum(1).mean()
        )
        hits = top(ranks(found[spread], texts[name][spread]))
        values |= {f"{name}: own caption among {len(spread)}, {k}": v for k, v in hits.items()}
    return values

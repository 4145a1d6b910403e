"""Generate many images of one prompt, keep the best (DaVinci: 128, reranked by CLIP)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


def rerank(
    images: Sequence[Any], score: Callable[[Sequence[Any]], Iterable[float]], best: int = 1
) -> list[Any]:
    """Return the images with the highest scores, best first; equal scores keep their order.

        rerank(lm.generate_images("a red apple", 128), score)[0]

    Args:
        images: as generate_images returns them, or anything that the scorer takes.
        score: all images -> a number for each, greater is better: the image-text similarity of a
            CLIP model, or `lambda images: [float(lm.rank([i], ["a red apple"])) for i in images]`.
        best: number of images to return.

    Raises:
        ValueError: no images, another number of scores, or scores that are NaN.
    """
    if not 1 <= best <= len(images):
        raise ValueError(f"best: expected 1 to the number of images, {len(images)}, got {best}")
    scores = torch.tensor([float(value) for value in score(images)])
    if len(scores) != len(images) or bool(scores.isnan().any()):
        raise ValueError(
            f"score: expected a number for each of {len(images)} images, got {scores.tolist()[:8]}"
        )
    return [images[i] for i in scores.argsort(descending=True, stable=True)[:best].tolist()]

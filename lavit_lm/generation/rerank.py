"""Many pictures of one prompt, the best of them first (DaVinci draws 128 and keeps the one that CLIP likes best)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


def rerank(
    images: Sequence[Any], score: Callable[[Sequence[Any]], Iterable[float]], best: int = 1
) -> list[Any]:
    """The best pictures by a scorer, best first; of equal ones the earlier.

        rerank(lm.generate_images("a red apple", 128), score)[0]

    Args:
        pictures: as generate_images gives them, or anything the scorer takes.
        score: all pictures -> a number for each, greater is better, e.g. a CLIP model's similarity with the prompt, or
            `lambda pictures: [float(lm.rank([picture], ["a red apple"])) for picture in pictures]`.
        best: how many.

    Raises:
        ValueError: no pictures, another number of scores, or scores that are not numbers.
    """
    if not 1 <= best <= len(images):
        raise ValueError(f"best: expected 1 to the number of pictures, {len(images)}, got {best}")
    scores = torch.tensor([float(one) for one in score(images)])
    if len(scores) != len(images) or bool(scores.isnan().any()):
        raise ValueError(
            f"score: expected a number for each of {len(images)} pictures, got {scores.tolist()[:8]}"
        )
    return [images[i] for i in scores.argsort(descending=True, stable=True)[:best].tolist()]

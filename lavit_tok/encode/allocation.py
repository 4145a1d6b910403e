"""Keep scores -> keep mask: which patches of each image are kept, and how many.

    log-probabilities [b n 2]  ->  bool [b n], at least one patch an image

The decision follows a threshold, a budget or Gumbel noise; `straight_through` is its differentiable form, for
training. LaVIT (ICLR 2024), section 3.1.
"""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Integral

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.encode.selector import keep_scores

Budget = int | float | None


def dithered(
    log_probs: Float[Tensor, "batch patches 2"], times: int = 1
) -> Float[Tensor, "batch patches 2"]:
    """Log-probabilities with ordered_noise added to every image's keep scores; times=-1 takes it off again."""
    scores = keep_scores(log_probs)
    scores = scores + times * ordered_noise(scores.shape[1]).to(scores.device)
    return torch.stack([F.logsigmoid(scores), F.logsigmoid(-scores)], dim=-1)


@lru_cache(maxsize=8)
def ordered_noise(patches: int) -> Float[Tensor, " patches"]:
    """A fixed draw of the training's logistic noise, as even over the image as it can be (ordered dithering).

    Its values are the quantiles (rank + 1/2) / patches, ranked by the Bayer matrix, for 16 patches

         0  8  2 10        A selector that learnt under noise gives alike patches like scores: a threshold keeps all of
        12  4 14  6        them or none. With this noise, a third of a plain wall is kept, spread over it, each picture
         3 11  1  9        the same way at each call; and the counts are those that training expects.
        15  7 13  5

    Raises:
        ValueError: patches that form no square.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"ordered noise needs a square number of patches, got {patches}")
    bayer = torch.zeros(1, 1)
    while len(bayer) < side:
        bayer = torch.cat(
            [torch.cat([4 * bayer, 4 * bayer + 2], 1), torch.cat([4 * bayer + 3, 4 * bayer + 1], 1)]
        )
    ranks = bayer[:side, :side].flatten().argsort().argsort()
    return ((ranks + 0.5) / patches).logit()


def select(
    log_probs: Float[Tensor, "batch patches 2"],
    budget: Budget = None,
    sample: bool = False,
    generator: torch.Generator | None = None,
    dither: bool = False,
) -> Bool[Tensor, "batch patches"]:
    """Which patches are kept: at least one an image.

    Args:
        budget: None keeps where log p_keep > log p_drop; an int keeps exactly that many of each image (all, if it has
            fewer patches); a fraction in (0, 1] keeps that share of the batch's patches, where scores are highest.
        sample: draw Gumbel noise onto the scores first, as in training; needs a generator to be repeatable.
        generator: source of that noise.
        dither: the log-probabilities are dithered; where noise is sampled, the fixed one is taken off first.

    Raises:
        ValueError: a budget that is no positive int or fraction, or NaN scores.
    """
    scores = keep_scores(dithered(log_probs, -1) if dither and sample else log_probs)
    if bool(scores.isnan().any()):
        raise ValueError(
            "keep scores hold NaN, as do this batch's pixels or features: the mask would be arbitrary"
        )
    if sample:
        scores = scores + logistic_noise(scores, generator)
    return keep_by_budget(scores, budget)


def keep_by_budget(
    scores: Float[Tensor, "batch patches"], budget: Budget
) -> Bool[Tensor, "batch patches"]:
    """The keep mask of any score, at any budget (see select). Equal scores: the earlier patch of the batch wins."""
    batch, patches = scores.shape
    best = (
        F.one_hot(scores.argmax(1), patches).bool()
        if batch
        else torch.zeros_like(scores, dtype=torch.bool)
    )
    if budget is None:
        return (scores > 0) | best
    number = isinstance(budget, (int, Integral, float)) and not isinstance(budget, bool)
    if not number or not math.isfinite(budget) or budget <= 0:
        raise ValueError(
            f"budget: expected a positive number of codes or a fraction in (0, 1], got {budget!r}"
        )
    if isinstance(budget, (int, Integral)):  # a numpy integer is the latter only
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : min(int(budget), patches)]
        return torch.zeros_like(best).scatter(1, order, True)
    if budget > 1:
        raise ValueError(
            f"budget: a fraction must be at most 1, got {budget}; for codes an image give an int"
        )
    count = max(batch, round(budget * batch * patches))
    flat = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(best, float("inf")).flatten()
    order = flat.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(best).flatten().scatter(0, order, True).view(batch, patches)


def logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """The difference of two Gumbel draws, as added to the difference of two log-probabilities."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device).clamp(1e-6, 1 - 1e-6)
    return uniform.log() - (-uniform).log1p()


def shift_to_ratio(scores: Float[Tensor, "batch patches"], share: float) -> Float[Tensor, ""]:
    """What to add to all scores so that sampling them keeps this share of the batch's patches, in expectation.

    The root c of mean(sigmoid(s + c)) = share, with its gradient: through s + c no gradient can change the share, only
    which patches it goes to. The straight-through gradient alone pushes the share up, for it takes a kept patch's worth
    at the margin for its worth altogether.
    """
    with torch.no_grad():
        low, high = -30 - scores.max(), 30 - scores.min()
        for _ in range(40):
            middle = (low + high) / 2
            above = (scores + middle).sigmoid().mean() > share
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    chance = (scores + middle).sigmoid()
    slope = (chance * (1 - chance)).mean().detach().clamp(min=1e-6)
    return middle - (chance.mean() - chance.mean().detach()) / slope


def straight_through(
    log_probs: Float[Tensor, "batch patches 2"],
    generator: torch.Generator | None,
    sample: bool = True,
    temperature: float = 1.0,
    share: float | None = None,
) -> Float[Tensor, "batch patches"]:
    """The training decision M in {0, 1} with the gradient of the soft one (Gumbel-softmax, hard, straight-through).

    With `share`, the batch's scores are shifted first so that this share of the patches is kept (shift_to_ratio).
    """
    scores = keep_scores(log_probs)
    if share is not None:
        scores = scores + shift_to_ratio(scores, share)
    if sample:
        scores = scores + logistic_noise(scores, generator)
    soft = (scores / temperature).sigmoid()
    hard = keep_by_budget(scores.detach(), None).to(soft.dtype)
    # In this order the sum is exactly 0 or 1: (hard + soft) - soft rounds, and a kept patch at 1 + 1e-7 would be a
    # dropped one of weight -1e-7, which the merger's exponential can blow up.
    return hard + (soft - soft.detach())

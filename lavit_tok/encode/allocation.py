"""Keep scores -> keep mask: which patches of each image are kept, and how many.

    log-probabilities [b n 2]  ->  bool [b n], at least one patch per image

The decision follows a threshold, a budget or Gumbel noise; `straight_through` is its differentiable
form for training. LaVIT (ICLR 2024), section 3.1.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from numbers import Integral

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.encode.selector import keep_scores
from lavit_tok.nn.nested_order import bayer

Budget = int | float | None
"""An int: codes per image; a fraction in (0, 1]: of the batch's patches; None: threshold."""


def select(
    log_probs: Float[Tensor, "batch patches 2"],
    budget: Budget = None,
    sample: bool = False,
    generator: torch.Generator | None = None,
    dither: bool = False,
) -> Bool[Tensor, "batch patches"]:
    """Decide which patches are kept, at least one per image.

    Args:
        log_probs: the selector's output, dithered if `dither` is set.
        budget: None keeps patches with log p_keep > log p_drop; an int keeps exactly that many per
            image (all, if it has fewer patches); a fraction in (0, 1] keeps that fraction of the
            batch's patches, where scores are highest.
        sample: add Gumbel noise to the scores, as in training.
        generator: source of that noise.
        dither: the log-probabilities contain the ordered noise; sampled noise replaces it.

    Raises:
        ValueError: a budget that is no positive int or fraction, or NaN scores.
    """
    scores = keep_scores(dithered(log_probs, -1) if dither and sample else log_probs)
    if bool(scores.isnan().any()):
        raise ValueError(
            "keep scores contain NaN, as do this batch's pixels or features: the keep mask would "
            "be arbitrary"
        )
    if sample:
        scores = scores + logistic_noise(scores, generator)
    return keep_by_budget(scores, budget)


def keep_by_budget(
    scores: Float[Tensor, "batch patches"], budget: Budget
) -> Bool[Tensor, "batch patches"]:
    """The keep mask of any scores at any budget (see select).

    Among equal scores, the earlier patch of the batch is kept.
    """
    batch, patches = scores.shape
    best = torch.zeros_like(scores, dtype=torch.bool)
    if batch:
        best.scatter_(1, scores.argmax(1, keepdim=True), True)
    if budget is None:
        return (scores > 0) | best
    check_budget(budget, patches)
    if isinstance(budget, (int, Integral)):  # NumPy integers are Integral but not int
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : min(int(budget), patches)]
        return torch.zeros_like(best).scatter(1, order, True)
    count = max(batch, round(budget * batch * patches))
    # Infinite scores are clamped: only an image's best patch may come before all others.
    flat = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(best, float("inf")).flatten()
    order = flat.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(best).flatten().scatter(0, order, True).view(batch, patches)


def check_budget(budget: int | float, patches: int | None = None) -> None:
    """Raise ValueError unless a budget is a positive integer or a fraction in (0, 1].

    An integer above `patches` is a warning, once: every image gets that many codes.
    """
    is_number = isinstance(budget, (Integral, float)) and not isinstance(budget, bool)
    if not is_number or not math.isfinite(budget) or budget <= 0:
        raise ValueError(
            f"budget: expected a positive number of codes or a fraction in (0, 1], got {budget!r}"
        )
    if not isinstance(budget, (int, Integral)) and budget > 1:
        raise ValueError(
            f"budget: a fraction must be at most 1, got {budget}; codes per image are an int"
        )
    if patches is not None and budget > patches:
        _warn_of_budget(int(budget), patches)


@lru_cache(maxsize=64)  # warnings' own "once" ends with every warnings.catch_warnings
def _warn_of_budget(budget: int, patches: int) -> None:
    warnings.warn(
        f"budget: expected at most {patches} codes per image, one for each patch, got {budget}",
        stacklevel=2,
    )


def dithered(
    log_probs: Float[Tensor, "batch patches 2"], times: int = 1
) -> Float[Tensor, "batch patches 2"]:
    """Add ordered_noise to the keep scores of every image; times=-1 subtracts it again."""
    scores = keep_scores(log_probs)
    scores = scores + times * ordered_noise(scores.shape[1]).to(scores.device)
    return torch.stack([F.logsigmoid(scores), F.logsigmoid(-scores)], dim=-1)


@lru_cache(maxsize=8)
def ordered_noise(patches: int) -> Float[Tensor, " patches"]:
    """Fixed logistic noise, spread as evenly over the image as possible (ordered dithering).

    Its values are the quantiles (rank + 1/2) / patches, ranked by the Bayer matrix, for 16 patches

         0  8  2 10
        12  4 14  6
         3 11  1  9
        15  7 13  5

    A selector trained under noise gives similar patches similar scores, so that a threshold keeps
    all or none of them. With this noise, a third of a uniform area is kept, evenly spread and the
    same at each call, and the number of codes is the one expected in training.

    Raises:
        ValueError: a number of patches that is no square.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"ordered noise needs a square number of patches, got {patches}")
    ranks = bayer(side).flatten().argsort().argsort()
    return ((ranks.float() + 0.5) / patches).logit()


def logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Difference of two Gumbel samples: the Gumbel noise of a difference of log-probabilities."""
    # Clamped: a uniform sample of exactly 0 would give infinite noise.
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    return uniform.log() - (-uniform).log1p()


def shift_to_ratio(scores: Float[Tensor, "batch patches"], ratio: float) -> Float[Tensor, ""]:
    """The constant to add to all scores so that sampling keeps this ratio of the batch's patches.

    The root c of mean(sigmoid(s + c)) = ratio, with its gradient: through s + c no gradient can
    change the ratio, only which patches are kept. Without it, the straight-through gradient
    increases the ratio, because it takes the marginal value of a kept patch for its total value.
    """
    with torch.no_grad():
        low, high = -30 - scores.max(), 30 - scores.min()
        for _ in range(40):  # bisection
            middle = (low + high) / 2
            above = (scores + middle).sigmoid().mean() > ratio
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    probability = (scores + middle).sigmoid()
    # One Newton step whose value is 0 and whose gradient is that of the implicit function.
    slope = (probability * (1 - probability)).mean().detach().clamp(min=1e-6)
    return middle - (probability.mean() - probability.mean().detach()) / slope


def straight_through(
    log_probs: Float[Tensor, "batch patches 2"],
    generator: torch.Generator | None,
    sample: bool = True,
    temperature: float = 1.0,
    ratio: float | None = None,
) -> Float[Tensor, "batch patches"]:
    """The training decision M in {0, 1}: hard straight-through Gumbel-softmax.

    Args:
        log_probs: the selector's output, without ordered noise.
        generator: source of the Gumbel noise.
        sample: False decides without noise.
        temperature: of the softmax whose gradient is used.
        ratio: shift the batch's scores first, so that this ratio is kept (shift_to_ratio).
    """
    scores = keep_scores(log_probs)
    if ratio is not None:
        scores = scores + shift_to_ratio(scores, ratio)
    if sample:
        scores = scores + logistic_noise(scores, generator)
    soft = (scores / temperature).sigmoid()
    hard = keep_by_budget(scores.detach(), None).to(soft.dtype)
    # In this order the sum is exactly 0 or 1. (hard + soft) - soft rounds, and a kept patch at
    # 1 + 1e-7 would be a dropped one of weight -1e-7, which the merger's exponential can amplify.
    return hard + (soft - soft.detach())

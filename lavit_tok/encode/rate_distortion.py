"""The number of codes of an image, from the errors predicted for every number of codes.

    errors[i, k - 1]   error of image i with k codes: 1 - centered cosine, or an error of colors

    price     add codes while each saves more than `price`: argmin over k of E_i(k) + price * k
    fraction  of a batch's patches, spent where the next codes save most: one price for all images,
              the highest that spends no more (equal slope, which is best for a mean budget)
    quality   the fewest codes whose error is at most a target; search() measures it

A curve is replaced by its lower convex hull first, since no price selects a point above it:

    number of codes  1    2    3    4    5
    errors          .9   .8   .4   .4   .3      at a price of .06: three codes,
    hull            .9   .65  .4   .35  .3      at a price of .04: five
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Quality = float | int | tuple[str, float | int]
"""A centered cosine in 0..1, or ("psnr", dB)."""


@dataclass(frozen=True)
class Target:
    """A quality that an image has to reach, as an error that falls with the number of codes."""

    kind: Literal["cosine", "psnr"]
    value: float
    """Centered cosine between features and reconstructed features, or dB of the patches' colors."""

    @classmethod
    def of(cls, quality: Any) -> Target:
        """From `quality=0.85` or `quality=("psnr", 20)`.

        Raises:
            ValueError: a cosine outside 0..1, a PSNR that is not positive, or another form.
        """
        kind, value = "cosine", quality
        if isinstance(quality, tuple | list):
            kind, value = (*quality, None, None)[:2]
        # Real: NumPy's numbers, too; True and False are among them
        valid = isinstance(value, Real) and value is not True
        number = float(value) if valid else math.nan
        if kind == "cosine" and 0 < number < 1:
            return cls("cosine", number)
        if kind == "psnr" and 0 < number < math.inf:
            return cls("psnr", number)
        raise ValueError(
            "quality: expected a centered cosine between 0 and 1, or ('psnr', dB) above 0, "
            f"got {quality!r}"
        )

    @property
    def error(self) -> float:
        """1 - cosine; or the root mean squared error of colors in 0..1."""
        return 1 - self.value if self.kind == "cosine" else 10 ** (-self.value / 20)

    def reached(self, error: float) -> str:
        """An error as text, in the units of `value`."""
        if self.kind == "cosine":
            return f"a centered cosine of {1 - error:.3f}"
        return f"{-20 * math.log10(max(error, 1e-12)):.1f} dB"


def lower_hull(errors: Float[Tensor, "batch most"]) -> Float[Tensor, "batch most"]:
    """The largest convex, non-increasing curve that is nowhere above `errors`; float64.

    Of the lines through two points of a curve, the hull at k is the lowest value that any of them
    takes there. Curves are short (hundreds): one pass over the corners, from the left, is enough.
    """
    values = errors.detach().double().cummin(1).values.cpu().numpy()
    hull, steps = values.copy(), np.arange(values.shape[1])
    for curve, out in zip(values.tolist(), hull, strict=True):
        corners: list[int] = []
        for k, value in enumerate(curve):
            while len(corners) > 1:
                a, b = corners[-2:]
                if (curve[b] - curve[a]) * (k - a) < (value - curve[a]) * (b - a):
                    break
                corners.pop()
            corners.append(k)
        at = np.array(corners)
        last = at.searchsorted(steps[:-1], side="right") - 1  # the corner before each k
        left, right, start = at[last], at[last + 1], out[at[last]]
        out[:-1] = start + (steps[:-1] - left) / (right - left) * (out[right] - start)
    return torch.from_numpy(hull).to(errors.device)


def counts_at_price(errors: Float[Tensor, "batch most"], price: float) -> Int64[Tensor, " batch"]:
    """Codes of every image that minimize E(k) + price * k: of equal sums the fewest. At least 1.

    Raises:
        ValueError: a negative price.
    """
    if not price >= 0:
        raise ValueError(f"price: expected a number from 0 on (error saved per code), got {price}")
    hull = lower_hull(errors)
    gains = hull[:, :-1] - hull[:, 1:]  # falling, since the hull is convex
    return 1 + (gains > price).sum(1)


def counts_at_total(errors: Float[Tensor, "batch most"], total: int) -> Int64[Tensor, " batch"]:
    """Distribute `total` codes over a batch: one per image, each further one where it saves most.

    Of equal gains, that of the earlier image is taken. All patches are kept where the total allows.
    """
    batch, most = errors.shape
    hull = lower_hull(errors)
    gains = hull[:, :-1] - hull[:, 1:]
    left = max(0, min(total, batch * most) - batch)
    order = gains.flatten().argsort(descending=True, stable=True)[:left]
    # Gains are non-increasing along a curve, and equal ones are taken in order, so that those taken
    # are the first ones of each curve.
    return (
        1 + torch.zeros_like(gains).flatten().index_fill(0, order, 1).view_as(gains).sum(1).long()
    )


def first_kept(
    order: Int64[Tensor, "batch most"], counts: Int64[Tensor, " batch"]
) -> Bool[Tensor, "batch most"]:
    """The keep mask of each image's first `counts` patches; order[i, j] is the patch of rank j."""
    within = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return torch.zeros_like(within).scatter(1, order, within)


def counts_at_error(errors: Float[Tensor, "batch most"], target: float) -> Int64[Tensor, " batch"]:
    """Fewest codes whose error is at most `target`; all, where none is."""
    reached = errors.cummin(1).values <= target
    return torch.where(reached.any(1), reached.int().argmax(1) + 1, errors.shape[1])


def cheapest_near(
    measure: Callable[[Int64[Tensor, " batch"]], Float[Tensor, " batch"]],
    start: Int64[Tensor, " batch"],
    price: float,
    max_codes: int,
) -> tuple[Int64[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The count near the predicted one that minimizes error + price * count, and its error.

    Five passes: half, 0.7, 1, 1.4 and 2 times the predicted number.
    """
    tried = torch.stack(
        [(start * 2 ** (step / 2)).round().long().clamp(1, max_codes) for step in (-2, -1, 0, 1, 2)]
    )
    errors = torch.stack([measure(counts) for counts in tried])
    best = (errors + price * tried).argmin(0, keepdim=True)
    return tried.gather(0, best)[0], errors.gather(0, best)[0]


def search(
    measure: Callable[[Int64[Tensor, " batch"]], Float[Tensor, " batch"]],
    start: Int64[Tensor, " batch"],
    target: float,
    max_codes: int,
    passes: int = 6,
) -> tuple[Int64[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Fewest codes found whose measured error is at most `target`, and that error.

    Every pass measures all images once, each at a number of codes of its own: first the predicted
    one, then twice or half of it until the target is bracketed, then the middle of the bracket. An
    image that no number of codes brings to the target gets all.

        start 8, met    ->  4, not met  ->  6, met  ->  5, not met   ->  6
        start 8, not    ->  16, met     ->  12, not ->  14, met ...

    Args:
        measure: errors with given numbers of codes, one for each image.
        start: predicted numbers of codes, 1..max_codes.
        target: error to reach.
        max_codes: most codes of an image.
        passes: calls of `measure` at most; one more where an image met the target at none of its
            counts.
    """
    low = torch.zeros_like(start)  # most codes known not to do; 0 for none
    high = torch.full_like(start, max_codes + 1)  # fewest codes known to do; max_codes + 1 for none
    error = torch.full(start.shape, float("nan"), dtype=torch.float64, device=start.device)
    count = start.clamp(1, max_codes)
    for _ in range(passes):
        measured = measure(count)
        met = measured <= target
        error = torch.where(met & (count < high), measured.double(), error)
        high = torch.where(met, torch.minimum(high, count), high)
        low = torch.where(met, low, torch.maximum(low, count))
        middle = (low + high) // 2
        wider = torch.where(
            high > max_codes, (count * 2).clamp(max=max_codes), (count // 2).clamp(min=1)
        )
        bracketed = (low > 0) & (high <= max_codes)
        count = torch.where(bracketed, middle, wider).clamp(1, max_codes)
        count = torch.where(high - low <= 1, high.clamp(max=max_codes), count)
        if bool((high - low <= 1).all()):
            break
    missed = high > max_codes
    if bool(missed.any()):
        counts = high.clamp(max=max_codes)
        error = torch.where(missed, measure(counts).double(), error)
    return high.clamp(max=max_codes), error

"""How many codes an image gets, from the errors predicted for it at every number of codes.

    errors[i, k - 1]   error of image i with k codes: 1 - centered cosine, or an error of colors

    price     spend a code while it saves more than `price`: argmin over k of E_i(k) + price * k
    fraction  of a batch's patches, dealt where the next codes save most: one price for all images,
              the highest that spends no more (equal slope, which is best for a mean budget)
    quality   the fewest codes whose error is at most a target; search() measures it

A curve is replaced by its lower convex hull first, since no price picks a point above it:

    number of codes  1    2    3    4    5
    errors          .9   .8   .4   .4   .3      at a price of .06 three codes are dealt,
    hull            .9   .65  .4   .35  .3      at a price of .04 five
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

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
    """As asked for: centered cosine between features and reconstructed features, or dB of the
    patches' colors."""

    @classmethod
    def of(cls, quality: Any) -> Target:
        """From `quality=0.85` or `quality=("psnr", 20)`.

        Raises:
            ValueError: a cosine outside 0..1, a PSNR that is not positive, or another form.
        """
        kind, value = (
            ("cosine", quality) if isinstance(quality, Real) else (*tuple(quality), None, None)[:2]
        )
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if kind == "cosine" and number and 0 < value < 1:
            return cls("cosine", float(value))
        if kind == "psnr" and number and value > 0:
            return cls("psnr", float(value))
        raise ValueError(
            "quality: expected a centered cosine between 0 and 1, or ('psnr', dB) above 0, "
            f"got {quality!r}"
        )

    @property
    def error(self) -> float:
        """1 - cosine; or the root mean squared error of colors in 0..1."""
        return 1 - self.value if self.kind == "cosine" else 10 ** (-self.value / 20)

    def reached(self, error: float) -> str:
        """What an error is in the units that were asked for."""
        if self.kind == "cosine":
            return f"a centered cosine of {1 - error:.3f}"
        return f"{-20 * math.log10(max(error, 1e-12)):.1f} dB"


def lower_hull(errors: Float[Tensor, "batch most"]) -> Float[Tensor, "batch most"]:
    """The largest convex, non-increasing curve that is nowhere above `errors`; float64.

    Of the lines through two points of a curve, the hull at k is the lowest value that any of them
    takes there. Rows are short (hundreds), so one pass over the corners, from the left, is enough.
    """
    values = errors.double().cummin(1).values.cpu()
    hull = torch.empty_like(values)
    for row, out in zip(values.tolist(), hull, strict=True):
        corners: list[int] = []
        for k, value in enumerate(row):
            while len(corners) > 1:
                a, b = corners[-2:]
                if (row[b] - row[a]) * (k - a) < (value - row[a]) * (b - a):
                    break
                corners.pop()
            corners.append(k)
        for a, b in itertools.pairwise(corners):
            steps = torch.arange(b - a, dtype=torch.float64) / (b - a)
            out[a:b] = row[a] + steps * (row[b] - row[a])
        out[corners[-1] :] = row[-1]
    return hull.to(errors.device)


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
    """`total` codes dealt over a batch: one to every image, each further one where it saves most.

    Of equal gains the earlier image of the batch wins. All patches are kept where the total allows.
    """
    batch, most = errors.shape
    hull = lower_hull(errors)
    gains = hull[:, :-1] - hull[:, 1:]
    left = max(0, min(total, batch * most) - batch)
    order = gains.flatten().argsort(descending=True, stable=True)[:left]
    # A gain never exceeds the one before it in its row, and equal ones are taken in order: each
    # row's first ones.
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
    most: int,
) -> tuple[Int64[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The count near the predicted one that minimizes error + price * count, and its error.

    Five passes: half, 0.7, 1, 1.4 and 2 times the predicted number.
    """
    tried = torch.stack(
        [(start * 2 ** (step / 2)).round().long().clamp(1, most) for step in (-2, -1, 0, 1, 2)]
    )
    errors = torch.stack([measure(counts) for counts in tried])
    best = (errors + price * tried).argmin(0, keepdim=True)
    return tried.gather(0, best)[0], errors.gather(0, best)[0]


def search(
    measure: Callable[[Int64[Tensor, " batch"]], Float[Tensor, " batch"]],
    start: Int64[Tensor, " batch"],
    target: float,
    most: int,
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
        start: predicted numbers of codes, 1..most.
        target: error to reach.
        most: codes of an image at most.
        passes: calls of `measure` at most; one more where an image met the target at none of its
            counts.
    """
    low = torch.zeros_like(start)  # most codes known not to do; 0 for none
    high = torch.full_like(start, most + 1)  # fewest codes known to do; most + 1 for none
    error = torch.full(start.shape, float("nan"), dtype=torch.float64, device=start.device)
    count = start.clamp(1, most)
    for _ in range(passes):
        found = measure(count)
        met = found <= target
        error = torch.where(met & (count < high), found.double(), error)
        high = torch.where(met, torch.minimum(high, count), high)
        low = torch.where(met, low, torch.maximum(low, count))
        middle = (low + high) // 2
        wider = torch.where(high > most, (count * 2).clamp(max=most), (count // 2).clamp(min=1))
        bracketed = (low > 0) & (high <= most)
        count = torch.where(bracketed, middle, wider).clamp(1, most)
        count = torch.where(high - low <= 1, high.clamp(max=most), count)
        if bool((high - low <= 1).all()):
            break
    missed = high > most
    if bool(missed.any()):
        counts = high.clamp(max=most)
        error = torch.where(missed, measure(counts).double(), error)
    return high.clamp(max=most), error

"""The number of codes of each image of a batch: a request -> counts, predicted or measured.

    budget   exact number of codes, or a fraction of the batch's patches, distributed by equal
             slope of the predicted errors
    quality  fewest codes that reach a centered cosine, or dB of the patches' colors
    rate     codes are added while each saves more than this; config.price by default

Predictions come from the error heads (error_head.py). Measuring reconstructs, and gives an image
the same count whatever else is in its batch. Nested codes are computed once, and cut to every count
that is measured; selected ones are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.codes import VisualCodes, first_ranks
from lavit_tok.encode.allocation import check_budget
from lavit_tok.encode.efficientnet import patch_colors
from lavit_tok.encode.rate_distortion import (
    Quality,
    Target,
    cheapest_near,
    counts_at_error,
    counts_at_price,
    counts_at_total,
    first_kept,
    search,
)  # fmt: skip
from lavit_tok.encode.selector import keep_scores
from lavit_tok.nn.ranges import require_number

COLOR_ERROR_SCALE = 4.0
"""The heads for colors predict this multiple of the root mean squared error, so that both kinds of
error have similar ranges."""
Counts = Int64[Tensor, " batch"]
Errors = Float[Tensor, " batch"]


@dataclass(frozen=True)
class Request:
    """The arguments of encode that determine the number of codes.

    Raises:
        ValueError: more than one of budget, quality and rate; anything out of range.
    """

    budget: int | float | None = None
    """Codes of every image, or a fraction of the batch's patches."""
    quality: Quality | None = None
    """Centered cosine to reach, or ("psnr", dB)."""
    rate: float | None = None
    """Smallest reduction of the error by a code."""
    verify: bool = False
    """Every image must reach the quality, by measurement."""
    exact: bool = True
    """Quality and rate measure around the prediction."""
    min_codes: int = 1
    """Fewest codes of an image."""
    max_codes: int | None = None
    """Most codes of an image; None for all patches."""

    def __post_init__(self) -> None:
        named = [n for n in ("budget", "quality", "rate") if getattr(self, n) is not None]
        if len(named) > 1:
            raise ValueError(f"expected one of budget, quality and rate, got {' and '.join(named)}")
        if self.budget is not None:
            check_budget(self.budget)
        if self.quality is not None:
            Target.of(self.quality)
        elif self.verify:
            raise ValueError(
                "verify: expected a quality beside it; without one there is nothing to verify"
            )
        if self.rate is not None:
            require_number("rate", self.rate, 0, math.inf)
        if self.min_codes < 1 or (self.max_codes is not None and self.max_codes < self.min_codes):
            raise ValueError(
                f"expected 1 <= min_codes <= max_codes, got {self.min_codes} and {self.max_codes}"
            )

    @property
    def counted(self) -> bool:
        """Whether the budget is an exact number of codes."""
        return isinstance(self.budget, (int, Integral))

    @property
    def limited(self) -> bool:
        """Whether min_codes or max_codes is set."""
        return self.min_codes > 1 or self.max_codes is not None


class RateControl:
    """Finds the number of codes of each image of one batch.

    Args:
        tokenizer: the VisualTokenizer; its stages are called, nothing of it is changed.
        features: of the batch.
        pixels: of the batch, as preprocess gave them; read where colors are measured.
    """

    def __init__(
        self, tokenizer: Any, features: Float[Tensor, "batch patches width"], pixels: Tensor
    ) -> None:
        self.tokenizer, self.features, self.pixels = tokenizer, features, pixels
        self.patches = features.shape[1]
        self.nested: tuple[Tensor, Tensor] | None = None

    def answer(self, request: Request) -> VisualCodes:
        """The codes, with each image's predicted or measured error where there is one."""
        least = min(request.min_codes, self.patches)
        most = min(request.max_codes or self.patches, self.patches)
        if request.quality is not None:
            counts, error = self._for_quality(Target.of(request.quality), request, least, most)
        elif request.counted:
            check_budget(request.budget or 0, self.patches)
            count = min(int(request.budget or 0), self.patches)
            counts = torch.full((len(self.features),), count, device=self.features.device)
            counts, error = counts.clamp(least, most), None
        elif request.rate is None and not self.tokenizer.config.error_hidden:
            # The selector's own counts
            selected = self.tokenizer.select(self.tokenizer.score(self.features), request.budget)
            counts, error = selected.sum(1).clamp(least, most), None
        else:
            counts, error = self._for_price(request, least, most)
        if error is None and self.tokenizer.config.error_hidden:
            error = at(self._predicted("cosine", int(counts.max())), counts)
        return self.codes(counts, error)

    def keep(self, counts: Counts) -> Bool[Tensor, "batch patches"]:
        """The keep mask of these counts: the first ranks, or the patches of the highest scores."""
        if self.tokenizer.nested:
            return first_ranks(counts, self.patches)
        kept = keep_scores(self.tokenizer.score(self.features))
        return first_kept(kept.argsort(dim=1, descending=True, stable=True), counts)

    def _for_price(self, request: Request, least: int, most: int) -> tuple[Counts, Errors | None]:
        errors = self.tokenizer.priced_errors(self.features, self._left(most), self._summary)
        price = self.tokenizer.config.price if request.rate is None else request.rate
        if request.budget is not None:
            total = round(request.budget * len(errors) * self.patches)
            counts = counts_at_total(errors, total)
        else:
            counts = counts_at_price(errors, price)
        counts = counts.clamp(least, most)
        if request.rate is not None and request.exact:
            counts, _ = cheapest_near(self._measure_priced(), counts, price, most)
            counts = counts.clamp(min=least)
        # Of colors, the cosine's error is another prediction
        return counts, at(errors, counts) if self.tokenizer.config.priced == "cosine" else None

    def _for_quality(
        self, target: Target, request: Request, least: int, most: int
    ) -> tuple[Counts, Errors]:
        if self.tokenizer.config.error_hidden or not request.verify:
            errors = self._predicted(target.kind, most)
            start = counts_at_error(errors, target.error).clamp(least, most)
            if not (request.exact or request.verify):
                return start, at(errors, start)
        else:
            start = torch.full(
                (len(self.features),), max(least, most // 4), device=self.features.device
            )
        counts, error = search(self.measure(target), start, target.error, most)
        missed = error > target.error
        if request.verify and bool(missed.any()):
            image = int(missed.nonzero()[0])
            raise ValueError(
                f"quality: image {image} reached {target.reached(float(error[image]))} "
                f"with all {most} codes, expected {target.value}"
            )
        if bool((counts < least).any()):
            counts = counts.clamp(min=least)
            error = self.measure(target)(counts).double()
        return counts, error

    def measure(self, target: Target) -> Callable[[Counts], Errors]:
        """A function from numbers of codes to the error of every image with them."""
        tok = self.tokenizer
        if tok.reconstructor is None:
            raise ValueError(
                "quality and rate measure reconstructions, and this tokenizer has no reconstructor"
            )
        if target.kind == "psnr" and not tok.config.color_cells:
            raise ValueError(
                "this tokenizer reconstructs no colors (config.color_cells is 0): expected a cosine"
            )
        if target.kind == "psnr":
            c, processor = tok.config, tok.image_processor
            mean, std = (
                torch.tensor(x, dtype=torch.float32, device=self.pixels.device).view(3, 1, 1)
                for x in (processor.image_mean, processor.image_std)
            )
            colors = patch_colors(
                self.pixels.float() * std + mean, c.image_size // c.patch_size, c.color_cells
            )
        center = tok.mean_feature if tok.config.error_hidden else 0.0

        def measured(counts: Counts) -> Errors:
            output = tok.reconstruct_patches(self.codes(counts))
            if target.kind == "psnr":
                return (output.colors.float().clamp(0, 1) - colors).square().mean((1, 2)).sqrt()
            x, y = self.features.float() - center, output.features.float() - center
            return 1 - F.cosine_similarity(x, y, dim=-1).mean(1)

        return measured

    def codes(self, counts: Counts, error: Errors | None = None) -> VisualCodes:
        """The codes at these counts, with `error` as their predicted_error."""
        known = self._encoded(int(counts.max()))[0] if self.tokenizer.nested else None
        return self.tokenizer.encode_kept(self.features, self.keep(counts), error, known)

    def _measure_priced(self) -> Callable[[Counts], Errors]:
        if self.tokenizer.config.priced == "cosine":
            return self.measure(Target("cosine", 0.5))
        measured = self.measure(Target("psnr", 20.0))
        return lambda counts: measured(counts).square()

    def _predicted(self, kind: str, most: int) -> Float[Tensor, "batch most"]:
        left = self._left(most)
        return self.tokenizer.predicted_errors(self.features, kind, left, self._summary)

    @cached_property
    def _summary(self) -> Float[Tensor, "batch inputs"] | None:
        heads = self.tokenizer.error_heads if self.tokenizer.config.error_hidden else {}
        return heads["cosine"].summary(self.features) if "cosine" in heads else None

    def _left(self, most: int) -> Float[Tensor, "batch most"] | None:
        return self._encoded(most)[1] if self.tokenizer.nested else None

    def _encoded(self, most: int) -> tuple[Int64[Tensor, "b most"], Float[Tensor, "b most"]]:
        """Nested codes and residual errors, computed again only where more are needed."""
        if self.nested is None or self.nested[0].shape[1] < most:
            self.nested = self.tokenizer.quantizer.encode(self.features, most)
        return self.nested[0][:, :most], self.nested[1][:, :most]


def at(errors: Float[Tensor, "batch most"], counts: Counts) -> Errors:
    """The error of every image with its number of codes."""
    return errors.gather(1, counts[:, None] - 1)[:, 0]

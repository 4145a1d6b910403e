"""Fit a NestedQuantizer and the linear decoder of its codes to features, without gradients.

    features, colors of many images
      -> mean feature; linear map from features to colors          (least squares)
      -> basis of the patches' vectors                             (principal components)
      level by level, on the residual of the levels before:
        -> basis of the areas' vectors                             (principal components)
        stage by stage -> table of entries                         (k-means)

Squared distance between vectors of patches is 1 - cosine of centered features plus `color_weight`
times the mean squared error of colors, as far as the basis keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.decode.nested_reconstructor import NestedReconstructor
from lavit_tok.encode.nested_quantizer import NestedQuantizer
from lavit_tok.encode.quantizer import nearest
from lavit_tok.nn.nested_order import join_areas, split_areas

PART = 256  # images computed at a time


@dataclass(frozen=True)
class NestedCodebookConfig:
    """How the codebook is fitted."""

    images: int = 24_000
    """Training images, at least as many as the codebook has entries: evenly spaced, or the first
    ones of a stream. Their features are held in memory as float16."""
    color_weight: float = 60.0
    """Weight of the mean squared error of colors in 0..1, beside 1 - cosine of the features."""
    samples: int = 100_000
    """Vectors in each k-means."""
    iterations: int = 10
    """Of each k-means."""


def fit_quantizer(
    quantizer: NestedQuantizer,
    reconstructor: NestedReconstructor,
    features: Float[Tensor, "images patches width"],
    colors: Float[Tensor, "images patches out"],
    config: NestedCodebookConfig,
    generator: torch.Generator,
    report: Callable[[str], None] = print,
) -> None:
    """Replace all buffers of the quantizer, and the linear layer of the reconstructor.

    Args:
        quantizer: of a tokenizer.
        reconstructor: of the same tokenizer.
        features: of many images, float16 or float32.
        colors: mean colors of the cells of their patches, 0..1; of width 0 without colors.
        config: numbers of samples and iterations.
        generator: of samples and initial entries.
        report: called with a line of text for every stage: the mean squared distance of a patch's
            vector to the sum of the entries so far.

    Raises:
        ValueError: fewer images or samples than entries.
    """
    vectors = _fit_vectors(quantizer, reconstructor, features, colors, config.color_weight)
    codebook = quantizer.codebook
    size, dim = codebook.embeddings.shape[1:]
    for i, level in enumerate(codebook.levels):
        areas = split_areas(vectors, level.side)
        basis = codebook.basis(i)
        basis.copy_(_principal(_some(areas.flatten(0, 1), 20_000, generator), dim, generator))
        z = torch.cat([part @ basis for part in areas.split(PART)]).flatten(0, 1)
        before = z.clone()
        outside = float(vectors.norm() ** 2 - before.norm() ** 2)  # not in the span of the basis
        for stage in range(level.stages):
            entries = kmeans(
                _some(z, config.samples, generator), size, config.iterations, generator
            )
            codebook.embeddings[codebook.first_stage(i) + stage] = entries
            for part in z.split(PART * level.side**2):
                part -= entries[nearest(part, entries)]
            left = (outside + float(z.norm() ** 2)) / vectors.shape[:2].numel()
            report(f"level {i}, stage {stage}: squared distance {left:.4f}")
        coded = (before - z).view(len(vectors), -1, dim)
        for k in range(0, len(vectors), PART):
            part = join_areas(coded[k : k + PART] @ basis.T, level.side, vectors.shape[1])
            vectors[k : k + PART] -= part


def _fit_vectors(
    quantizer: NestedQuantizer,
    reconstructor: NestedReconstructor,
    features: Tensor,
    colors: Tensor,
    color_weight: float,
) -> Float[Tensor, "images patches patch_dim"]:
    """Fit the maps from features to vectors and back; returns the vectors of all images."""
    width, cells = features.shape[-1], colors.shape[-1]
    few = features[:: max(1, len(features) // 4000)].flatten(0, 1).float()
    target = colors[:: max(1, len(colors) // 4000)].flatten(0, 1).float()
    quantizer.center.copy_(few.mean(0))
    x = few - quantizer.center
    norm = x.norm(dim=-1).mean()
    scale = (color_weight / max(1, cells)) ** 0.5
    gram = (x.T @ x).double()
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(width, device=x.device, dtype=gram.dtype)
    mean_color = target.mean(0)
    read = torch.linalg.solve(gram + ridge, (x.T @ (target - mean_color)).double()).float()
    joined = torch.cat([F.normalize(x, dim=-1) * 0.5**0.5, x @ read * scale], 1)
    _, axes = torch.linalg.eigh((joined.T @ joined).double())  # ascending
    basis = axes.flip(1)[:, : quantizer.direction.out_features].float()
    quantizer.direction.weight.copy_((0.5**0.5 * basis[:width]).T)
    value = scale * read @ basis[width:]
    quantizer.value.weight.copy_(value.T)
    quantizer.value.bias.copy_(-quantizer.center @ value)
    linear = reconstructor.linear
    linear.weight.copy_(torch.cat([2**0.5 * norm * basis[:width], basis[width:] / scale]))
    linear.bias.copy_(torch.cat([quantizer.center, mean_color]))
    return torch.cat([quantizer.project(part.float()) for part in features.split(PART)])


def kmeans(
    samples: Float[Tensor, "n dim"], size: int, iterations: int, generator: torch.Generator
) -> Float[Tensor, "size dim"]:
    """Means of clusters by squared distance; an empty cluster restarts at a random sample.

    Raises:
        ValueError: fewer samples than clusters.
    """
    if len(samples) < size:
        raise ValueError(
            f"k-means of {size} codes needs at least {size} vectors, got {len(samples)}: raise "
            "codebook.samples, use more images, or a smaller codebook_size"
        )
    entries = _some(samples, size, generator).clone()
    for _ in range(iterations):
        found = nearest(samples, entries)
        counts = torch.bincount(found, minlength=size)
        sums = torch.zeros_like(entries).index_add_(0, found, samples)
        empty = counts == 0
        entries = sums / counts.clamp(min=1)[:, None]
        entries[empty] = _some(samples, int(empty.sum()), generator)
    return entries


def _some(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` random items."""
    return x[torch.randperm(len(x), generator=generator)[:count].to(x.device)]


def _principal(
    x: Float[Tensor, "n wide"], dim: int, generator: torch.Generator
) -> Float[Tensor, "wide dim"]:
    """Orthonormal directions of largest mean square, by subspace iteration."""
    start = torch.randn(x.shape[1], dim, generator=generator).to(x.device)
    basis = torch.linalg.qr(start).Q
    for _ in range(8):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    # Sorted, the first coordinate has the largest mean square
    _, turn = torch.linalg.eigh((x @ basis).T @ (x @ basis))
    return basis @ turn.flip(1)

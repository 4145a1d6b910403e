"""Train a tokenizer of nested codes at every budget.

Merger, codebook and reconstructor are trained together:

    most images of a batch   k codes, log-uniform in 1..cut
    the others               k codes, log-uniform in cut..n; n for half of them
    every image              only its first k codes are computed, and some patches reconstructed

    loss = 1 - cosine + centered_weight * (1 - centered cosine)
           + color_weight * mean squared error of colors + commitment

    step 0 ................ start_step .................... max_steps
    not quantized              k-means over the latest vectors, then EMA;
                               z is blended into its codebook entry over blend_steps

At the end, error heads are fitted to the errors of the averaged weights (error_fitting.py).

Small budgets are cheap: a code depends on no later one, and patches are reconstructed one by one,
so that a step costs what its budgets cost. All random numbers come from (seed, step, rank); a
resumed run repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lavit_tok.codes import RaggedLayout
from lavit_tok.config import TokenizerConfig
from lavit_tok.data.image_sources import collate
from lavit_tok.encode.efficientnet import patch_colors
from lavit_tok.encode.error_head import doublings
from lavit_tok.training.codebook import (
    QuantizationConfig,
    usage,
)
from lavit_tok.training.codebook_training import CodebookTraining
from lavit_tok.training.ema import EMATraining
from lavit_tok.training.error_fitting import fit_error_heads
from lavit_tok.training.feature_cache import FeatureCache
from lavit_tok.training.logging import step_generator
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class BudgetConfig:
    """The number of codes of each image of a batch."""

    large_ratio: float = 0.2
    """Fraction of a batch with large budgets."""
    cut: int = 48
    """Number of codes from which a budget is large."""
    large_weight: float = 1.5
    """Weight in the loss of an image with a large budget."""
    patches_per_image: int = 64
    """Patches reconstructed in a step; 0 for all."""

    def __post_init__(self) -> None:
        if not 0 <= self.large_ratio <= 1 or self.cut < 1:
            raise ValueError(
                "expected large_ratio in 0..1 and cut of at least 1, got "
                f"{self.large_ratio} and {self.cut}"
            )


@dataclass(frozen=True)
class NestedLossConfig:
    """Weights of the loss."""

    centered_weight: float = 1.0
    """Weight of a second cosine loss on features minus their running mean."""
    color_weight: float = 30.0
    """Weight of the mean squared error of colors in 0..1; 0 does not train the color head."""
    commitment_weight: float = 0.25
    """Weight of the squared distance of z to its codebook entry."""


class NestedTokenizerTraining(CodebookTraining, EMATraining):
    """Trains a tokenizer of nested codes.

    Args:
        config: sizes of the tokenizer, with sequence "nested"; its `encoder` is replaced by the
            config of `encoder`.
        encoder: "default", directory or Hub id of the frozen encoder; None for random weights
            (tests only).
        image_processor: arguments of VisualImageProcessor besides its size; None for LaVIT's.
        start_from: "default", directory or Hub id of a tokenizer to train on, in place of `config`,
            `encoder` and `image_processor`; quantization then begins at once.
        out: where the trained tokenizer is saved; None keeps checkpoints only.
        budget: the number of codes of each image.
        loss: weights of the loss.
        codebook: quantization.
        optimizer: AdamW.
        schedule: learning-rate schedule.
        ema_decay: decay of the averaged weights, which are exported.
        keep_features: whether the features of every image are kept in memory (FeatureCache).
        error_images: training images whose errors the error heads are fitted to.
        seed: seed of all random numbers of the training.
    """

    def __init__(
        self,
        config: TokenizerConfig | None = None,
        encoder: str | None = None,
        image_processor: dict[str, Any] | None = None,
        start_from: str | None = None,
        out: str | None = None,
        budget: BudgetConfig = BudgetConfig(),
        loss: NestedLossConfig = NestedLossConfig(),
        codebook: QuantizationConfig = QuantizationConfig(
            start_step=700, kmeans_iterations=8, dead_ratio=0.03
        ),
        optimizer: OptimizerConfig = OptimizerConfig(lr=1.5e-3, weight_decay=0.02),
        schedule: ScheduleConfig = ScheduleConfig(),
        ema_decay: float = 0.998,
        keep_features: bool = False,
        error_images: int = 4000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if start_from is not None:
            codebook = replace(codebook, start_step=0, blend_steps=0)
        self.save_arguments("config")
        self.out, self.seed, self.error_images = out, seed, error_images
        self.budget, self.loss, self.quantization = budget, loss, codebook
        self.optimizer_config, self.schedule_config = optimizer, schedule
        if config is None or config.sequence != "nested":
            raise ValueError(
                "config: expected sequence 'nested', got "
                f"{'none' if config is None else repr(config.sequence)}"
            )
        self.build_tokenizer(config, encoder, image_processor, start_from)
        self.register_buffer("quantized", torch.zeros((), dtype=torch.bool))
        self.encode = FeatureCache(self.features) if keep_features else self.features
        self.start_average(ema_decay)

    # Lightning hooks

    @property
    def quantizes(self) -> bool:
        """Whether `start_step` is past and the codebook has been initialized."""
        return bool(self.quantized)

    def vectors_per_step(self) -> float:
        """Codes of a batch, in expectation."""
        b, patches = self.budget, self.tokenizer.config.num_patches
        batch_size = getattr(self.trainer.datamodule, "batch_size", 1)
        cut = min(b.cut, patches)
        small = (cut - 1) / max(1e-6, math.log(cut)) if cut > 1 else 1.0
        large = (small_mean(cut, patches) + patches) / 2
        return batch_size * ((1 - b.large_ratio) * small + b.large_ratio * large)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        if not self.quantizes and self.global_step >= self.quantization.start_step:
            self.start_codebook()
            self.quantized.fill_(True)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        b = self.budget
        generator = step_generator(self.seed, self.global_step, self.global_rank, self.device)
        features, colors = self.encode(batch["images"]), self.colors(batch["images"])
        if self.global_step == 0:
            self._start_at(features, colors)
        self.update_mean_feature(features)
        patches = self.tokenizer.config.num_patches
        counts, large = budgets(len(features), patches, b.cut, b.large_ratio, generator)
        # Images of similar budgets together, since each group is padded to its largest
        level = large.long() + (large | (counts > b.cut // 4)).long()
        groups = [index for i in range(3) if len(index := (level == i).nonzero()[:, 0])]
        merged = [self._merge(features[index], counts[index]) for index in groups]
        vectors, codes, commitment = self.quantize(torch.cat(merged))
        loss = self.loss.commitment_weight * commitment
        totals: dict[str, Tensor] = {}
        for index, part in zip(groups, vectors.split([len(z) for z in merged]), strict=True):
            subset = None
            if 0 < b.patches_per_image < patches:
                order = torch.randperm(patches, generator=generator, device=self.device)
                subset = order[: b.patches_per_image]
            weight = b.large_weight if bool(large[index[0]]) else 1.0
            for name, values in self._errors(
                features[index], colors[index], part, counts[index], subset
            ):
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + values.sum()
                loss = loss + self._weight(name, weight) * values.sum() / len(features)
        self.log_dict(
            {f"train/{name}": value.detach() / len(features) for name, value in totals.items()}
            | {"train/loss": loss.detach()},
            prog_bar=True,
        )
        if codes is not None:
            self.log_usage("train", usage(codes, self.tokenizer.config.codebook_size))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """The curve over budgets, with exact codes (not quantized before start_step)."""
        features, colors = self.encode(batch["images"]), self.colors(batch["images"])
        patches = self.tokenizer.config.num_patches
        z = self.tokenizer.quantizer.project(self.tokenizer.merger(features, patches))
        if self.quantizes:
            self.copy_codebook()
            codebook = self.tokenizer.quantizer.codebook
            z = codebook.lookup(codebook.nearest(z.flatten(0, 1))).view(z.shape)
        for count in doublings(patches):
            lengths = torch.full((len(features),), count, device=self.device)
            errors = dict(self._errors(features, colors, z[:, :count].flatten(0, 1), lengths, None))
            values = {"cosine": 1 - errors["error"].mean()}
            if "colors" in errors:
                values["psnr"] = -10 * errors["colors"].clamp(min=1e-6).log10().mean()
            names = {f"val/{name}_{count}": value for name, value in values.items()}
            self.log_dict(names, batch_size=len(features), sync_dist=True)

    # The steps of a training step

    def colors(self, images: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch patches out"]:
        """Mean colors of the cells of every patch, 0..1; of width 0 without a color head."""
        c = self.tokenizer.config
        cells = c.color_cells or 1
        colors = patch_colors(images.float() / 255, c.image_size // c.patch_size, cells)
        return colors if c.color_cells else colors[..., :0]

    def _merge(
        self, features: Float[Tensor, "batch patches width"], counts: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "total code_dim"]:
        layout = RaggedLayout(counts)
        return layout.unpad(
            self.tokenizer.quantizer.project(self.tokenizer.merger(features, layout.width))
        )

    def _errors(
        self,
        features: Float[Tensor, "batch patches width"],
        colors: Float[Tensor, "batch patches out"],
        vectors: Float[Tensor, "total code_dim"],
        counts: Int64[Tensor, " batch"],
        subset: Int64[Tensor, " subset"] | None,
    ) -> Iterator[tuple[str, Float[Tensor, " batch"]]]:
        """The name and the values of each error; `subset` are the patches to reconstruct."""
        output = self.tokenizer.reconstructor(RaggedLayout(counts).pad(vectors), counts, subset)
        x, c = (features, colors) if subset is None else (features[:, subset], colors[:, subset])
        y, mean = output.features.float(), self.mean_feature
        yield "plain_error", (1 - F.cosine_similarity(y, x, dim=-1)).mean(1)
        error = (1 - F.cosine_similarity(y - mean, x - mean, dim=-1)).mean(1)
        yield "error", error
        if c.shape[-1]:
            yield "colors", (output.colors.float() - c).square().mean((1, 2))

    def _weight(self, name: str, weight: float) -> float:
        w = self.loss
        return weight * {"error": w.centered_weight, "colors": w.color_weight}.get(name, 1.0)

    @torch.no_grad()
    def _start_at(
        self,
        features: Float[Tensor, "batch patches width"],
        colors: Float[Tensor, "batch patches out"],
    ) -> None:
        """Start the merger's first norm so that all features count alike, and at the mean color.

        The directions of an encoder's features may differ in scale by orders of magnitude.
        """
        norm = self.tokenizer.merger.norm_in
        deviation = F.layer_norm(features, features.shape[-1:]).flatten(0, 1).std(0)
        norm.weight.copy_(1 / deviation.clamp(min=0.1))
        if self.tokenizer.reconstructor.colors is not None:
            self.tokenizer.reconstructor.colors.bias.copy_(colors.mean((0, 1)))
        self.start_average(self.ema.decay)
        self.ema.to(self.device)

    def export(self, directory: str | Path) -> None:
        """Save the averaged tokenizer with the trained codebook and fitted error heads."""
        self.copy_codebook()
        with self.averaged():
            if self.tokenizer.config.error_hidden:
                self.tokenizer.mean_feature.copy_(self.mean_feature)
                left = fit_error_heads(self.tokenizer, self._error_batches(), self.seed)
                print(f"error heads, root mean squared difference left: {left}", flush=True)
            super().export(directory)

    def _error_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and colors of error_images training images, evenly spaced."""
        data: Any = self.trainer.datamodule
        images, picked = data.sets["train"], None
        if not isinstance(images, IterableDataset):
            picked = range(0, len(images), max(1, len(images) // self.error_images))
        count = 0
        for batch in DataLoader(images, data.batch_size, sampler=picked, collate_fn=collate):
            if "images" in batch and count < self.error_images:
                pixels = batch["images"].to(self.device)
                yield self.encode(pixels), self.colors(pixels)
                count += len(pixels)


def small_mean(low: int, high: int) -> float:
    """The mean of a log-uniform draw between two numbers."""
    return float(low) if high <= low else (high - low) / math.log(high / low)


def budgets(
    batch: int, patches: int, cut: int, large_ratio: float, generator: torch.Generator
) -> tuple[Int64[Tensor, " batch"], Tensor]:
    """The number of codes of every image of a batch, and which of them are large.

    The first images have small ones; half of the large ones, rounded up, are all patches.
    """
    cut = min(cut, patches)
    large = round(large_ratio * batch)
    draw = torch.rand(batch, generator=generator, device=generator.device)
    small = (math.log(cut + 0.99) * draw).exp().long().clamp(1, cut)
    span = math.log(patches) - math.log(cut)
    counts = (math.log(cut) + span * draw).exp().round().long().clamp(cut, patches)
    index = torch.arange(batch, device=generator.device)
    is_large = index >= batch - large
    counts = torch.where(is_large, counts, small)
    counts[batch - large : batch - large + (large + 1) // 2] = patches
    return counts, is_large

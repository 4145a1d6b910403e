"""Train a tokenizer of nested codes.

    before step 0    the codebook and the linear decoder are fitted to the features of many images,
                     without gradients (nested_codebook.py)
    every step       exact codes, of which each image keeps the first k, k log-uniform in 1..n;
                     the reconstructor learns to reconstruct features and colors from them
    at the end       error heads are fitted to the errors of the averaged weights
                     (error_fitting.py)

    loss = sum of 1 - cosine, 1 - centered cosine and squared error of colors,
           each divided by that of the linear decoder

The linear decoder is trained, too; the divisor is its current error. Without the division, images
with few codes would dominate the loss. All random numbers come from (seed, step, rank), so that a
resumed run repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lavit_tok.config import TokenizerConfig
from lavit_tok.data.image_sources import collate
from lavit_tok.decode.reconstructor import Reconstruction
from lavit_tok.encode.efficientnet import patch_colors
from lavit_tok.encode.error_head import doublings
from lavit_tok.training.codebook import usage
from lavit_tok.training.ema import EMATraining
from lavit_tok.training.error_fitting import fit_error_heads
from lavit_tok.training.feature_cache import FeatureCache
from lavit_tok.training.frozen_encoder_training import FrozenEncoderTraining
from lavit_tok.training.logging import step_generator
from lavit_tok.training.nested_codebook import NestedCodebookConfig, fit_quantizer
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig

LEAST = 1e-3
"""Errors of the linear decoder below this do not raise the weight of an image further."""


class NestedTokenizerTraining(FrozenEncoderTraining, EMATraining):
    """Trains a tokenizer of nested codes.

    Args:
        config: sizes of the tokenizer, with sequence "nested"; its `encoder` is replaced by the
            config of `encoder`.
        encoder: "default", directory or Hub id of the frozen encoder; None for random weights
            (tests only).
        image_processor: arguments of VisualImageProcessor besides its size; None for LaVIT's.
        start_from: "default", directory or Hub id of a tokenizer to train on; its codebook, config,
            encoder and image processor stay.
        out: where the trained tokenizer is saved; None keeps checkpoints only.
        codebook: how the codebook is fitted.
        optimizer: AdamW.
        schedule: learning-rate schedule.
        ema_decay: decay of the averaged weights, which are exported.
        keep_features: whether the features of every image are kept in memory (FeatureCache).
        error_images: training images whose errors the error heads are fitted to.
        error_steps: steps of that fit.
        seed: seed of all random numbers of the training.
    """

    def __init__(
        self,
        config: TokenizerConfig | None = None,
        encoder: str | None = None,
        image_processor: dict[str, Any] | None = None,
        start_from: str | None = None,
        out: str | None = None,
        codebook: NestedCodebookConfig = NestedCodebookConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, weight_decay=0.02),
        schedule: ScheduleConfig = ScheduleConfig(),
        ema_decay: float = 0.998,
        keep_features: bool = False,
        error_images: int = 4000,
        error_steps: int = 1500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_arguments("config")
        self.out, self.seed = out, seed
        self.error_images, self.error_steps = error_images, error_steps
        self.codebook_config = codebook
        self.optimizer_config, self.schedule_config = optimizer, schedule
        if config is None or config.sequence != "nested":
            raise ValueError(
                "config: expected sequence 'nested', got "
                f"{'none' if config is None else repr(config.sequence)}"
            )
        self.build_tokenizer(config, encoder, image_processor, start_from)
        self.tokenizer.quantizer.requires_grad_(False)
        for head in getattr(self.tokenizer, "error_heads", {}).values():
            head.requires_grad_(False)  # fitted at the end
        fitted = torch.tensor(start_from is not None)
        self.register_buffer("fitted", fitted)
        self.encode = FeatureCache(self.features) if keep_features else self.features
        self.start_average(ema_decay)

    # Lightning hooks

    def on_train_start(self) -> None:
        if not bool(self.fitted):
            if self.trainer.is_global_zero:
                self.fit_codebook()
            tokenizer = self.tokenizer
            for module in (tokenizer.quantizer, tokenizer.reconstructor.linear):
                module.load_state_dict(self.trainer.strategy.broadcast(module.state_dict()))
            self.fitted.fill_(True)
            self.start_average(self.ema.decay)
            self.ema.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        generator = step_generator(self.seed, self.global_step, self.global_rank, self.device)
        features, colors = self.encode(batch["images"]), self.colors(batch["images"])
        counts = log_uniform(len(features), features.shape[1], generator)
        codes, _ = self.tokenizer.quantizer.encode(features, int(counts.max()))
        vectors = self.tokenizer.quantizer.codebook.decode(codes, counts)
        reconstructor = self.tokenizer.reconstructor
        with torch.no_grad():
            plain = self._errors(reconstructor.linear_part(vectors), features, colors)
        errors = self._errors(reconstructor(vectors, counts), features, colors)
        parts = {name: (e / plain[name].clamp(min=LEAST)).mean() for name, e in errors.items()}
        loss = torch.stack([*parts.values()]).sum()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": part.detach() for name, part in parts.items()})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """The curve over budgets."""
        features, colors = self.encode(batch["images"]), self.colors(batch["images"])
        patches, batch_size = features.shape[1], len(features)
        codes, _ = self.tokenizer.quantizer.encode(features, patches)
        used = usage(codes.flatten(), self.tokenizer.config.codebook_size)
        values: dict[str, Tensor | float] = {"codebook_usage": used.used}
        for count in doublings(patches):
            lengths = torch.full((batch_size,), count, device=self.device)
            vectors = self.tokenizer.quantizer.codebook.decode(codes[:, :count], lengths)
            found = self.tokenizer.reconstructor(vectors, lengths)
            errors = self._errors(found, features, colors)
            values[f"cosine_{count}"] = 1 - errors["centered"].mean()
            if "colors" in errors:
                values[f"psnr_{count}"] = -10 * errors["colors"].clamp(min=1e-6).log10().mean()
        named = {f"val/{name}": value for name, value in values.items()}
        self.log_dict(named, batch_size=batch_size, sync_dist=True)

    # Parts of a training step

    def colors(self, images: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch patches out"]:
        """Mean colors of the cells of every patch, 0..1; of width 0 without colors."""
        c = self.tokenizer.config
        cells = c.color_cells or 1
        colors = patch_colors(images.float() / 255, c.image_size // c.patch_size, cells)
        return colors if c.color_cells else colors[..., :0]

    def _errors(
        self, found: Reconstruction, features: Tensor, colors: Tensor
    ) -> dict[str, Float[Tensor, " batch"]]:
        x, y, center = features, found.features.float(), self.tokenizer.quantizer.center
        errors = {
            "plain": (1 - F.cosine_similarity(y, x, dim=-1)).mean(1),
            "centered": (1 - F.cosine_similarity(y - center, x - center, dim=-1)).mean(1),
        }
        if colors.shape[-1]:
            errors["colors"] = (found.colors.float() - colors).square().mean((1, 2))
        return errors

    @torch.no_grad()
    def fit_codebook(self) -> None:
        """Fit codebook and linear decoder to the features of training images."""
        held: list[Tensor] = []
        limit, count = self.codebook_config.images, 0
        for parts in self._training_images(limit):
            held = held or [p.new_empty(limit, *p.shape[1:], dtype=torch.float16) for p in parts]
            for images, part in zip(held, parts, strict=True):
                images[count : count + len(part)] = part
            count += len(parts[0])
        features, colors = (images[:count] for images in held)
        fit_quantizer(
            self.tokenizer.quantizer,
            self.tokenizer.reconstructor,
            features,
            colors,
            self.codebook_config,
            torch.Generator().manual_seed(self.seed),
            lambda line: print(line, flush=True),
        )

    def export(self, directory: str | Path) -> None:
        """Save the averaged tokenizer with fitted error heads."""
        with self.averaged():
            if self.tokenizer.config.error_hidden:
                self.tokenizer.mean_feature.copy_(self.tokenizer.quantizer.center)
                batches = self._training_images(self.error_images)
                left = fit_error_heads(self.tokenizer, batches, self.seed, self.error_steps)
                print(f"error heads, root mean squared difference left: {left}", flush=True)
            super().export(directory)

    def _training_images(self, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and colors of `limit` training images: evenly spaced, or the first of a stream.

        Of fewer images, all; unreadable ones are left out.
        """
        data: Any = self.trainer.datamodule
        images, picked = data.sets["train"], None
        if not isinstance(images, IterableDataset):
            total = len(images)
            picked = [i * total // limit for i in range(limit)] if total > limit else range(total)
        left = limit
        for batch in DataLoader(images, data.batch_size, sampler=picked, collate_fn=collate):
            if "images" in batch:
                pixels = batch["images"][:left].to(self.device)
                yield self.encode(pixels), self.colors(pixels)
                left -= len(pixels)
            if not left:
                break


def log_uniform(batch: int, patches: int, generator: torch.Generator) -> Int64[Tensor, " batch"]:
    """A number of codes for every image, log-uniform in 1..patches; all for one in sixteen."""
    draw = torch.rand(batch, generator=generator, device=generator.device)
    return (16 / 15 * math.log(patches + 0.99) * draw).exp().long().clamp(1, patches)

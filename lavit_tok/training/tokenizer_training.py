"""Stage 1: train selector, merger, codebook and reconstructor against a frozen encoder.

LaVIT (ICLR 2024), section 3.1:

    loss = mean_i (1 - cos(x_i, x_rec_i)) + ratio_weight * (rho - mean_i M_i)^2  [+ commitment]

The authors report that training with quantization from the start stalls, so a run has three stages:

    step 0 ......... stop_sampling_step .......... start_step .......................... max_steps
    A  sampled keep decisions   A' deterministic      B  quantized: k-means codebook of batches,
       (straight-through),         decisions (ratio      then EMA; z + r (entry - z), r from 0 to 1
       no quantization             calibrated to rho)    over blend_steps, replaces z

All random numbers come from a generator seeded by (seed, step, rank), and all state is in buffers,
so a resumed run repeats the uninterrupted one exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.codes import RaggedLayout
from lavit_tok.config import TokenizerConfig
from lavit_tok.encode.allocation import dithered, keep_by_budget, straight_through
from lavit_tok.encode.selector import keep_scores
from lavit_tok.training.codebook import (
    RecentValues,
    TrainingCodebook,
    spherical_kmeans,
    usage,
)
from lavit_tok.training.frozen_encoder_training import FrozenEncoderTraining
from lavit_tok.training.logging import log_image, step_generator
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig
from lavit_tok.visualize import kept_overlay, sheet

RANDOM_BUDGETS = 0.08, 0.8  # smallest and largest fraction of a batch's patches


@dataclass(frozen=True)
class FeatureLossConfig:
    """Weights of the loss."""

    ratio_weight: float = 2.0
    """Weight of (rho - mean keep)^2, as published."""
    centered_weight: float = 0.0
    """Weight of a second cosine loss on features minus their running mean; 0 as published."""
    commitment_weight: float = 0.25
    """Weight of the squared distance of z to its codebook entry."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which patches are kept, and how that is learned."""

    rho: float = 1 / 3
    """Target ratio of kept patches."""
    hold_ratio: bool = False
    """Shift each batch's scores so that rho is kept while sampling; False as published."""
    temperature: float = 1.0
    """Temperature of the Gumbel-softmax decision."""
    stop_sampling_step: int = 1000
    """Step from which decisions are deterministic and the keep ratio is calibrated to rho."""
    selector_after: Literal["frozen", "live"] = "frozen"
    """Whether the selector still learns after stop_sampling_step."""
    random_budget_ratio: float = 0.25
    """Ratio of later batches with a random budget, so that any budget works in encoding."""

    def __post_init__(self) -> None:
        if not 0 < self.rho < 1:
            raise ValueError(f"rho: expected a ratio between 0 and 1, got {self.rho}")


@dataclass(frozen=True)
class CodebookConfig:
    """Quantization in training."""

    lr: float = 5e-4
    """Peak learning rate from start_step on; the warm-up is repeated."""
    start_step: int = 1200
    """Step at which the codebook is initialized and quantization begins."""
    kmeans_samples: int = 65536
    """Latest vectors before start_step that k-means clusters."""
    kmeans_iterations: int = 20
    """Iterations of k-means."""
    blend_steps: int = 200
    """Steps over which z is replaced by its codebook entry."""
    decay: float = 0.99
    """EMA decay of the codebook."""
    dead_ratio: float = 0.05
    """Entries used less than this fraction of the mean are replaced."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """How gradients pass the quantization."""


class TokenizerTraining(FrozenEncoderTraining):
    """Trains a tokenizer, for any encoder and any size.

    Args:
        config: sizes of the tokenizer; its `encoder` is replaced by the config of `encoder`.
        encoder: "selected", directory or Hub id of the frozen vision transformer; None for random
            weights (tests only).
        image_processor: arguments of VisualImageProcessor besides its size; None for LaVIT's.
        start_from: "selected", directory or Hub id of a tokenizer to train on, in place of
            `config`, `encoder` and `image_processor`; quantization then begins at once.
        out: where the trained tokenizer is saved; None keeps checkpoints only.
        loss: weights of the loss.
        selection: which patches are kept, and how that is learned.
        codebook: quantization.
        optimizer: AdamW; its learning rate is that before quantization.
        schedule: learning-rate schedule of the time before quantization and of that after it.
        log_images_every: steps between two logged images of kept patches; 0 for none.
        seed: seed of all random numbers of the training.
    """

    mean_feature: Tensor

    def __init__(
        self,
        config: TokenizerConfig | None = None,
        encoder: str | None = None,
        image_processor: dict[str, Any] | None = None,
        start_from: str | None = None,
        out: str | None = None,
        loss: FeatureLossConfig = FeatureLossConfig(),
        selection: SelectionConfig = SelectionConfig(),
        codebook: CodebookConfig = CodebookConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(min_lr_ratio=0.1),
        log_images_every: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if start_from is not None:
            codebook = replace(codebook, start_step=0, blend_steps=0)
            selection = replace(selection, stop_sampling_step=0)
        if not 0 <= selection.stop_sampling_step <= codebook.start_step:
            raise ValueError(
                "stop_sampling_step: expected 0 <= selection.stop_sampling_step <= "
                f"codebook.start_step, got {selection.stop_sampling_step} and {codebook.start_step}"
            )
        self.save_arguments("config")
        self.out, self.seed, self.log_images_every = out, seed, log_images_every
        self.loss, self.selection, self.quantization = loss, selection, codebook
        self.optimizer_config, self.schedule_config = optimizer, schedule
        self.build_tokenizer(config, encoder, image_processor, start_from)
        self.codebook: TrainingCodebook | None = None
        self.register_buffer("mean_feature", torch.zeros(self.tokenizer.config.width))
        self.recent_z = RecentValues(codebook.kmeans_samples, self.tokenizer.config.code_dim)
        self.recent_scores = RecentValues(codebook.kmeans_samples)
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))  # 0: A, 1: A', 2: B
        self.validation_codes: list[Tensor] = []

    # Lightning hooks

    @property
    def trained(self) -> list[Tensor]:
        """All parameters but the encoder's; a selector that is frozen later is among them."""
        named = self.tokenizer.named_parameters()
        return [p for name, p in named if not name.startswith("encoder.")]

    def learning_rate_factor(self, step: int, total: int) -> float:
        """One warm-up and cosine until `start_step`, another one after it."""
        start, schedule = self.quantization.start_step, self.schedule_config
        if step < start:
            return schedule.factor(step, min(start, total))
        factor = schedule.factor(step - start, total - start)
        return factor * self.quantization.lr / self.optimizer_config.lr

    @property
    def quantizes(self) -> bool:
        """Whether `start_step` is past and the codebook has been initialized."""
        return int(self.stage) == 2

    def vectors_per_step(self) -> float:
        """Codes of all processes in a step, in expectation: the codebook counts those."""
        batch_size = getattr(self.trainer.datamodule, "batch_size", 1) * self.num_processes
        return batch_size * self.tokenizer.config.num_patches * self.selection.rho

    def configure_model(self) -> None:
        # Here and not in __init__: whether the codebook synchronizes between processes is decided
        # at its construction, which has to follow the start of the process group.
        if self.codebook is None:
            q = self.quantization
            self.codebook = TrainingCodebook(
                self.tokenizer.quantizer.codebook, q.decay, q.dead_ratio, q.gradient
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        assert self.codebook is not None
        self.codebook.set_vectors_per_step(self.vectors_per_step())

    def not_saved(self) -> str | None:
        """The run ended before the codebook was initialized, or `out` is not set."""
        if self.quantizes:
            return super().not_saved()
        start = self.quantization.start_step
        return (
            f"the run ended at step {self.global_step:,}, before the codebook is initialized; "
            f"raise trainer.max_steps above {start:,} (codebook.start_step)"
        )

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        s, step = self.selection, self.global_step
        if int(self.stage) == 0 and step >= s.stop_sampling_step:
            self.recent_scores.clear()  # those of a selector that still changed
            self.stage.fill_(1)
        if int(self.stage) == 1 and step >= self.quantization.start_step:
            self.start_codebook()
            self.stage.fill_(2)
        self.tokenizer.selector.requires_grad_(self._selector_learns())

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        s = self.selection
        generator = step_generator(self.seed, self.global_step, self.global_rank, self.device)
        features = self.features(batch["images"])
        log_probs = self.tokenizer.score(features)
        if int(self.stage) < 2:
            self.recent_scores.add(keep_scores(log_probs).flatten())
        if self._selector_learns():
            sampled = int(self.stage) == 0
            ratio = s.rho if s.hold_ratio and sampled else None
            dither = self.tokenizer.config.dither and sampled
            raw = dithered(log_probs, -1) if dither else log_probs
            policy = straight_through(raw, generator, sampled, s.temperature, ratio)
            keep = policy.detach() > 0.5
            reconstructed, codes, commitment = self._dense(features, policy, keep)
            ratio_loss = (s.rho - policy.mean()).square()
        else:
            keep = keep_by_budget(
                keep_scores(log_probs) + self._calibrate(), self._draw_budget(generator)
            )
            reconstructed, codes, commitment = self._ragged(features, keep)
            ratio_loss = torch.zeros((), device=self.device)
        self.update_mean_feature(features)
        plain, centered = self.cosines(features, reconstructed)
        w = self.loss
        loss = (1 - plain) + w.centered_weight * (1 - centered) + w.ratio_weight * ratio_loss
        loss = loss + w.commitment_weight * commitment
        metrics = {
            "loss": loss,
            "feature_loss": 1 - plain,
            "cosine": plain,
            "centered_cosine": centered,
            "codes_per_image": keep.float().sum() / len(keep),
            "keep_ratio": keep.float().mean(),
        }
        if codes is not None:
            self._log_usage("train", codes)
            metrics["commitment"] = commitment
        self.log_dict({f"train/{k}": v for k, v in metrics.items()}, prog_bar=True)
        if self.log_images_every and self.global_step % self.log_images_every == 0:
            self._log_kept_patches(batch["images"], keep)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """As in encoding: deterministic keep masks and, from `start_step` on, exact codes."""
        features = self.features(batch["images"])
        keep = self.tokenizer.select(self.tokenizer.score(features))
        reconstructed, codes, _ = self._ragged(features, keep)
        plain, centered = self.cosines(features, reconstructed)
        metrics = {"cosine": plain, "centered_cosine": centered, "keep_ratio": keep.float().mean()}
        self.log_dict(
            {f"val/{k}": v for k, v in metrics.items()}, batch_size=len(keep), sync_dist=True
        )
        if codes is not None:
            self.validation_codes.append(codes)

    def on_validation_epoch_end(self) -> None:
        if self.validation_codes:
            self._log_usage("val", torch.cat(self.validation_codes))
        self.validation_codes.clear()

    # The steps of a training step

    def cosines(
        self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b n d"]
    ) -> tuple[Tensor, Tensor]:
        """Mean cosine over patches, plain and with the running mean feature subtracted from both.

        The plain cosine alone leaves the norm of a reconstructed feature undetermined.
        """
        y, mean = y.float(), self.mean_feature
        plain = F.cosine_similarity(x, y, dim=-1).mean()
        return plain, F.cosine_similarity(x - mean, y - mean, dim=-1).mean()

    @torch.no_grad()
    def update_mean_feature(self, features: Float[Tensor, "batch patches width"]) -> None:
        """The running mean feature, which starts at the mean of the first batch."""
        mean = features.mean((0, 1))
        if self.num_processes > 1:
            mean = self.all_gather(mean).mean(0)
        self.mean_feature.lerp_(mean, 1.0 if self.global_step == 0 else 0.02)

    def quantize(self, z: Float[Tensor, "total c"]) -> tuple[Tensor, Tensor | None, Tensor]:
        """(vectors, codes, commitment loss).

        Before `start_step` the vectors are z, and codes are None; after it, z blended into its
        codebook entry, or the entry itself in eval mode.
        """
        zero = torch.zeros((), device=z.device)
        if not self.quantizes or self.codebook is None:
            if self.training:
                self.recent_z.add(z)
            return z, None, zero
        quantized, codes, commitment = self.codebook(z, seed=self.seed + self.global_step)
        if not self.training:
            return quantized, codes, zero
        q = self.quantization
        ratio = min(1.0, (self.global_step - q.start_step + 1) / max(1, q.blend_steps))
        return z + ratio * (quantized - z), codes, commitment

    def start_codebook(self) -> None:
        """Initialize by k-means over the recent vectors; all ranks take those of rank 0.

        With `start_from`, the codebook is that of the tokenizer.
        """
        assert self.codebook is not None
        if self.start_from is not None:
            entries = self.tokenizer.quantizer.codebook.embeddings
            counts = torch.full((len(entries),), self.vectors_per_step() / len(entries))
            self.codebook.load_embeddings(entries, counts.to(entries.device))
            return
        generator = torch.Generator().manual_seed(self.seed)
        entries, counts = spherical_kmeans(
            self.recent_z.latest(),
            self.tokenizer.config.codebook_size,
            self.quantization.kmeans_iterations,
            generator,
        )
        entries, counts = self.trainer.strategy.broadcast((entries, counts))
        self.codebook.load_embeddings(entries, counts * self.vectors_per_step() / counts.sum())

    def _selector_learns(self) -> bool:
        return int(self.stage) == 0 or self.selection.selector_after == "live"

    def _draw_budget(self, generator: torch.Generator) -> float | None:
        """A random fraction of the batch's patches for some batches, None for the others."""

        def draw() -> Tensor:
            return torch.rand((), generator=generator, device=self.device)

        if draw() >= self.selection.random_budget_ratio:
            return None
        smallest, largest = RANDOM_BUDGETS
        return smallest + (largest - smallest) * float(draw())

    def _dense(
        self,
        features: Float[Tensor, "b n d"],
        policy: Float[Tensor, "b n"],
        keep: Bool[Tensor, "b n"],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(reconstructed, codes, commitment loss); all patches computed, masked by `policy`.

        The selector's gradient passes through the masks of merger and reconstructor.
        """
        z = self.tokenizer.quantizer.project(self.tokenizer.merger.dense(features, policy))
        vectors, codes, commitment = self.quantize(z[keep])
        vectors = z.masked_scatter(keep[..., None], vectors.to(z.dtype))
        # The position each patch has, or would have, in the code sequence
        index = keep.long().cumsum(1) - keep.long()
        return self.tokenizer.reconstructor(vectors, index, policy), codes, commitment

    def _ragged(
        self, features: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(reconstructed, codes, commitment loss); only kept patches computed, as in encode()."""
        z = self.tokenizer.project(self.tokenizer.merge(features, keep))
        vectors, codes, commitment = self.quantize(z)
        layout = RaggedLayout.of(keep)
        return self.tokenizer.reconstructor.ragged(vectors, layout), codes, commitment

    @torch.no_grad()
    def _calibrate(self) -> float:
        """Shift the selector's bias so that the deterministic decision keeps rho of recent patches.

        Sampled decisions keep rho when the scores are near rho's own logit; deterministic ones only
        when a fraction rho of the scores is above 0. Zero after `start_step`, so that codes keep
        their meaning. Returns the shift.
        """
        scores = self.recent_scores.latest()
        if int(self.stage) == 2 or not len(scores):
            return 0.0
        rank = min(len(scores) - 1, math.ceil((1 - self.selection.rho) * len(scores)))
        shift = -float(self.trainer.strategy.broadcast(scores.kthvalue(rank + 1).values))
        self.tokenizer.selector.shift(shift)
        self.recent_scores.values += shift
        return shift

    def _log_usage(self, split: str, codes: Tensor) -> None:
        used = usage(codes, self.tokenizer.config.codebook_size)
        self.log_dict(
            {f"{split}/codebook_usage": used.used, f"{split}/perplexity": used.perplexity}
        )

    def _log_kept_patches(
        self, images: UInt8[Tensor, "batch 3 h w"], keep: Bool[Tensor, "batch n"]
    ) -> None:
        if self.trainer.is_global_zero:
            side = self.tokenizer.config.image_size // self.tokenizer.config.patch_size
            count = min(16, len(images))
            panels = [kept_overlay(images[i], keep[i], (side, side)) for i in range(count)]
            log_image(self, "kept_patches", sheet([panels[:8], panels[8:]]))

    def export(self, directory: str | Path) -> None:
        """Save the tokenizer with the trained codebook, for VisualTokenizer.from_pretrained."""
        assert self.codebook is not None
        self.tokenizer.quantizer.codebook.embeddings.copy_(self.codebook.embeddings)
        super().export(directory)

"""Stage 1: train selector, merger, codebook and reconstructor against a frozen encoder (LaVIT, ICLR 2024, section 3.1).

    loss = mean_i (1 - cos(x_i, x_rec_i)) + ratio_weight * (rho - mean_i M_i)^2  [+ commitment, once there are codes]

The authors report that starting with quantisation stalls; so a run has three stretches:

    step 0 ........ stop_sampling_step ............ quantize_at ............................ max_steps
    A  sampled keep decisions   A' decisions settled    B  quantised: k-means rows over many batches, then EMA;
       (straight-through),         (no sampling, budget     z is blended into its row over blend_steps
       no quantisation             calibrated to rho)

Everything random is drawn from a generator seeded by (seed, step, rank), and all state lives in buffers, so a resumed
run repeats the uninterrupted one exactly.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.codes import RaggedLayout
from lavit_tok.config import TokenizerConfig
from lavit_tok.encode.allocation import dithered, keep_by_budget, straight_through
from lavit_tok.encode.image_processor import VisualImageProcessor
from lavit_tok.encode.selector import keep_scores
from lavit_tok.encode.vision_encoder import VisionEncoder
from lavit_tok.tokenizer import VisualTokenizer
from lavit_tok.training.codebook import TrainingCodebook, Usage, spherical_kmeans, usage
from lavit_tok.training.logging import Recent, log_image, step_generator, warmup_cosine
from lavit_tok.visualize import kept_overlay, sheet


class TokenizerTraining(pl.LightningModule):
    """One training step of stage 1, for any encoder and any size.

    Args:
        config: sizes of the tokenizer; its `encoder` is replaced by the config of `encoder` where that is given.
        encoder: directory or Hub id of the frozen vision transformer; None trains against a random one (tests only).
        image_processor: settings of VisualImageProcessor besides its size; None for those of LaVIT.
        out: where the finished tokenizer is saved; None keeps checkpoints only.
        rho: target share of kept patches.
        ratio_weight: weight of (rho - mean keep)^2.
        hold_ratio: shift the scores of each batch so that rho is kept while decisions are sampled; the loss above then
            has little to do. False as published, where the loss alone holds the ratio.
        centered_weight: weight of a second cosine loss, with the running mean feature subtracted from both sides; 0 as
            published. Plain cosine alone leaves the length of a reconstructed feature free.
        temperature: of the Gumbel-softmax decision.
        lr: peak learning rate before quantisation.
        quantized_lr: peak learning rate after the switch.
        min_lr_ratio: the cosine of each stretch ends at this share of its peak.
        warmup_steps: linear warm-up at the start and again at the switch.
        weight_decay: AdamW's, on matrices only.
        stop_sampling_step: step at which decisions stop being sampled and the keep ratio is calibrated to rho.
        quantize_at: step at which the codebook is initialised and quantisation begins.
        selector_after: whether the selector goes on learning after stop_sampling_step.
        random_budget_ratio: share of the batches after stop_sampling_step that are trained at a random budget, so users may set one.
        kmeans_samples: how many of the latest vectors before the switch k-means sees.
        kmeans_iterations: its iterations.
        blend_steps: steps over which z is replaced by its codebook row.
        commitment_weight: pull of z towards its row.
        decay: EMA decay of the codebook.
        dead_ratio: rows used less than this share of the mean are replaced.
        gradient: how gradients pass the rounding.
        log_images_every: a picture of kept patches every so many steps; 0 for none.
        seed: seed of every random draw here.
    """

    def __init__(
        self,
        config: TokenizerConfig | None = None,
        encoder: str | None = None,
        image_processor: dict[str, Any] | None = None,
        out: str | None = None,
        rho: float = 1 / 3,
        ratio_weight: float = 2.0,
        hold_ratio: bool = False,
        centered_weight: float = 0.0,
        temperature: float = 1.0,
        lr: float = 1e-3,
        quantized_lr: float = 5e-4,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.01,
        stop_sampling_step: int = 1000,
        quantize_at: int = 1200,
        selector_after: Literal["frozen", "live"] = "frozen",
        random_budget_ratio: float = 0.25,
        kmeans_samples: int = 65536,
        kmeans_iterations: int = 20,
        blend_steps: int = 200,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        dead_ratio: float = 0.05,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        log_images_every: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < rho < 1:
            raise ValueError(f"rho: expected a share between 0 and 1, got {rho}")
        if not 0 <= stop_sampling_step <= quantize_at:
            raise ValueError(
                f"stop_sampling_step: expected 0 <= stop_sampling_step <= quantize_at, got {stop_sampling_step} and {quantize_at}"
            )
        self.save_hyperparameters(ignore=["config"])
        self.settings: Any = self.hparams
        config = config or TokenizerConfig()
        vision = None
        if encoder is not None:
            vision = VisionEncoder.from_pretrained(encoder, norm=config.encoder_norm)
            config = TokenizerConfig.from_dict(
                {**config.to_dict(), "encoder": vision.json_config()}
            )
        if not config.reconstructor_depth:
            raise ValueError(
                "reconstructor_depth: expected at least 1: the loss compares reconstructed features"
            )
        processor = VisualImageProcessor(config.image_size, **(image_processor or {}))
        self.tokenizer = VisualTokenizer(config, vision, processor)
        self.codebook: TrainingCodebook | None = None
        self.register_buffer("mean_feature", torch.zeros(config.width))
        self.recent_scores = Recent(kmeans_samples)
        self.recent_z = Recent(kmeans_samples, config.code_dim)
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))  # 0: A, 1: A', 2: B
        self.validation_codes: list[Tensor] = []

    # Lightning's hooks

    def configure_model(self) -> None:
        if self.codebook is None:
            s = self.settings
            self.codebook = TrainingCodebook(
                self.tokenizer.quantizer.codebook, s.decay, s.dead_ratio, s.gradient
            )

    def configure_optimizers(self) -> Any:
        s = self.settings
        trained = [p for n, p in self.tokenizer.named_parameters() if not n.startswith("encoder.")]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": s.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.98))
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            if step < s.quantize_at:
                return warmup_cosine(
                    step, min(s.quantize_at, total), s.warmup_steps, s.min_lr_ratio
                )
            share = warmup_cosine(
                step - s.quantize_at, total - s.quantize_at, s.warmup_steps, s.min_lr_ratio
            )
            return share * s.quantized_lr / s.lr

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The frozen encoder is not saved twice."""
        for name in [n for n in checkpoint["state_dict"] if n.startswith("tokenizer.encoder.")]:
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = {n: v for n, v in self.state_dict().items() if n.startswith("tokenizer.encoder.")}
        checkpoint["state_dict"].update(frozen)

    def on_fit_start(self) -> None:
        assert self.codebook is not None
        self.codebook.set_vectors_per_step(self._rows_per_step())

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        s, step = self.settings, self.global_step
        if int(self.stage) == 0 and step >= s.stop_sampling_step:
            self.recent_scores.seen.zero_()  # scores of a selector that still moved
            self.stage.fill_(1)
        if int(self.stage) == 1 and step >= s.quantize_at:
            self._start_codebook()
            self.stage.fill_(2)
        self.tokenizer.selector.requires_grad_(int(self.stage) == 0 or s.selector_after == "live")

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        s = self.settings
        generator = step_generator(s.seed, self.global_step, self.global_rank, self.device)
        features = self.features(batch["images"])
        log_probs = self.tokenizer.score(features)
        if int(self.stage) < 2:
            self.recent_scores.add(keep_scores(log_probs).flatten())
        learning = int(self.stage) == 0 or s.selector_after == "live"
        if learning:
            sampled = int(self.stage) == 0
            share = s.rho if s.hold_ratio and sampled else None
            raw = dithered(log_probs, -1) if self.tokenizer.config.dither and sampled else log_probs
            policy = straight_through(raw, generator, sampled, s.temperature, share)
            keep = policy.detach() > 0.5
            reconstructed, codes, commitment = self._dense(features, policy, keep)
            ratio_loss = (s.rho - policy.mean()).square()
        else:
            budget = None
            if torch.rand((), generator=generator, device=self.device) < s.random_budget_ratio:
                budget = 0.08 + 0.72 * float(
                    torch.rand((), generator=generator, device=self.device)
                )
            keep = keep_by_budget(keep_scores(log_probs) + self._calibrate(), budget)
            reconstructed, codes, commitment = self._ragged(features, keep)
            ratio_loss = torch.zeros((), device=self.device)
        with torch.no_grad():
            mean = features.mean((0, 1))
            self.mean_feature.lerp_(mean, 1.0 if self.global_step == 0 else 0.02)
        plain, centred = self.cosines(features, reconstructed)
        loss = (1 - plain) + s.centered_weight * (1 - centred) + s.ratio_weight * ratio_loss
        loss = loss + s.commitment_weight * commitment
        values = {
            "loss": loss,
            "feature_loss": 1 - plain,
            "centered_cosine": centred,
            "keep_ratio": keep.float().mean(),
        }
        if codes is not None:
            self._log_usage("train", usage(codes, self.tokenizer.config.codebook_size))
            values["commitment"] = commitment
        self.log_dict({f"train/{k}": v for k, v in values.items()}, prog_bar=True)
        if s.log_images_every and self.global_step % s.log_images_every == 0:
            self._picture(batch["images"], keep)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """What a user gets: deterministic keep masks, exact codes (the unquantised vectors before quantize_at)."""
        tok = self.tokenizer
        features = self.features(batch["images"])
        keep = tok.select(tok.score(features))
        reconstructed, codes, _ = self._ragged(features, keep)
        plain, centred = self.cosines(features, reconstructed)
        values = {"cosine": plain, "centered_cosine": centred, "keep_ratio": keep.float().mean()}
        self.log_dict(
            {f"val/{k}": v for k, v in values.items()}, batch_size=len(keep), sync_dist=True
        )
        if codes is not None:
            self.validation_codes.append(codes)

    def on_validation_epoch_end(self) -> None:
        if self.validation_codes:
            self._log_usage(
                "val", usage(torch.cat(self.validation_codes), self.tokenizer.config.codebook_size)
            )
        self.validation_codes.clear()

    def on_fit_end(self) -> None:
        if self.settings.out and self.trainer.is_global_zero and int(self.stage) == 2:
            self.export(self.settings.out)

    # The parts

    def features(
        self, images: UInt8[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch patches width"]:
        pixels = self.tokenizer.image_processor.normalize(images)
        return self.tokenizer.features(pixels.to(self.tokenizer.dtype)).float()

    def cosines(
        self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b n d"]
    ) -> tuple[Tensor, Tensor]:
        """Mean cosine over patches, plain and with the running mean feature subtracted from both."""
        y, mean = y.float(), self.mean_feature
        return F.cosine_similarity(x, y, dim=-1).mean(), F.cosine_similarity(
            x - mean, y - mean, dim=-1
        ).mean()

    def _dense(
        self,
        features: Float[Tensor, "b n d"],
        policy: Float[Tensor, "b n"],
        keep: Bool[Tensor, "b n"],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Every row computed, masks as a policy: the selector's gradient flows through merger and reconstructor."""
        z = self.tokenizer.quantizer.project(self.tokenizer.merger.dense(features, policy))
        vectors, codes, commitment = self._quantize(z[keep])
        vectors = z.masked_scatter(keep[..., None], vectors.to(z.dtype))
        index = (
            keep.long().cumsum(1) - keep.long()
        )  # the place each row has, or would have, in the code sequence
        return self.tokenizer.reconstructor(vectors, index, policy), codes, commitment

    def _ragged(
        self, features: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The way of encode(): only kept rows are computed."""
        layout = RaggedLayout.of(keep)
        vectors, codes, commitment = self._quantize(
            self.tokenizer.project(self.tokenizer.merge(features, keep))
        )
        return self.tokenizer.reconstructor.ragged(vectors, layout), codes, commitment

    def _quantize(self, z: Float[Tensor, "total c"]) -> tuple[Tensor, Tensor | None, Tensor]:
        """z as it is before the switch; after it, blended towards its row."""
        zero = torch.zeros((), device=z.device)
        if int(self.stage) < 2 or self.codebook is None:
            if self.training:
                self.recent_z.add(z)
            return z, None, zero
        quantized, codes, commitment = self.codebook(z, seed=self.settings.seed + self.global_step)
        if not self.training:
            return quantized, codes, zero
        share = min(
            1.0,
            (self.global_step - self.settings.quantize_at + 1) / max(1, self.settings.blend_steps),
        )
        return z + share * (quantized - z), codes, commitment

    @torch.no_grad()
    def _calibrate(self) -> float:
        """Shift the selector so that the deterministic rule keeps rho of the recent patches; returns by how much.

        Under Gumbel noise a share rho is kept when scores lie anywhere near rho's own; without it, only when a share
        rho of them lies above 0. Nothing after quantize_at, so that codes then mean the same until the end.
        """
        scores = self.recent_scores.latest()
        if int(self.stage) == 2 or not len(scores):
            return 0.0
        rank = min(len(scores) - 1, math.ceil((1 - self.settings.rho) * len(scores)))
        amount = -float(self.trainer.strategy.broadcast(scores.kthvalue(rank + 1).values))
        self.tokenizer.selector.shift(amount)
        self.recent_scores.rows += amount
        return amount

    def _start_codebook(self) -> None:
        """k-means over the recent vectors; every rank takes the first one's rows."""
        assert self.codebook is not None
        generator = torch.Generator().manual_seed(self.settings.seed)
        size = self.tokenizer.config.codebook_size
        rows, counts = spherical_kmeans(
            self.recent_z.latest(), size, self.settings.kmeans_iterations, generator
        )
        rows, counts = self.trainer.strategy.broadcast((rows, counts))
        self.codebook.load_embeddings(rows, counts * self._rows_per_step() / counts.sum())

    def _rows_per_step(self) -> float:
        batch_size = getattr(self.trainer.datamodule, "batch_size", 1)
        return batch_size * self.tokenizer.config.num_patches * self.settings.rho

    def export(self, directory: str | Path) -> None:
        """The trained tokenizer, with the learned rows, as VisualTokenizer.from_pretrained reads it."""
        assert self.codebook is not None
        self.tokenizer.quantizer.codebook.embeddings.copy_(self.codebook.embeddings)
        self.tokenizer.save_pretrained(directory)

    def _log_usage(self, part: str, used: Usage) -> None:
        self.log_dict({f"{part}/codebook_usage": used.used, f"{part}/perplexity": used.perplexity})

    def _picture(self, images: UInt8[Tensor, "batch 3 h w"], keep: Bool[Tensor, "batch n"]) -> None:
        if self.trainer.is_global_zero:
            side = self.tokenizer.config.image_size // self.tokenizer.config.patch_size
            shown = [
                kept_overlay(images[i], keep[i], (side, side)) for i in range(min(16, len(images)))
            ]
            log_image(self, "kept_patches", sheet([shown[:8], shown[8:]]))

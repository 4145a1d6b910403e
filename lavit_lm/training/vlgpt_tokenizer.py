"""VL-GPT's stage 1: tokenizer and detokenizer learn the conditions of a diffusion model.

    image, caption -+- tokenizer, detokenizer -> z_v, z_t
                    +- the diffusion model's frozen encoders -> e_v, e_t

    loss = l1 |z_v - e_v|^2 + l2 |z_t - e_t|^2    (both are means over a condition's elements)

The diffusion model itself is not run. Frozen weights have no gradient, no optimizer state, and are
not saved in checkpoints.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from lavit_lm.objectives.vlgpt.diffusion import ConditionEmbeddings, load_diffusion
from lavit_lm.objectives.vlgpt.tokenizer import VLGPTTokenizer, VLGPTTokenizerConfig
from lavit_lm.objectives.vlgpt.tokenizer_files import check_out, save_tokenizer
from lavit_tok import VisualTokenizer
from lavit_tok.training.base import TrainingModule
from lavit_tok.training.frozen import Frozen
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class TransformerConfig:
    """Tokenizer and detokenizer."""

    queries: int = 32
    """Vectors per image, N in the paper."""
    depth: int = 12
    """Blocks of each transformer."""
    heads: int = 12
    """Attention heads of each transformer."""
    hidden_size: int | None = None
    """Width of both transformers; None for that of the encoder."""
    pooled_queries: bool = False
    """Each query of the tokenizer also has the mean feature of a square of patches."""


@dataclass(frozen=True)
class ConditionLossConfig:
    """Weights of the loss; 1 as published."""

    image_weight: float = 1.0
    """l1; at 0 the image condition is not learned, and is not used for decoding."""
    text_weight: float = 1.0
    """l2; at 0 the text condition is not learned, and is not used for decoding."""


class VLGPTTokenizerTraining(TrainingModule):
    """Trains VL-GPT's tokenizer and detokenizer.

    Args:
        width: width of the vectors; that of the language model.
        visual_tokenizer: "selected", directory or Hub id: whose frozen encoder makes the features.
        conditions: of the diffusion model, see load_diffusion: {"kind": "pixel_decoder",
            "decoder": "selected"}, or {"kind": "stable_diffusion", "model": ..., "adapter": ...}.
        transformer: tokenizer and detokenizer.
        loss: weights of the loss.
        optimizer: AdamW; 2e-4 as published.
        schedule: learning-rate schedule.
        out: where tokenizer and detokenizer are saved; None keeps checkpoints only.
        seed: seed of the initial weights.

    Raises:
        ValueError: weights of the loss below 0, or all 0.
    """

    def __init__(
        self,
        width: int,
        visual_tokenizer: str = "selected",
        conditions: dict[str, Any] | None = None,
        transformer: TransformerConfig = TransformerConfig(),
        loss: ConditionLossConfig = ConditionLossConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, weight_decay=0.05),
        schedule: ScheduleConfig = ScheduleConfig(),
        out: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if out is not None:
            check_out(out)  # fail now, not after the training
        self.save_arguments()
        self.out, self.visual_tokenizer = out, visual_tokenizer
        self.optimizer_config, self.schedule_config = optimizer, schedule
        visual = VisualTokenizer.from_pretrained(visual_tokenizer).requires_grad_(False)
        self.resize_mode = visual.image_processor.resize_mode
        conditions = conditions or {"kind": "pixel_decoder", "decoder": "selected"}
        self.frozen_conditions: Frozen[Any] = Frozen(load_diffusion(conditions, visual))
        shapes = self.conditions.image_shape, self.conditions.text_shape
        weights = loss.image_weight, loss.text_weight
        self.weights = {
            name: weight
            for name, weight, shape in zip(("image", "text"), weights, shapes, strict=True)
            if shape is not None
        }
        if min(weights) < 0 or not sum(self.weights.values()):
            raise ValueError(
                "image_weight, text_weight: expected 0 or more, and more than 0 for a condition "
                f"that the diffusion model has ({', '.join(self.weights)}), got {weights}"
            )
        sizes = asdict(transformer)
        sizes["hidden_size"] = sizes["hidden_size"] or visual.config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = VLGPTTokenizerConfig(width, **sizes)
            self.model = VLGPTTokenizer(visual, config, *shapes)
        for name in self.weights.keys() - set(self.learned):
            self.model.detokenizer.queries[name].requires_grad_(False)
            self.model.detokenizer.heads[name].requires_grad_(False)

    @property
    def conditions(self) -> Any:
        """The frozen encoders of the diffusion model's conditions."""
        return self.frozen_conditions.module

    @property
    def learned(self) -> list[str]:
        """Names of the conditions that the loss has a term for."""
        return [name for name, weight in self.weights.items() if weight > 0]

    # The loss

    def targets(
        self, images: UInt8[Tensor, "b 3 h w"], captions: list[str] | None
    ) -> ConditionEmbeddings:
        """e_v and e_t, as far as they are learned. Raises ValueError if captions are missing."""
        if self.weights.get("text") and captions is None:
            raise ValueError(
                "the text condition is computed from captions, and the data have none: set "
                "data.caption_column"
            )
        # Without autocast, as in the diffusion model
        with torch.autocast(self.device.type, enabled=False):
            image = self.conditions.encode_images(images) if self.weights.get("image") else None
            text = self.conditions.encode_texts(captions) if self.weights.get("text") else None
        return ConditionEmbeddings(image, text)

    def losses(
        self, estimated: ConditionEmbeddings, targets: ConditionEmbeddings
    ) -> dict[str, Float[Tensor, ""]]:
        """Mean squared errors of the learned conditions, "image" and "text"."""
        pairs = {name: (getattr(estimated, name), getattr(targets, name)) for name in self.weights}
        return {name: F.mse_loss(z.float(), e) for name, (z, e) in pairs.items() if e is not None}

    def total(self, losses: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The weighted sum."""
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()

    # Lightning hooks

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        targets = self.targets(batch["images"], batch.get("captions"))
        losses = self.losses(self.model(batch["images"]), targets)
        loss = self.total(losses)
        self.require_finite(loss)
        metrics = {"train/loss": loss, **{f"train/{name}": x for name, x in losses.items()}}
        self.log_dict(metrics, prog_bar=True, batch_size=len(batch["images"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same losses, and the mean cosine between estimated and target tokens."""
        targets = self.targets(batch["images"], batch.get("captions"))
        estimated = self.model(batch["images"])
        losses = self.losses(estimated, targets)
        metrics = {"val/loss": self.total(losses), **{f"val/{n}": x for n, x in losses.items()}}
        for name in losses:
            pair = getattr(estimated, name).float(), getattr(targets, name)
            metrics[f"val/{name}_cosine"] = F.cosine_similarity(*pair, dim=-1).mean()
        self.log_dict(metrics, prog_bar=True, batch_size=len(batch["images"]), sync_dist=True)

    def on_fit_start(self) -> None:
        """Raises ValueError if the data module resizes otherwise than the visual tokenizer."""
        self.frozen_conditions.to(self.device)
        augment = getattr(getattr(self.trainer, "datamodule", None), "augment", None)
        mode = self.resize_mode if augment is None else augment.image_processor.resize_mode
        if mode != self.resize_mode:
            raise ValueError(
                f"data.resize_mode: expected {self.resize_mode}, as the visual tokenizer has, got "
                f"{mode}: images would have other proportions in training than in use"
            )

    on_validation_start = on_fit_start

    def export(self, directory: str | Path) -> None:
        """Save tokenizer and detokenizer."""
        conditions = self.conditions.config
        save_tokenizer(directory, self.model, self.visual_tokenizer, conditions, self.learned)

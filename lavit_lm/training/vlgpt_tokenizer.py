"""VL-GPT's stage 1: the tokenizer and the detokenizer learn a diffusion model's conditions, which never runs.

    picture, caption -+- tokenizer, detokenizer -> z_v, z_t
                      +- the diffusion model's frozen encoders -> e_v, e_t

    loss = l1 |z_v - e_v|2 + l2 |z_t - e_t|2        both squared errors are means over all numbers of a condition

Frozen parts have no gradient, no optimizer state, and are in no checkpoint.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from lavit_lm.objectives.vlgpt.diffusion import ConditionEmbeddings, load_diffusion
from lavit_lm.objectives.vlgpt.tokenizer import VLGPTTokenizer, VLGPTTokenizerConfig
from lavit_lm.objectives.vlgpt.tokenizer_files import check_out, save_tokenizer
from lavit_tok import VisualTokenizer


class VLGPTTokenizerTraining(pl.LightningModule):
    """Trains VL-GPT's tokenizer and detokenizer.

    Args:
        width: of the vectors; the language model's that is to read them.
        visual_tokenizer: "default", directory or Hub id: whose frozen encoder makes the features.
        conditions: of the diffusion model, see lavit_lm.objectives.vlgpt.diffusion.load_diffusion: {"kind": "pixel_decoder",
            "decoder": "default"}, or {"kind": "stable_diffusion", "model": ..., "adapter": ...}.
        queries: N, vectors a picture.
        depth, heads: of both transformers.
        hidden_size: their width; the encoder's by default.
        image_weight, text_weight: l1 and l2, 1 as published; at 0 a condition is not learnt, nor drawn from.
        out: directory of what comes out; None keeps checkpoints only.
        lr: peak learning rate, 2e-4 as published.
        warmup_steps: linear warm-up, before a cosine to 0.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        seed: draws the weights.

    Raises:
        ValueError: weights of the losses below 0, or that leave nothing to learn.
    """

    def __init__(
        self,
        width: int,
        visual_tokenizer: str = "default",
        conditions: dict[str, Any] | None = None,
        queries: int = 32,
        depth: int = 12,
        heads: int = 12,
        hidden_size: int | None = None,
        image_weight: float = 1.0,
        text_weight: float = 1.0,
        out: str | None = None,
        lr: float = 2e-4,
        warmup_steps: int = 100,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if out is not None:
            check_out(out)  # now, not when the training is done
        self.save_hyperparameters()
        self.settings: Any = self.hparams
        visual = VisualTokenizer.from_pretrained(visual_tokenizer).requires_grad_(False)
        self.resize_mode = visual.image_processor.resize_mode
        # In a list: frozen, neither saved nor moved by Lightning.
        self._conditions = [
            load_diffusion(conditions or {"kind": "pixel_decoder", "decoder": "default"}, visual)
        ]
        shapes = self.conditions.image_shape, self.conditions.text_shape
        self.weights = {
            name: weight
            for name, weight, shape in zip(
                ("image", "text"), (image_weight, text_weight), shapes, strict=True
            )
            if shape is not None
        }
        if min(image_weight, text_weight) < 0 or not sum(self.weights.values()):
            raise ValueError(
                f"image_weight, text_weight: expected 0 or more, and more than 0 for a condition that the diffusion "
                f"model has ({', '.join(self.weights)}), got {image_weight}, {text_weight}"
            )
        shape = VLGPTTokenizerConfig(
            width,
            queries,
            depth,
            heads,
            visual.config.width if hidden_size is None else hidden_size,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = VLGPTTokenizer(visual, shape, *shapes)
        for name in self.weights.keys() - set(self.learnt):
            self.model.detokenizer.queries[name].requires_grad_(False)
            self.model.detokenizer.heads[name].requires_grad_(False)

    @property
    def conditions(self) -> Any:
        """Of the diffusion model; frozen."""
        return self._conditions[0]

    @property
    def learnt(self) -> list[str]:
        """Names of the conditions that the loss has a term for."""
        return [name for name, weight in self.weights.items() if weight > 0]

    # The loss

    def targets(
        self, images: UInt8[Tensor, "b 3 h w"], captions: list[str] | None
    ) -> ConditionEmbeddings:
        """e_v and e_t, as far as they are to be learnt. Raises ValueError for missing captions."""
        if self.weights.get("text") and captions is None:
            raise ValueError(
                "the text condition is made of captions, and the data have none: give data.caption_column"
            )
        with torch.autocast(
            self.device.type, enabled=False
        ):  # as the diffusion model's own encoders made them
            image = self.conditions.encode_images(images) if self.weights.get("image") else None
            text = self.conditions.encode_texts(captions) if self.weights.get("text") else None
        return ConditionEmbeddings(image, text)

    def losses(
        self, estimated: ConditionEmbeddings, targets: ConditionEmbeddings
    ) -> dict[str, Float[Tensor, ""]]:
        """Mean squared errors, "image" and "text", of what is learnt."""
        pairs = {name: (getattr(estimated, name), getattr(targets, name)) for name in self.weights}
        return {name: F.mse_loss(z.float(), e) for name, (z, e) in pairs.items() if e is not None}

    def total(self, losses: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """l1 and l2 times theirs."""
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()

    # Lightning's hooks

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        targets = self.targets(batch["images"], batch.get("captions"))
        losses = self.losses(self.model(batch["images"]), targets)
        loss = self.total(losses)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"step {self.global_step}: the loss is {float(loss)}; stopped before it spoils all"
            )
        shown = {"train/loss": loss, **{f"train/{name}": value for name, value in losses.items()}}
        self.log_dict(shown, prog_bar=True, batch_size=len(batch["images"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same losses, and the mean cosine of a token's estimate with what it is to be."""
        targets = self.targets(batch["images"], batch.get("captions"))
        estimated = self.model(batch["images"])
        losses = self.losses(estimated, targets)
        shown = {
            "val/loss": self.total(losses),
            **{f"val/{name}": value for name, value in losses.items()},
        }
        for name in losses:
            cosine = F.cosine_similarity(
                getattr(estimated, name).float(), getattr(targets, name), dim=-1
            ).mean()
            shown[f"val/{name}_cosine"] = cosine
        self.log_dict(shown, prog_bar=True, batch_size=len(batch["images"]), sync_dist=True)

    def on_fit_start(self) -> None:
        """Raises ValueError for pictures that the data module cuts in another way than the visual tokenizer."""
        self.conditions.to(self.device)
        augment = getattr(getattr(self.trainer, "datamodule", None), "augment", None)
        mode = self.resize_mode if augment is None else augment.image_processor.resize_mode
        if mode != self.resize_mode:
            raise ValueError(
                f"data.resize_mode: expected the visual tokenizer's {self.resize_mode}, got {mode}: it would learn from pictures of "
                "other proportions than those it is to read"
            )

    on_validation_start = on_fit_start

    def configure_optimizers(self) -> Any:
        s = self.settings
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": s.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=tuple(s.betas))
        total = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, s.warmup_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_end(self) -> None:
        if self.settings.out is not None and self.trainer.is_global_zero:
            s = self.settings
            save_tokenizer(
                s.out, self.model, s.visual_tokenizer, self.conditions.config, self.learnt
            )

"""Train the small teacher: the frozen vision encoder of the default tokenizer's patch features.

    pixels [b 3 64 64] -> CLIPVisionModel -> hidden states of the last block, without CLS [b 64 192]

Two heads are trained on these features. The caption head maps the mean patch to the caption's
sentence embedding, with a contrastive loss over the batch. The pixel head predicts the low-pass
pixels of each patch. Half of the training images have masked patches, so a patch must be inferred
from its neighbors; features that predict each other can be tokenized with few codes.

Both heads get the features after one normalization and, in training, with noise. Without it a head
can use directions of any scale, but features are later compared by their cosine, in which only
directions of large variance count. With noise, the variance of a direction grows with its use:
small for a caption, which is averaged over all patches, large for the color of a patch. The
published LaVIT uses EVA-CLIP's frozen encoder instead.

    python recipes/selected/teacher.py fit -c recipes/selected/teacher.yaml
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from command import RecipeCLI, warmup_cosine
from jaxtyping import Bool, Float, UInt8
from pytorch_lightning import LightningModule
from safetensors.torch import save_file
from sentences import embed_cached
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from lavit_tok.encode.image_processor import VisualImageProcessor
from lavit_tok.training.data_module import ImageDataModule

RETRIEVAL = 500  # validation images of the retrieval metrics


class Teacher(LightningModule):
    """A CLIP vision model with a caption head and a low-pass pixel head.

    Args:
        out: folder of config.json, model.safetensors, caption_projection.safetensors and
            numbers.json.
        image_size: side of the square input, in pixels.
        patch_size: side of a patch, in pixels.
        hidden_size: width of the features.
        layers: transformer blocks.
        heads: attention heads of a block.
        intermediate_size: width of a block's MLP.
        learning_rate: peak of the warmup and cosine schedule.
        weight_decay: AdamW's, for matrices only.
        warmup_steps: steps of linear warmup.
        pixel_weight: weight of the pixel loss (smooth L1, in normalized units); that of the caption
            loss (in nats) is 1.
        detail_weight: weight of the differences of the 2x2 colors from their patch's mean.
        feature_noise: standard deviation of the noise added to normalized features in training.
        target_temperature: temperature of the soft targets, which are text-text similarities.
        mask_probability: probability that a training image has masked patches.
        mask_ratio: smallest and largest ratio of masked patches in such an image.
        seed: seed of the masks and the noise at each step.
    """

    def __init__(
        self,
        out: str = "runs/selected/teacher",
        image_size: int = 64,
        patch_size: int = 8,
        hidden_size: int = 192,
        layers: int = 6,
        heads: int = 3,
        intermediate_size: int = 768,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 200,
        pixel_weight: float = 6.0,
        detail_weight: float = 0.5,
        feature_noise: float = 0.7,
        target_temperature: float = 0.05,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.3, 0.6),
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        config = CLIPVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate_size,
            hidden_act="gelu",
        )
        self.image_processor = VisualImageProcessor(image_size)
        self.vision = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.caption_projection = nn.Linear(hidden_size, 384)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # log(1 / 0.07), as CLIP starts
        self.pixel_head = nn.Linear(hidden_size, 2 * 2 * 3)
        self.grid = image_size // patch_size
        self.text: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        sets = self.trainer.datamodule.sets.values()
        sentences = sorted({caption for images in sets for caption in images.captions})
        embeddings = embed_cached(sentences, Path(self.hparams.out))
        self.text = dict(zip(sentences, embeddings, strict=True))

    def features(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch patch dim"]:
        """Hidden states of the last block, before any final norm, without CLS."""
        return self.vision(pixel_values=pixels).last_hidden_state[:, 1:]

    def describe(self, normed: Float[Tensor, "batch patch dim"]) -> Float[Tensor, "batch 384"]:
        """Unit vectors in the space of the sentence embeddings, from normalized features."""
        return F.normalize(self.caption_projection(normed.mean(1)).float(), dim=1)

    def draw_mask(self, batch: int, generator: torch.Generator) -> Bool[Tensor, "batch patch"]:
        """A random mask; True is a masked patch."""
        low, high = self.hparams.mask_ratio
        ratio = low + (high - low) * torch.rand(batch, 1, generator=generator)
        ratio = ratio * (torch.rand(batch, 1, generator=generator) < self.hparams.mask_probability)
        return torch.rand(batch, self.grid**2, generator=generator) < ratio

    def low_pass(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch patch 12"]:
        """2x2 average colors of each patch [channel, y, x]; differences from the mean weighted."""
        pooled = F.adaptive_avg_pool2d(pixels, 2 * self.grid)
        colors = F.unfold(pooled, 2, stride=2).transpose(1, 2)
        mean = colors.unflatten(2, (3, 4)).mean(3).repeat_interleave(4, 2)
        return mean + self.hparams.detail_weight * (colors - mean)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        pixels = self.image_processor.normalize(batch["images"])
        generator = torch.Generator().manual_seed(self.hparams.seed * 1_000_003 + self.global_step)
        masked = self.draw_mask(len(pixels), generator).to(self.device)
        visible = ~masked.view(-1, 1, self.grid, self.grid)
        for axis in (2, 3):
            visible = visible.repeat_interleave(self.hparams.patch_size, axis)
        normed = self.norm(self.features(pixels * visible))
        noise = torch.randn(normed.shape, generator=generator).to(normed)
        normed = normed + self.hparams.feature_noise * noise
        pixel_loss = F.smooth_l1_loss(
            self.pixel_head(normed).float(), self.low_pass(pixels), beta=0.5
        )
        caption_loss = self.contrast(self.describe(normed), self.lookup(batch["captions"]))
        self.log_dict({"train/caption": caption_loss, "train/pixel": pixel_loss}, prog_bar=True)
        return caption_loss + self.hparams.pixel_weight * pixel_loss

    def contrast(self, image: Float[Tensor, "batch d"], text: Float[Tensor, "batch d"]) -> Tensor:
        """CLIP's loss in both directions, as the KL divergence to text-text similarities.

        The target is spread over captions of equal meaning.
        """
        logits = self.logit_scale.clamp(max=4.6).exp() * image @ text.T
        target = (text @ text.T / self.hparams.target_temperature).softmax(1)
        by_image = F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
        by_text = F.kl_div(logits.T.log_softmax(1), target, reduction="batchmean")
        return 0.5 * (by_image + by_text)

    def lookup(self, captions: list[str]) -> Float[Tensor, "batch 384"]:
        return torch.stack([self.text[caption] for caption in captions]).to(self.device)

    def on_validation_epoch_start(self) -> None:
        self.outputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        pixels = self.image_processor.normalize(batch["images"])
        normed = self.norm(self.features(pixels))
        predicted, target = self.pixel_head(normed).float(), self.low_pass(pixels)
        # The squares of CLIP_STD: errors in units of pixels in 0..1
        scale = torch.tensor((0.0722, 0.0683, 0.0760), device=self.device).repeat_interleave(4)
        error = ((predicted - target).square() * scale).mean()
        self.log("val/pixel", F.smooth_l1_loss(predicted, target, beta=0.5), batch_size=len(pixels))
        self.outputs.append(
            (self.describe(normed), self.lookup(batch["captions"]), error.expand(len(pixels)))
        )

    def on_validation_epoch_end(self) -> None:
        image, text, error = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
        image, text = image[:RETRIEVAL], text[:RETRIEVAL]
        order = (image @ text.T).topk(min(5, len(text)), dim=1).indices
        same = text @ text.T > 0.999  # an equal caption of another image is not an error
        hits = same.gather(1, order)
        top = {"val/top1": hits[:, 0].float().mean(), "val/top5": hits.any(1).float().mean()}
        self.log_dict(top | {"val/psnr": -10 * error.mean().log10()}, prog_bar=True)

    def configure_optimizers(self) -> dict:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.hparams.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.learning_rate, betas=(0.9, 0.98))
        return warmup_cosine(
            optimizer, self.hparams.warmup_steps, self.trainer.estimated_stepping_batches
        )

    def on_fit_end(self) -> None:
        if not self.trainer.is_global_zero:
            return
        out = Path(self.hparams.out)
        self.vision.save_pretrained(out)
        save_file(self.caption_projection.state_dict(), out / "caption_projection.safetensors")
        numbers = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        pixels = torch.cat([batch["images"] for batch in self.trainer.datamodule.val_dataloader()])
        numbers |= {"steps": self.trainer.global_step} | self.statistics(pixels[:2000])
        (out / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
        print(json.dumps(numbers, indent=2))

    @torch.no_grad()
    def statistics(self, pixels: UInt8[Tensor, "n 3 h w"]) -> dict[str, float]:
        """How well a constant, the image's mean and a low-rank map approximate the features."""
        self.eval()
        f = torch.cat(
            [
                self.features(self.image_processor.normalize(part)).float()
                for part in pixels.split(250)
            ]
        )
        mean, flat = f.mean((0, 1)), f.flatten(0, 1)
        variance = torch.linalg.svdvals(torch.cov((flat - mean).T)).cumsum(0)
        energy = flat.square().mean(0)
        length = flat.norm(dim=1)
        return {
            "cosine_to_dataset_mean": F.cosine_similarity(f, mean, dim=2).mean().item(),
            "cosine_to_image_mean": F.cosine_similarity(f, f.mean(1, keepdim=True), dim=2)
            .mean()
            .item(),
            "centered_cosine_to_image_mean": F.cosine_similarity(
                f - mean, f.mean(1, keepdim=True) - mean, dim=2
            )
            .mean()
            .item(),
            "pca1_explained": (variance[0] / variance[-1]).item(),
            "pca16_explained": (variance[15] / variance[-1]).item(),
            "pca32_explained": (variance[31] / variance[-1]).item(),
            "top3_channels_ratio_of_norm": (energy.topk(3).values.sum() / energy.sum()).item(),
            "norm_mean": length.mean().item(),
            "norm_std": length.std().item(),
        }


def main() -> None:
    RecipeCLI(Teacher, ImageDataModule, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()

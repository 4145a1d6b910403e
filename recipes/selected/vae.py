"""Train the small autoencoder of the pixel decoder "selected"'s latents.

    pixels [b 3 64 64] in -1..1 -> AutoencoderKL -> latents [b 4 16 16] -> pixels

The reconstruction loss is L1 on pixels and on their differences at three scales, which keeps edges
sharp without a perceptual network; the KL term has a small weight, against drifting latents. It is
a small version of the f=4 autoencoder of Rombach et al. (2022). At the end the latents are whitened
per channel, so `scaling_factor` is 1.

    python recipes/selected/vae.py fit -c recipes/selected/vae.yaml
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from command import RecipeCLI, warmup_cosine
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.training.data_module import ImageDataModule


class Autoencoder(LightningModule):
    """An AutoencoderKL with two down-samplings.

    Args:
        out: folder that receives config.json, diffusion_pytorch_model.safetensors and numbers.json.
        channels: width at 64, 32 and 16 pixels; multiples of 8, the number of norm groups.
        layers_per_block: residual blocks per resolution of the encoder (the decoder has one more).
        latent_channels: channels of a latent.
        learning_rate: peak of the warmup and cosine schedule.
        warmup_steps: steps of linear warmup.
        edge_weight: weight of the L1 on differences of adjacent pixels.
        kl_weight: weight of an image's KL to a unit Gaussian, in nats (other losses are means over
            pixels).
        image_size: side of the images, in pixels; only recorded in the config.
        seed: seed of the noise of the latents at each step.
    """

    def __init__(
        self,
        out: str = "runs/selected/vae",
        channels: tuple[int, ...] = (32, 64, 64),
        layers_per_block: int = 1,
        latent_channels: int = 4,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        edge_weight: float = 1.0,
        kl_weight: float = 1e-6,
        image_size: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=8,
            sample_size=image_size,
            force_upcast=False,
        )

    @staticmethod
    def scale(images: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """0..255 -> -1..1."""
        return images.float() / 127.5 - 1

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        pixels = self.scale(batch["images"])
        generator = torch.Generator(self.device).manual_seed(
            self.hparams.seed * 1_000_003 + self.global_step
        )
        posterior = self.vae.encode(pixels).latent_dist
        reconstructed = self.vae.decode(posterior.sample(generator)).sample.float()
        plain = F.l1_loss(reconstructed, pixels) + F.mse_loss(reconstructed, pixels)
        edges = self.edges(reconstructed, pixels)
        kl = posterior.kl().mean()
        self.log_dict({"train/l1_mse": plain, "train/edges": edges, "train/kl": kl})
        return plain + self.hparams.edge_weight * edges + self.hparams.kl_weight * kl

    @staticmethod
    def edges(
        reconstructed: Float[Tensor, "batch 3 h w"], pixels: Float[Tensor, "batch 3 h w"]
    ) -> Tensor:
        """L1 between the adjacent-pixel differences of both, summed over three resolutions."""
        # Differences are linear, so they are taken of the error
        error, total = reconstructed - pixels, reconstructed.new_zeros(())
        for _ in range(3):
            total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
            error = F.avg_pool2d(error, 2)
        return total

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        pixels = self.scale(batch["images"])
        latents = self.vae.encode(pixels).latent_dist.mode()
        reconstructed = self.vae.decode(latents).sample.float().clamp(-1, 1)
        mse = (reconstructed - pixels).square().mean((1, 2, 3)) / 4  # of values in 0..1
        psnr = -10 * mse.clamp(min=1e-8).log10()
        self.log_dict(
            {"val/mse": mse.mean(), "val/psnr": psnr.mean()}, batch_size=len(pixels), prog_bar=True
        )

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        return warmup_cosine(
            optimizer, self.hparams.warmup_steps, self.trainer.estimated_stepping_batches
        )

    @torch.no_grad()
    def on_fit_end(self) -> None:
        if not self.trainer.is_global_zero:
            return
        self.eval()
        images = self.trainer.datamodule.sets["train"].pixels
        chosen = images[torch.linspace(0, len(images) - 1, min(1000, len(images))).long()]
        latents = torch.cat(
            [self.vae.encode(self.scale(part)).latent_dist.mode() for part in chosen.split(50)]
        )
        mean, std = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
        whiten(self.vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        self.vae.register_to_config(scaling_factor=1.0)
        out = Path(self.hparams.out)
        self.vae.save_pretrained(out)
        numbers: dict[str, Any] = {
            name: float(value) for name, value in self.trainer.callback_metrics.items()
        }
        numbers |= {
            "steps": self.trainer.global_step,
            "parameters": sum(p.numel() for p in self.parameters()),
            "latent_mean": latents.mean().item(),
            "latent_std": latents.std().item(),
            "latent_mean_by_channel": mean,
            "latent_std_by_channel": std,
        }
        (out / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
        print(json.dumps(numbers, indent=2))


@torch.no_grad()
def whiten(
    vae: AutoencoderKL, mean: Float[Tensor, " latent"], std: Float[Tensor, " latent"]
) -> None:
    """Scale the 1x1 convolutions so that each latent channel has mean 0 and standard deviation 1.

    Reconstructions do not change. With one scaling_factor for all channels, the diffusion noise
    would hide those of small deviation at nearly every step.
    """
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    n = len(mean)
    into.weight[:n] /= std[:, None, None, None]
    into.bias[:n] = (into.bias[:n] - mean) / std
    into.bias[n:] -= 2 * std.log()  # the posterior's log-variance


def main() -> None:
    RecipeCLI(Autoencoder, ImageDataModule, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()

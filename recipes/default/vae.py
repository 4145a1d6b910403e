"""Train the small autoencoder in whose latents the default pixel decoder draws.

    pixels [b 3 64 64] in -1..1 -> AutoencoderKL -> latents [b 4 16 16] -> pixels

Reconstruction is L1 on pixels and on their differences at three scales, which keeps edges sharp without a perceptual
network; the KL term is only strong enough to keep latents from drifting (Rombach et al. 2022, of whose f=4 autoencoder
this is a small copy). `scaling_factor` is 1 / std of the latents, so that diffusion sees unit variance.

    python recipes/default/vae.py fit -c recipes/default/vae.yaml
"""

from __future__ import annotations

import json
from pathlib import Path

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
        channels: width at 64, 32 and 16 pixels; each a multiple of 8, the size of a normalisation group.
        layers_per_block: residual blocks at each resolution of the encoder (the decoder has one more).
        latent_channels: channels of a latent.
        learning_rate: peak of the warm-up and cosine schedule.
        warmup_steps: steps of linear warm-up.
        edge_weight: weight of the L1 on neighbour differences.
        kl_weight: weight of a whole picture's KL to a unit Gaussian, in nats, beside losses averaged over pixels.
        image_size: side of the pictures, in pixels; only recorded in the configuration.
        seed: fixes the noise of the latents at each step.
    """

    def __init__(
        self,
        out: str = "runs/default/vae",
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
        drawn = self.vae.decode(posterior.sample(generator)).sample.float()
        plain = F.l1_loss(drawn, pixels) + F.mse_loss(drawn, pixels)
        edges = self.edges(drawn, pixels)
        kl = posterior.kl().mean()
        self.log_dict({"train/l1_mse": plain, "train/edges": edges, "train/kl": kl})
        return plain + self.hparams.edge_weight * edges + self.hparams.kl_weight * kl

    @staticmethod
    def edges(drawn: Float[Tensor, "batch 3 h w"], pixels: Float[Tensor, "batch 3 h w"]) -> Tensor:
        """L1 between the neighbour differences of both pictures, summed over full, half and quarter size."""
        error, total = (
            drawn - pixels,
            drawn.new_zeros(()),
        )  # differences are linear: take them of the error
        for _ in range(3):
            total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
            error = F.avg_pool2d(error, 2)
        return total

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        pixels = self.scale(batch["images"])
        drawn = (
            self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample.float().clamp(-1, 1)
        )
        mse = (drawn - pixels).square().mean((1, 2, 3)) / 4  # of values in 0..1
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
        numbers = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
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
    """Give every latent channel mean 0 and deviation 1 by its 1x1 convolutions; the pictures stay the same.

    One scaling_factor for all leaves channels of small deviation under the diffusion's noise at nearly every step.
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

"""The denoising loss of a diffusion U-Net, for the trainers of pixel decoders.

images -VAE-> z;  z_t = a_t z + s_t e;  U-Net(z_t, t, condition) -> e (or v = a_t e - s_t z)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from lavit_tok.decode.conditioner import Conditioning


@dataclass(frozen=True)
class DenoisingConfig:
    """The loss."""

    condition_drop: float = 0.1
    """Probability of the null condition in training, for classifier-free guidance."""
    min_snr: float = 0.0
    """Cap on the signal-to-noise ratio in a step's weight (Hang et al. 2023); 0 for none."""

    def __post_init__(self) -> None:
        if not 0 <= self.condition_drop <= 1:
            raise ValueError(
                f"condition_drop: expected a number in 0..1, got {self.condition_drop}"
            )


@torch.no_grad()
def vae_latents(
    vae: Any, images: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch c h w"]:
    """The mode of an AutoencoderKL's posterior, scaled to unit variance; in float32."""
    with torch.autocast(images.device.type, enabled=False):
        latents = vae.encode(images.to(vae.device).float() / 127.5 - 1).latent_dist.mode()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@dataclass(frozen=True)
class NoisyLatents:
    """A batch of latents, each with the noise of one step.

    Args:
        latents: z.
        noise: e, of unit variance.
        noisy: z_t.
        steps: t, in 0..T-1.
    """

    latents: Float[Tensor, "batch c h w"]
    noise: Float[Tensor, "batch c h w"]
    noisy: Float[Tensor, "batch c h w"]
    steps: Int64[Tensor, " batch"]

    @classmethod
    def draw(
        cls, latents: Float[Tensor, "batch c h w"], scheduler: Any, generator: torch.Generator
    ) -> NoisyLatents:
        """Draw steps and noise from a generator on the CPU.

        One step is drawn from each of b equal parts of 0..T-1, in random order: each is uniform, as
        published, but the loss of a batch varies less.
        """
        batch, total = len(latents), scheduler.config.num_train_timesteps
        strata = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
        steps = (strata * (total / batch)).long().clamp(max=total - 1).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        return cls(latents, noise, scheduler.add_noise(latents, noise, steps), steps)

    def draw_dropped(self, ratio: float, generator: torch.Generator) -> Bool[Tensor, " batch"]:
        """Which images are trained with the null condition."""
        drawn = torch.rand(len(self.steps), generator=generator)
        return (drawn < ratio).to(self.steps.device)


def denoising_loss(
    unet: Any,
    scheduler: Any,
    noisy: NoisyLatents,
    condition: Conditioning,
    vae_factor: int,
    min_snr: float = 0.0,
) -> Float[Tensor, ""]:
    """Weighted mean squared error of the prediction.

    Args:
        unet: a UNet2DConditionModel.
        scheduler: its `prediction_type` decides whether noise or velocity is predicted.
        noisy: the latents, their noise and steps.
        condition: what the U-Net is conditioned on.
        vae_factor: pixels per latent, along one side.
        min_snr: see DenoisingConfig.
    """
    z = noisy.latents
    size = [side * vae_factor for side in z.shape[-2:]]
    # SDXL: original size, crop offset and target size
    time_ids = torch.tensor([[*size, 0, 0, *size]] * len(z), dtype=z.dtype, device=z.device)
    prediction = unet(
        timestep=noisy.steps, **condition.inputs(noisy.noisy, time_ids)
    ).sample.float()
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(z, noisy.noise, noisy.steps) if velocity else noisy.noise
    losses = (prediction - target).square().mean((1, 2, 3))
    if min_snr > 0:
        snr = compute_snr(scheduler, noisy.steps)
        # Hang et al. 2023, section 3.4: min(snr, cap) / snr, for velocity / (snr + 1)
        losses = losses * snr.clamp(max=min_snr) / (snr + 1 if velocity else snr)
    return losses.mean()

"""What a noise predictor learns from: latents, noise at drawn steps, and the loss.

pictures -VAE-> z;  z_t = a_t z + s_t e;  U-Net(z_t, t, condition) -> e (or v = a_t e - s_t z)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lavit_tok.decode.conditioner import Conditioning


@torch.no_grad()
def vae_latents(
    vae: Any, images: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch c h w"]:
    """The mode of an AutoencoderKL's posterior, scaled to unit variance; in float32."""
    with torch.autocast(images.device.type, enabled=False):
        latents = vae.encode(images.to(vae.device).float() / 127.5 - 1).latent_dist.mode()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@dataclass(frozen=True)
class Noised:
    """Latents with noise of one step each.

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
    ) -> Noised:
        """Steps drawn one from each of b equal stretches of 0..T-1, in random order: uniform, as published, but the
        loss of a batch varies less. The generator is on the CPU."""
        batch, total = len(latents), scheduler.config.num_train_timesteps
        strata = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
        steps = (strata * (total / batch)).long().clamp(max=total - 1).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        return cls(latents, noise, scheduler.add_noise(latents, noise, steps), steps)


def denoising_loss(
    unet: Any,
    scheduler: Any,
    noised: Noised,
    condition: Conditioning,
    factor: int,
    min_snr: float = 0.0,
) -> Float[Tensor, ""]:
    """Weighted mean square error of the prediction.

    Args:
        scheduler: says whether noise or velocity is predicted.
        factor: pixels of a latent's side.
        min_snr: weight of step t capped at this signal-to-noise ratio (Hang et al. 2023); 0 weighs all steps equally.
    """
    z = noised.latents
    size = [side * factor for side in z.shape[-2:]]
    time_ids = torch.tensor([[*size, 0, 0, *size]] * len(z), dtype=z.dtype, device=z.device)
    prediction = unet(
        timestep=noised.steps, **condition.inputs(noised.noisy, time_ids)
    ).sample.float()
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(z, noised.noise, noised.steps) if velocity else noised.noise
    losses = (prediction - target).square().mean((1, 2, 3))
    if min_snr > 0:
        snr = compute_snr(scheduler, noised.steps)
        losses = losses * snr.clamp(max=min_snr) / (snr + 1 if velocity else snr)
    return losses.mean()

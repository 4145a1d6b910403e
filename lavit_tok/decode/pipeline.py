"""Room 8: codes -> pixels, by diffusion. One guided loop in a diffusers pipeline.

VisualCodes -Conditioner-> c;  noise -U-Net, 25 times: u + s (c - u)-> latents -VAE, float32-> pixels
"""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    ImagePipelineOutput,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor, nn

from lavit_tok.checkpoints.weights import (
    WeightsError,
    empty,
    find_directory,
    load_weights,
    read_json,
)
from lavit_tok.codes import VisualCodes
from lavit_tok.decode.conditioner import Conditioner, Conditioning

MODELS: dict[str, type[Any]] = {
    "conditioner": Conditioner,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}
SINGLE = "diffusion_pytorch_model.safetensors"
SCHEDULERS = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)
"""The schedulers that a weights directory can name; any other can be set on a loaded decoder."""

Generators = torch.Generator | list[torch.Generator]


class PixelDecoder(StableDiffusionMixin, DiffusionPipeline):
    """Draws the pictures that visual codes describe (LaVIT, ICLR 2024, section 3.1).

    Args:
        conditioner: codes to conditions; holds the tokenizer's codebook and reconstructor.
        unet: the noise predictor.
        vae: latents to pixels.
        scheduler: any diffusers scheduler of U-Nets; swap it by
            `decoder.scheduler = DPMSolverMultistepScheduler.from_config(decoder.scheduler.config)`.

    Raises:
        ValueError: parts whose sizes do not fit each other.
    """

    model_cpu_offload_seq = "conditioner->unet->vae"
    # Offload by layers moves weights when their own layer runs; the null embedding is read without any running.
    _exclude_from_cpu_offload = ["conditioner"]  # noqa: RUF012 (diffusers' name and type)

    def __init__(
        self,
        conditioner: Conditioner,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: diffusers.SchedulerMixin,
    ) -> None:
        super().__init__()
        latent = vae.config.latent_channels
        sizes = {
            "cross_attention_dim": sum(conditioner.config.cross_dims),
            "in_channels": latent + conditioner.config.spatial_channels,
            "out_channels": latent,
        }
        for name, expected in sizes.items():
            got = unet.config[name]
            if got != expected:
                raise ValueError(
                    f"unet.{name}: expected {expected}, to fit condition and VAE, got {got}"
                )
        self.register_modules(conditioner=conditioner, unet=unet, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        codes: VisualCodes,
        num_inference_steps: int = 25,
        guidance_scale: float | int = 3.0,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        original_size: tuple[int, int] | None = None,
        output_type: str = "pil",
        eta: float | int = 0.0,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw one picture for each image's codes.

        Args:
            codes: the codes of a batch.
            num_inference_steps: denoising steps.
            guidance_scale: s in u + s (c - u); 1 is the conditional prediction alone, at half the cost.
            generator: source of the noise; a list of one a picture makes each independent of its batch.
            latents: float [b c h/f w/f], unit-variance noise to start from, instead of drawing it.
            height, width: of the pictures in pixels, a multiple of the VAE's factor f; the U-Net's own size by default.
            original_size: (height, width) that the picture claims to come from (sdxl); the picture's own by default.
            output_type: "pil", "np" (float [b h w 3]), "pt" (float [b 3 h w]), both 0..1, or "latent".
            eta: share of DDPM's noise that DDIM adds.
            return_dict: an object with `.images`, or a tuple of one.

        Raises:
            CodeError: codes of another tokenizer.
            ValueError: an impossible size, number of generators or output type.
        """
        condition = self.conditioner(codes)
        images = self.decode_condition(
            condition,
            self.conditioner.unconditional(condition),
            num_inference_steps,
            guidance_scale,
            generator,
            latents,
            height,
            width,
            original_size,
            output_type,
            eta,
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode_condition(
        self,
        condition: Conditioning,
        unconditional: Conditioning,
        num_inference_steps: int = 25,
        guidance_scale: float | int = 3.0,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        original_size: tuple[int, int] | None = None,
        output_type: str = "pil",
        eta: float | int = 0.0,
    ) -> Any:
        """Draw one picture for each condition of a batch, wherever the conditions come from; arguments as above.

        Args:
            condition, unconditional: c and u of the guided prediction, of the same batch size.

        Raises:
            ValueError: an impossible size, number of generators or output type.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(
                f"output_type: expected 'pil', 'np', 'pt' or 'latent', got {output_type!r}"
            )
        device, guided, batch = self._execution_device, guidance_scale != 1, len(condition.tokens)
        if guided:
            condition = unconditional.cat(condition)
        height, width = self._size(height), self._size(width)
        latents = self.prepare_latents(batch, height, width, generator, latents).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma
        ids = [*(original_size or (height, width)), 0, 0, height, width]
        time_ids = torch.tensor([ids] * len(condition.tokens), dtype=latents.dtype, device=device)
        options = {"eta": eta, "generator": generator}
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in accepted}
        for t in self.progress_bar(self.scheduler.timesteps):
            doubled = torch.cat([latents] * 2) if guided else latents
            inputs = condition.inputs(self.scheduler.scale_model_input(doubled, t), time_ids)
            prediction = self.unet(timestep=t, **inputs, return_dict=False)[0]
            if guided:
                without, given = prediction.chunk(2)
                prediction = without + guidance_scale * (given - without)
            latents = self.scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(
            self.decode_latents(latents), output_type=output_type
        )

    def prepare_latents(
        self,
        batch: int,
        height: int,
        width: int,
        generator: Generators | None = None,
        latents: Tensor | None = None,
    ) -> Float[Tensor, "batch c h w"]:
        """Unit-variance noise to start from, in the U-Net's dtype: drawn, or the caller's once its shape is checked."""
        factor, channels = self.vae_scale_factor, self.vae.config.latent_channels
        shape = (batch, channels, height // factor, width // factor)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"generator: expected one or a list of {batch}, got a list of {len(generator)}"
            )
        if latents is None:
            return randn_tensor(
                shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype
            )
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected {list(shape)}, got {list(latents.shape)}")
        return latents.to(self.unet.dtype)

    def decode_latents(
        self, latents: Float[Tensor, "batch c h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Latents -> pixels in about -1..1, in float32 where the VAE's config asks for it (force_upcast)."""
        dtype, config = self.vae.dtype, self.vae.config
        upcast = config.force_upcast and dtype != torch.float32
        if upcast:
            nn.Module.to(
                self.vae, torch.float32
            )  # diffusers' own `to` warns at each change of dtype
        try:
            latents = latents.to(self.vae.dtype) / config.scaling_factor + (
                config.shift_factor or 0.0
            )
            with torch.autocast(latents.device.type, enabled=False):
                return self.vae.decode(latents, return_dict=False)[0].float()
        finally:
            if upcast:
                nn.Module.to(self.vae, dtype)

    def _size(self, value: int | None) -> int:
        factor = self.vae_scale_factor
        value = self.unet.config.sample_size * factor if value is None else value
        if value < factor or value % factor:
            raise ValueError(
                f"height and width: expected positive multiples of {factor}, got {value}"
            )
        return value

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Write model_index.json and a folder a part, safetensors only, floats as `dtype` (e.g. torch.float16)."""
        if dtype is not None:
            parts = {
                name: nn.Module.to(copy.deepcopy(getattr(self, name)), dtype) for name in MODELS
            }
            PixelDecoder(**parts, scheduler=self.scheduler).save_pretrained(
                save_directory, **kwargs
            )
            return
        super().save_pretrained(str(save_directory), **{**kwargs, "safe_serialization": True})

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "default",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> PixelDecoder:
        """The shipped decoder ("default", no network), a directory, or a Hub id.

        Unlike diffusers' own loader this takes no class from the directory: the four parts are what this class says
        they are, and model_index.json is ignored.

        Raises:
            WeightsError: with every missing, unexpected or mis-shaped tensor or setting listed.
        """
        directory = find_directory(name, "decoder", **hub)
        parts: dict[str, Any] = {
            part: load_model(directory / part, kind, dtype) for part, kind in MODELS.items()
        }
        parts["scheduler"] = load_scheduler(directory / "scheduler")
        try:
            return cls(**parts).to(device)
        except ValueError as error:
            raise WeightsError(f"{directory}: {error}") from None


def load_model(directory: Path, kind: type[Any], dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers model of this class, whatever the directory says, in eval mode. Raises WeightsError."""
    model = build_empty(directory, kind, dtype)
    load_weights(model, directory, SINGLE)
    return model.eval()


def build_empty(directory: Path, kind: type[Any], dtype: torch.dtype) -> nn.Module:
    """A diffusers model of this class and of the sizes in config.json, without weights. Raises WeightsError."""
    config = read_config(directory / "config.json", kind)
    try:
        return empty(lambda: kind.from_config(config), dtype)
    except Exception as error:  # the constructors raise many kinds for sizes that do not fit
        raise WeightsError(f"{directory}: not the config of a {kind.__name__}: {error}") from error


def load_scheduler(directory: Path) -> Any:
    """A scheduler of the list above. Raises WeightsError for any other."""
    path = directory / "scheduler_config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise WeightsError(
            f"{path}: expected _class_name to be one of {sorted(SCHEDULERS)}, got {kind!r}"
        )
    # Settings of other schedulers are kept by diffusers, so that one can be swapped for another and back.
    return getattr(diffusers, kind).from_config(
        {k: v for k, v in config.items() if not k.startswith("_")}
    )


def read_config(path: Path, kind: type[ConfigMixin]) -> dict[str, Any]:
    """Settings of a model's config file. Raises WeightsError for another class's file or unknown settings."""
    values = read_json(path)
    if values.get("_class_name") != kind.__name__:
        raise WeightsError(
            f"{path}: expected _class_name {kind.__name__!r}, got {values.get('_class_name')!r}"
        )
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    unknown = sorted(set(values) - set(inspect.signature(kind.__init__).parameters))
    if unknown:
        raise WeightsError(
            f"{path}: unknown settings {unknown}: without them another model would be built"
        )
    return values

"""Codes -> pixels in a diffusers pipeline: one guided denoising loop, or one forward pass.

sample:    VisualCodes -Conditioner-> c, u
           noise -U-Net, 25 steps: u + s (c - u)-> latents -VAE, float32-> pixels
      or   VisualCodes -Conditioner's reconstructor-> features, colors
           noise -SampleDecoder, one pass-> pixels
mean:      VisualCodes -Conditioner's reconstructor-> features, colors -MeanDecoder-> pixels
"""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any, Literal

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

from lavit_tok.checkpoints.files import atomic_files
from lavit_tok.checkpoints.weights import (
    WeightsError,
    check_layers,
    empty,
    find_directory,
    load_weights,
    read_json,
)
from lavit_tok.codes import CodeError, VisualCodes
from lavit_tok.decode.conditioner import Conditioner, Conditioning
from lavit_tok.decode.mean_decoder import MeanDecoder
from lavit_tok.decode.sample_decoder import SampleDecoder
from lavit_tok.nn.ranges import require_number

MODELS: dict[str, type[Any]] = {
    "conditioner": Conditioner,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "mean_decoder": MeanDecoder,
    "sample_decoder": SampleDecoder,
}
SINGLE = "diffusion_pytorch_model.safetensors"
PREDICTIONS = ("epsilon", "sample", "v_prediction")
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
"""Schedulers that a weights directory may name; any other can be set on a loaded decoder."""

MAX_STEPS, MAX_SIDE = 10_000, 16_384  # denoising steps, pixels; more would not end in a day
Generators = torch.Generator | list[torch.Generator]


class PixelDecoder(StableDiffusionMixin, DiffusionPipeline):
    """Generates the images that visual codes describe (LaVIT, ICLR 2024, section 3.1).

    Args:
        conditioner: codes to conditioning; contains the tokenizer's codebook and reconstructor.
        unet: the noise predictor.
        vae: latents to pixels.
        scheduler: any diffusers scheduler; replace it by
            `decoder.scheduler = DPMSolverMultistepScheduler.from_config(decoder.scheduler.config)`.
        mean_decoder: features and colors of nested codes to the expected image.
        sample_decoder: the same and noise to a random image, in one pass.

    U-Net, VAE and scheduler, or the sample decoder, are needed for `mode="sample"`, the mean
    decoder for `mode="mean"`; a decoder has either or both.

    Raises:
        ValueError: models whose sizes do not match, or that suffice for neither mode.
    """

    model_cpu_offload_seq = "conditioner->mean_decoder->sample_decoder->unet->vae"
    _optional_components = [*list(MODELS)[1:], "scheduler"]  # noqa: RUF012
    # Offloading by layers moves weights when their layer runs; the null embedding is used without
    # running any layer.
    _exclude_from_cpu_offload = ["conditioner"]  # noqa: RUF012 (diffusers' name and type)

    def __init__(
        self,
        conditioner: Conditioner,
        unet: UNet2DConditionModel | None = None,
        vae: AutoencoderKL | None = None,
        scheduler: diffusers.SchedulerMixin | None = None,
        mean_decoder: MeanDecoder | None = None,
        sample_decoder: SampleDecoder | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            conditioner=conditioner,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            mean_decoder=mean_decoder,
            sample_decoder=sample_decoder,
        )
        parts = {"unet": unet, "vae": vae, "scheduler": scheduler}
        missing = [name for name, part in parts.items() if part is None]
        patch_decoders = {"mean_decoder": mean_decoder, "sample_decoder": sample_decoder}
        given = {name: part for name, part in patch_decoders.items() if part is not None}
        if len(missing) in (1, 2) or (missing and not given):
            raise ValueError(
                "expected unet, vae and scheduler, or mean_decoder or sample_decoder, got no "
                + ", no ".join(missing)
            )
        if not missing and sample_decoder is not None:
            raise ValueError("expected unet or sample_decoder, got both: both are for sample")
        c = conditioner.config
        if unet is not None and vae is not None:
            latent = vae.config.latent_channels
            sizes = {
                "cross_attention_dim": sum(c.cross_dims),
                "in_channels": latent + c.spatial_channels,
                "out_channels": latent,
            }
            fit = "for this conditioner and VAE"
            _require_sizes("unet", unet.config, sizes, fit)
            self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        else:
            self.vae_scale_factor = 1
        for name, part in given.items():
            sizes = {key: c[key] for key in ("width", "patches", "color_cells")}
            _require_sizes(name, part.config, sizes, "for this conditioner")
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        codes: VisualCodes | tuple[Conditioning, Conditioning],
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
        mode: Literal["sample", "mean"] | None = None,
    ) -> Any:  # ImagePipelineOutput, or a tuple without return_dict
        """Generate one image for the codes of each image of a batch.

        In mode "mean" the image is the expected one, without randomness; only `codes`, the sizes,
        `output_type` and `return_dict` matter. A sample decoder needs one pass: of the denoising
        options `generator` and `latents` matter, and any number of steps gives the same image.

        Args:
            codes: the codes of a batch; or c and u, conditioning and null conditioning from another
                source.
            num_inference_steps: denoising steps.
            guidance_scale: s in u + s (c - u); 1 is the conditional prediction alone, at half the
                cost.
            generator: source of the noise; a list with one per image makes each image independent
                of its batch.
            latents: float [b c h/f w/f], unit-variance noise to start from; of a sample decoder's
                `noise_shape`.
            height: of the images in pixels, a multiple of the VAE's factor f; by default the
                U-Net's sample size.
            width: as height.
            original_size: (height, width) of the size conditioning (sdxl); by default the images'.
            output_type: "pil", "np" (float [b h w 3]) or "pt" (float [b 3 h w]), both in 0..1, or
                "latent".
            eta: ratio of DDPM's noise that DDIM adds.
            return_dict: return an object with `.images` instead of a tuple.
            mode: "sample" draws an image by the U-Net or the sample decoder, "mean" computes the
                expected one; by default "mean" if the decoder has a mean decoder and no U-Net.

        Raises:
            CodeError: codes of another tokenizer.
            ValueError: a mode that this decoder lacks, an impossible size, number of generators or
                output type; a number that is not finite or out of range.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            kinds = "'pil', 'np', 'pt' or 'latent'"
            raise ValueError(f"output_type: expected {kinds}, got {output_type!r}")
        require_number("num_inference_steps", num_inference_steps, 1, MAX_STEPS, integer=True)
        require_number("guidance_scale", guidance_scale, -1000, 1000)
        require_number("eta", eta, 0, 1)
        if mode is None:
            mode = self.modes[0]
        if mode not in self.modes:
            raise ValueError(f"mode: expected one of {self.modes} for this decoder, got {mode!r}")
        if mode == "mean" or self.unet is None:
            pixels = self._decode_patches(codes, mode, generator, latents, output_type)
            return self._resized(pixels, height, width, output_type, return_dict)
        is_pair = isinstance(codes, tuple) and len(codes) == 2
        if isinstance(codes, VisualCodes):
            with torch.autocast(self._execution_device.type, enabled=False):
                conditioning = self.conditioner(codes)
                null = self.conditioner.unconditional(conditioning)
        elif is_pair and all(isinstance(part, Conditioning) for part in codes):
            conditioning, null = codes
        else:
            raise CodeError(
                "codes: expected VisualCodes, e.g. VisualCodes.from_list([[1, 2]], codebook_size), "
                f"or a tuple of conditioning and null conditioning, got {type(codes).__name__}: "
                "without its codebook's size, a code could decode to an unrelated image"
            )
        device, guided, batch = (
            self._execution_device,
            guidance_scale != 1,
            len(conditioning.tokens),
        )
        if guided:
            conditioning = null.cat(conditioning)  # one U-Net pass for both predictions
        height, width = self._size(height), self._size(width)
        latents = self.prepare_latents(batch, height, width, generator, latents).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma
        # SDXL's size conditioning: original size, top left of the crop, target size.
        sizes = [*(original_size or (height, width)), 0, 0, height, width]
        count = len(conditioning.tokens)
        time_ids = torch.tensor([sizes] * count, dtype=latents.dtype, device=device)
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"eta": eta, "generator": generator}
        options = {name: value for name, value in options.items() if name in accepted}
        for t in self.progress_bar(self.scheduler.timesteps):
            doubled = torch.cat([latents] * 2) if guided else latents
            inputs = conditioning.inputs(self.scheduler.scale_model_input(doubled, t), time_ids)
            prediction = self.unet(timestep=t, **inputs, return_dict=False)[0]
            if guided:
                u, c = prediction.chunk(2)
                prediction = u + guidance_scale * (c - u)
            latents = self.scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
        images: Any = latents
        if output_type != "latent":
            pixels = self.decode_latents(latents)
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def modes(self) -> list[Literal["sample", "mean"]]:
        """The modes that the decoder's models suffice for, first the default."""
        parts: list[tuple[Literal["sample", "mean"], Any]] = [
            ("sample", self.unet),
            ("mean", self.mean_decoder),
            ("sample", self.sample_decoder),
        ]
        return [mode for mode, part in parts if part is not None]

    def _decode_patches(
        self,
        codes: VisualCodes | tuple[Conditioning, Conditioning],
        mode: str,
        generator: Generators | None,
        latents: Tensor | None,
        output_type: str,
    ) -> Float[Tensor, "batch 3 height width"]:
        """The mean or the sample decoder's images, about -1..1."""
        if not isinstance(codes, VisualCodes) or output_type == "latent":
            got = "a conditioning" if output_type != "latent" else "output_type 'latent'"
            raise ValueError(f"mode {mode!r}: expected VisualCodes and pixels, got {got}")
        with torch.autocast(self._execution_device.type, enabled=False):
            features = self.conditioner.features(codes)
        return self._features_to_pixels(features, mode, generator, latents)

    def _features_to_pixels(
        self,
        features: Float[Tensor, "batch patches joined"],
        mode: str,
        generator: Generators | None,
        latents: Tensor | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        with torch.autocast(self._execution_device.type, enabled=False):
            if mode == "mean":
                return self.mean_decoder(features).float()
            shape, dtype = self.sample_decoder.noise_shape(len(features)), self.sample_decoder.dtype
            noise = self._noise(shape, dtype, generator, latents)
            return self.sample_decoder(features, noise).float()

    def _resized(
        self,
        pixels: Float[Tensor, "batch 3 rows columns"],
        height: int | None,
        width: int | None,
        output_type: str,
        return_dict: bool,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        native = pixels.shape[-1]
        size = (native if height is None else height, native if width is None else width)
        if min(size) < 1:
            raise ValueError(f"height and width: expected positive numbers, got {size}")
        if size != (native, native):
            pixels = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        images: Any = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode_condition(
        self, condition: Conditioning, unconditional: Conditioning, *args: Any, **kwargs: Any
    ) -> Any:
        """The images of a conditioning from any source; other arguments as in `__call__`."""
        output: Any = self((condition, unconditional), *args, **kwargs)
        return output.images

    @torch.no_grad()
    def decode_features(
        self,
        features: Float[Tensor, "batch patches joined"],
        mode: Literal["sample", "mean"] = "sample",
        generator: Generators | None = None,
    ) -> Any:
        """The images of `Conditioner.features` from any source, by the sample or mean decoder.

        Raises:
            ValueError: a mode that the decoder has neither a sample nor a mean decoder for.
        """
        if getattr(self, f"{mode}_decoder", None) is None:
            raise ValueError(f"mode: expected a decoder with a {mode!r} decoder of features")
        features = features.to(self._execution_device, self.dtype)
        pixels = self._features_to_pixels(features, mode, generator)
        return self.image_processor.postprocess(pixels, output_type="pil")

    def prepare_latents(
        self,
        batch: int,
        height: int,
        width: int,
        generator: Generators | None = None,
        latents: Tensor | None = None,
    ) -> Float[Tensor, "batch c h w"]:
        """Unit-variance noise to start from, in the U-Net's dtype.

        Args:
            batch: number of images.
            height: of the images, in pixels.
            width: of the images, in pixels.
            generator: source of the noise.
            latents: noise to use instead, once its shape is checked.

        Raises:
            ValueError: another number of generators, or latents of another shape.
        """
        factor, channels = self.vae_scale_factor, self.vae.config.latent_channels
        shape = (batch, channels, height // factor, width // factor)
        return self._noise(shape, self.unet.dtype, generator, latents)

    def _noise(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        generator: Generators | None,
        latents: Tensor | None,
    ) -> Float[Tensor, "batch c h w"]:
        """Noise of this shape, or `latents` once their shape is checked."""
        batch = shape[0]
        given = generator if isinstance(generator, list) else [generator] * batch
        kinds = torch.Generator | None
        if len(given) != batch or not all(isinstance(g, kinds) for g in given):
            got = f"a list of {len(given)}" if len(given) != batch else repr(generator)[:60]
            raise ValueError(
                f"generator: expected a torch.Generator or a list of {batch}, got {got}"
            )
        if latents is None:
            device = self._execution_device
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected {list(shape)}, got {list(latents.shape)}")
        return latents.to(self._execution_device, dtype)

    def decode_latents(
        self, latents: Float[Tensor, "batch c h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Latents -> pixels, about -1..1; in float32 if the VAE's config has force_upcast."""
        dtype, config = self.vae.dtype, self.vae.config
        upcast = config.force_upcast and dtype != torch.float32
        if upcast:  # not by diffusers' own `to`, which warns at each change of dtype
            nn.Module.to(self.vae, torch.float32)
        try:
            shift = config.shift_factor or 0.0
            latents = latents.to(self.vae.dtype) / config.scaling_factor + shift
            with torch.autocast(latents.device.type, enabled=False):
                return self.vae.decode(latents, return_dict=False)[0].float()
        finally:
            if upcast:
                nn.Module.to(self.vae, dtype)

    def _size(self, value: int | None) -> int:
        factor = self.vae_scale_factor
        value = self.unet.config.sample_size * factor if value is None else value
        if type(value) is not int or not factor <= value <= MAX_SIDE or value % factor:
            expected = f"multiples of {factor} up to {MAX_SIDE}"
            raise ValueError(f"height and width: expected {expected}, got {value}")
        return value

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Write model_index.json and one folder per model; safetensors only.

        Args:
            save_directory: new or existing directory.
            dtype: of the floats in the files, e.g. torch.float16.
            kwargs: of diffusers' save_pretrained.
        """
        if dtype is None:
            options = {**kwargs, "safe_serialization": True}
            with atomic_files(Path(save_directory)) as folder:
                super().save_pretrained(str(folder), **options)
            return
        parts = {name: getattr(self, name) for name in MODELS}
        copies: dict[str, Any] = {
            name: nn.Module.to(copy.deepcopy(part), dtype)
            for name, part in parts.items()
            if part is not None
        }
        PixelDecoder(**copies, scheduler=self.scheduler).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "default",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> PixelDecoder:
        """Load a shipped decoder ("default" or "selected", no network), a directory or a Hub id.

        Unlike diffusers' own loader this instantiates no class that the directory names:
        model_index.json is ignored.

        Raises:
            WeightsError: listing every missing, unexpected or mis-shaped tensor or config entry.
        """
        directory = find_directory(name, "decoder", **hub)
        found = {
            part: kind
            for part, kind in MODELS.items()
            if part == "conditioner" or (directory / part).is_dir()
        }
        models: dict[str, Any] = {
            part: load_model(directory / part, kind, dtype) for part, kind in found.items()
        }
        if (directory / "scheduler").is_dir():
            models["scheduler"] = load_scheduler(directory / "scheduler")
        try:
            return cls(**models).to(device)
        except WeightsError:
            raise
        except ValueError as error:
            raise WeightsError(f"{directory}: {error}") from None


def _require_sizes(part: str, config: Any, sizes: dict[str, int], fit: str) -> None:
    """Raise ValueError if the config of a part has other sizes."""
    for name, expected in sizes.items():
        if config[name] != expected:
            raise ValueError(f"{part}.{name}: expected {expected} {fit}, got {config[name]}")


def load_model(directory: Path, kind: type[Any], dtype: torch.dtype = torch.float32) -> Any:
    """Load a diffusers model of this class, in eval mode. Raises WeightsError."""
    config = read_config(directory / "config.json", kind)
    check_layers(config, directory, SINGLE)
    model = build_empty(directory, kind, dtype, directory)
    load_weights(model, directory, SINGLE)
    return model.eval()


def build_empty(
    directory: Path, kind: type[Any], dtype: torch.dtype, weights: Path | None = None
) -> nn.Module:
    """A diffusers model of this class, sized by config.json, without weights.

    Args:
        directory: with config.json.
        kind: the class.
        dtype: of the floating-point tensors.
        weights: directory of the weights that must fit; None to compare them later.

    Raises:
        WeightsError: another class's file, unknown entries, or sizes that no model has.
    """
    config = read_config(directory / "config.json", kind)
    try:
        return empty(lambda: kind.from_config(config), dtype, weights, SINGLE)
    except WeightsError:
        raise
    except Exception as error:  # the constructors raise many kinds of exceptions
        raise WeightsError(f"{directory}: not the config of a {kind.__name__}: {error}") from error


def load_scheduler(directory: Path) -> Any:
    """Load one of SCHEDULERS. Raises WeightsError for any other."""
    path = directory / "scheduler_config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        choices = sorted(SCHEDULERS)
        raise WeightsError(f"{path}: expected _class_name to be one of {choices}, got {kind!r}")
    predicted = config.get("prediction_type", "epsilon")
    if predicted not in PREDICTIONS:  # diffusers compares it in the first denoising step
        raise WeightsError(
            f"{path}: prediction_type: expected one of {PREDICTIONS}, got {predicted!r:.60}"
        )
    # Unknown entries are allowed: diffusers keeps those of other schedulers in the file, so that
    # one scheduler can replace another and back.
    values = {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        return getattr(diffusers, kind).from_config(values)
    except Exception as error:
        raise WeightsError(f"{path}: not the config of a {kind}: {error}") from error


def read_config(path: Path, kind: type[ConfigMixin]) -> dict[str, Any]:
    """The arguments of a model class in its config file.

    Raises:
        WeightsError: another class's file, or unknown entries.
    """
    values = read_json(path)
    if values.get("_class_name") != kind.__name__:
        got = values.get("_class_name")
        raise WeightsError(f"{path}: expected _class_name {kind.__name__!r}, got {got!r}")
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    unknown = sorted(set(values) - set(inspect.signature(kind.__init__).parameters))
    if unknown:
        raise WeightsError(
            f"{path}: unknown entries {unknown}: without them another model would be built"
        )
    return values

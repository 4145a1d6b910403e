"""Training of a pixel decoder: a U-Net learns to denoise latents, conditioned on an image's codes.

    x -frozen tokenizer-> X_rec -projection, dropped at 0.1-> cond. -.
    x -frozen VAE-> z;  z_t = a_t z + s_t e  ----------------------> U-Net -> e or v = a_t e - s_t z

LaVIT (ICLR 2024) trains its U-Net in this way for 20k steps, on the tokenizer's images and without
captions. All random numbers come from a generator seeded by (seed, step, rank), and the averaged
weights are part of the checkpoint, so a resumed run repeats the uninterrupted one exactly.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from lavit_tok.decode.conditioner import Conditioner
from lavit_tok.decode.pipeline import PixelDecoder
from lavit_tok.training.denoising import DenoisingConfig, NoisyLatents, denoising_loss
from lavit_tok.training.ema import EMATraining
from lavit_tok.training.encoded_images import Encoded, EncodedSet, FrozenEncoders, load_unet
from lavit_tok.training.frozen import Frozen
from lavit_tok.training.logging import SampleConfig, log_image, step_generator
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig

WeightsDtype = Literal["float32", "float16", "bfloat16"]
DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net."""

    config: dict[str, Any] | None = None
    """UNet2DConditionModel config; channels and cross_attention_dim follow from the inputs."""
    pretrained: str | None = None
    """Directory or Hub id (owner/name/subfolder) of a U-Net to start from, in place of `config`."""
    sample_size: int | None = None
    """Side of the exported decoder's latents by default; None for the U-Net's own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, for large U-Nets."""
    channels_last: bool = True
    """Memory layout of the U-Net; faster on CPUs and on tensor cores."""


@dataclass(frozen=True)
class ConditionConfig:
    """How the features condition the U-Net."""

    style: Literal["sd", "sdxl"] = "sd"
    """"sd": cross-attention; "sdxl": also a pooled vector and image sizes."""
    cross_dims: tuple[int, ...] = (192,)
    """Widths of the projections of the features: one for sd, two for sdxl."""
    null_length: int = 1
    """Tokens of the learned null condition (sd); as many as patches need no mask, the fastest."""
    pooled_dim: int = 0
    """Width of the pooled vector (sdxl)."""
    pool_heads: int = 1
    """Attention heads of the pooling (sdxl)."""
    spatial_channels: int = 0
    """Further input channels with the features at their positions; 0 (LaVIT) for none."""
    spatial_scale: int = 1
    """Cells of these channels per patch, along one side."""
    feature_norm: bool = False
    """Normalize each feature vector before the projection; LaVIT does not."""


@dataclass(frozen=True)
class DiffusionConfig(DenoisingConfig):
    """The diffusion process and the loss."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the U-Net predicts: the noise (LaVIT) or the velocity."""
    noise_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """The schedule of betas, by its name in diffusers."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last step is pure noise; requires v_prediction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_terminal_snr and self.prediction_type != "v_prediction":
            # Where z_t is pure noise it equals e, and predicting e is no training signal
            raise ValueError("zero_terminal_snr: expected prediction_type v_prediction")

    def scheduler(self) -> DDIMScheduler:
        """The noise schedule, as Stable Diffusion has it."""
        return DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule=self.noise_schedule,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.zero_terminal_snr,
            timestep_spacing="trailing" if self.zero_terminal_snr else "leading",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )


class PixelDecoderTraining(EMATraining):
    """Trains a U-Net and the projection of its condition; tokenizer and VAE are frozen.

    Args:
        vae: "selected" (that of the shipped pixel decoder), directory of a diffusers AutoencoderKL,
            or its Hub id (owner/name or owner/name/subfolder).
        tokenizer: "default", directory or Hub id of the tokenizer whose codes are decoded.
        start_from: "selected", directory or Hub id of a pixel decoder to train on: its U-Net,
            instead of `unet`, its projection and its noise schedule.
        unet: the U-Net.
        condition: how the features condition it.
        diffusion: the diffusion process and the loss.
        optimizer: AdamW.
        schedule: learning-rate schedule.
        ema_decay: largest decay of the averaged weights, see EMATraining.
        samples: logged sheets of originals and samples.
        flip: probability that an image is flipped horizontally.
        cache: encode all training images once before training, instead of at every step; needs a
            data module with `cache` and without augmentation.
        out: where the trained decoder is saved; None keeps checkpoints only.
        out_dtype: number format of the saved weights.
        seed: seed of all random numbers of the training.
    """

    def __init__(
        self,
        vae: str,
        tokenizer: str = "default",
        start_from: str | None = None,
        unet: UNetConfig = UNetConfig(),
        condition: ConditionConfig = ConditionConfig(),
        diffusion: DiffusionConfig = DiffusionConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, betas=(0.9, 0.99)),
        schedule: ScheduleConfig = ScheduleConfig(warmup_steps=500),
        ema_decay: float = 0.9999,
        samples: SampleConfig = SampleConfig(),
        flip: float = 0.0,
        cache: bool = False,
        out: str | None = None,
        out_dtype: WeightsDtype = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= flip <= 1:
            raise ValueError(f"flip: expected a number in 0..1, got {flip}")
        self.save_arguments()
        self.diffusion, self.samples, self.flip, self.cache = diffusion, samples, flip, cache
        self.optimizer_config, self.schedule_config = optimizer, schedule
        self.out, self.out_dtype, self.seed = out, out_dtype, seed
        self.tokenizer_name, self.kind = tokenizer, "pixel decoder"
        self.encoders = FrozenEncoders(tokenizer, vae)
        frozen = self.encoders.tokenizer
        conditioner = Conditioner.for_tokenizer(
            frozen.config, frozen.quantizer.codebook, frozen.reconstructor, **asdict(condition)
        )
        self.conditioner = Frozen(conditioner)  # codebook and reconstructor
        self.projection = conditioner.projection.requires_grad_(True).train()
        latent_channels = self.encoders.vae.config.latent_channels
        sizes = {
            "in_channels": latent_channels + condition.spatial_channels,
            "out_channels": latent_channels,
            "cross_attention_dim": sum(condition.cross_dims),
        }
        start = None if start_from is None else PixelDecoder.from_pretrained(start_from)
        if start is None:
            self.unet = load_unet(unet.config, unet.pretrained, sizes)
        else:
            self.unet = start_unet(start, self.projection, sizes)
        if unet.sample_size is not None:
            self.unet.register_to_config(sample_size=unet.sample_size)
        if unet.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if unet.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.scheduler = diffusion.scheduler() if start is None else start.scheduler
        self.start_average(ema_decay)
        self.encoded: EncodedSet | None = None
        self.sample_images: Tensor | None = None

    # The loss

    def diffusion_loss(
        self, encoded: Encoded, generator: torch.Generator, condition_drop: float
    ) -> Float[Tensor, ""]:
        """Weighted mean squared error of the prediction, at one step per image."""
        noisy = NoisyLatents.draw(encoded.latents, self.scheduler, generator)
        dropped = noisy.draw_dropped(condition_drop, generator)
        condition = self.projection(encoded.features)
        if condition_drop > 0:
            condition = condition.where(dropped, self.projection.unconditional(condition))
        vae_factor = 2 ** (len(self.encoders.vae.config.block_out_channels) - 1)
        return denoising_loss(
            self.unet, self.scheduler, noisy, condition, vae_factor, self.diffusion.min_snr
        )

    # Lightning hooks

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        step = self.micro_step(batch_idx)
        generator = step_generator(self.seed, step, self.global_rank, "cpu")
        images = batch["images"]
        flipped = torch.rand(len(images), generator=generator) < self.flip
        if self.encoded is not None:
            encoded = self.encoded(batch["index"], flipped, self.device)
        else:
            flipped = flipped.to(images.device).view(-1, 1, 1, 1)
            encoded = self.encoders(torch.where(flipped, images.flip(3), images))
        loss = self.diffusion_loss(encoded, generator, self.diffusion.condition_drop)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same loss with every condition, and with the same noise at every validation."""
        generator = step_generator(self.seed, batch_idx, 2**31 + self.global_rank, "cpu")
        loss = self.diffusion_loss(self.encoders(batch["images"]), generator, 0.0)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["images"]), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self.encoders.to(self.device)
        super().on_validation_epoch_start()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.encoders.to(self.device)
        sets = getattr(getattr(self.trainer, "datamodule", None), "sets", {})
        images = sets.get("validation", sets.get("train"))
        if images is not None and self.samples.every:
            count = min(self.samples.count, len(images))
            self.sample_images = torch.stack([images[i]["images"] for i in range(count)])
        if self.cache:
            self.encoded = self._encode_all(sets.get("train"))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        due = self.completes_step(batch_idx) and self.samples.due(self.global_step)
        if due and self.trainer.is_global_zero:
            if self.sample_images is None:
                self.sample_images = batch["images"][: self.samples.count]
            self._log_samples(self.sample_images)

    def next_command(self) -> str:
        """Shards are made next."""
        return self.shards_command(self.tokenizer_name)

    # The trained decoder

    def decoder(self) -> PixelDecoder:
        """A decoder that shares the current parameters."""
        self.conditioner.to(self.device)
        scheduler = copy.deepcopy(self.scheduler)
        decoder = PixelDecoder(self.conditioner.module, self.unet, self.encoders.vae, scheduler)
        decoder.set_progress_bar_config(disable=True)
        return decoder

    def export(self, directory: str | Path) -> None:
        """Save a PixelDecoder of the averaged weights."""
        with self.averaged():
            decoder = copy.deepcopy(self.decoder())
        for module in (decoder.conditioner, decoder.unet, decoder.vae):
            nn.Module.to(module.cpu(), memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        decoder.save_pretrained(directory, dtype=DTYPES[self.out_dtype])

    @torch.no_grad()
    def sample(self, images: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Decode these images' codes by the averaged weights, with the same noise each time.

        Returns: pixels in 0..1.
        """
        s, training, codes = self.samples, self.unet.training, self.encoders.codes(images)
        generators = [step_generator(self.seed, i, 2**32, "cpu") for i in range(len(images))]
        height, width = images.shape[-2:]
        bf16 = torch.autocast(
            self.device.type, torch.bfloat16, enabled="bf16" in str(self.trainer.precision)
        )
        self.unet.eval()
        with self.averaged(), bf16:
            decoder: Any = self.decoder()
            options: dict[str, Any] = {"height": height, "width": width, "output_type": "pt"}
            decoded = decoder(codes, s.steps, s.guidance, generators, **options).images
        self.unet.train(training)
        return decoded.float().cpu()

    def _log_samples(self, images: UInt8[Tensor, "batch 3 h w"]) -> None:
        decoded, original = self.sample(images.to(self.device)), images.cpu().float() / 255
        error = (decoded - original).square().mean((1, 2, 3)).clamp(min=1e-8)
        self.log("sample/psnr", -10 * error.log10().mean(), rank_zero_only=True)
        sheet = torch.cat([torch.cat(list(line), 2) for line in (original, decoded)], 1)
        pixels = (sheet * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        log_image(self, "samples", Image.fromarray(pixels))

    def _encode_all(self, images: Any) -> EncodedSet:
        if images is None or getattr(images, "pixels", None) is None:
            raise ValueError(
                "cache: expected a data module with cache=True, which holds all decoded images"
            )
        if images.augment.flip or images.augment.cache_size != images.augment.image_processor.size:
            raise ValueError(
                "cache: expected no augmentation in the data module (set model.flip instead), got "
                "flip or crops"
            )

        def report(done: int, total: int) -> None:
            if done == total or done % 2560 == 0:
                print(f"encoded {done} of {total} training images", flush=True)

        folder = Path(self.trainer.default_root_dir) / "cache"
        return EncodedSet(
            images.pixels,
            images.index,
            self.encoders,
            flipped=self.flip > 0,
            folder=folder if self.trainer.is_global_zero else None,
            report=report,
        )


def start_unet(decoder: PixelDecoder, projection: nn.Module, sizes: dict[str, int]) -> Any:
    """The U-Net of a trained decoder, whose projection is copied into `projection`.

    Raises:
        ValueError: sizes that do not fit the VAE and the condition.
    """
    unet: Any = decoder.unet
    got = {name: unet.config[name] for name in sizes}
    trained, new = decoder.conditioner.projection.state_dict(), projection.state_dict()
    same = {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in new.items()}
    if got != sizes or not same:
        raise ValueError(
            f"start_from: expected a decoder of {sizes} with this recipe's condition, got {got}"
        )
    projection.load_state_dict(trained)
    return unet.requires_grad_(True).train()

"""Training of a pixel decoder: the U-Net learns to denoise latents, given the features that a picture's codes tell.

    x -frozen tokenizer-> X_rec -Projection, dropped at 0.1-> condition -.
    x -frozen VAE-> z;  z_t = a_t z + s_t e  --------------------------> U-Net -> e (or v = a_t e - s_t z)

LaVIT (ICLR 2024) trains its U-Net so for 20k steps, on the tokenizer's pictures and without captions. Everything
random is drawn from a generator seeded by (seed, step, rank), and the averaged weights are part of the checkpoint, so a
resumed run repeats the uninterrupted one exactly.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from lavit_tok.decode.conditioner import Conditioner
from lavit_tok.decode.pipeline import PixelDecoder
from lavit_tok.training.denoising import Noised, denoising_loss
from lavit_tok.training.ema import AveragedTraining
from lavit_tok.training.encoded_images import Encoded, EncodedSet, FrozenParts, load_unet
from lavit_tok.training.logging import log_image, step_generator

DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


class PixelDecoderTraining(AveragedTraining):
    """Trains a U-Net and the projection of its condition; tokenizer and VAE stay frozen.

    Args:
        tokenizer: directory or Hub id of the tokenizer whose codes are to be drawn, or "default".
        vae: directory of a diffusers AutoencoderKL, or its Hub id (owner/name or owner/name/subfolder).
        unet: config of a UNet2DConditionModel; in_channels, out_channels and cross_attention_dim follow from the rest.
        unet_from: directory or Hub id (owner/name/subfolder) of a diffusers U-Net to start from, instead of `unet`.
        sample_size: side of the latents that the saved decoder draws by default; the U-Net's own if not given.
        gradient_checkpointing: compute activations twice instead of keeping them; for large U-Nets.
        out: where the finished decoder is saved; None keeps checkpoints only.
        out_dtype: number format of the saved weights.
        style: "sd" conditions by cross-attention; "sdxl" also by a pooled vector and sizes.
        cross_dims: widths of the projections of the features, one for sd, two for sdxl.
        null_length: tokens of the learned null condition (sd); the number of patches needs no mask and is fastest.
        pooled_dim: width of the pooled vector (sdxl).
        pool_heads: attention heads of the pool (sdxl).
        spatial_channels: further input channels that lay the features out in space; 0 (LaVIT) for none.
        spatial_scale: cells of these channels per patch side.
        feature_norm: normalize each feature vector before projecting; LaVIT does not.
        prediction_type: what the U-Net predicts: the noise ("epsilon", LaVIT) or "v_prediction".
        noise_schedule: diffusers' name of the schedule of betas.
        zero_terminal_snr: rescale it so that the last step is pure noise; needs v_prediction.
        min_snr: weight of step t capped at this signal-to-noise ratio (Hang et al. 2023); 0 weighs all steps equally.
        drop: probability that a picture is trained with the null condition.
        mirror: probability that a picture is replaced by its mirror image.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up, before a cosine to zero.
        weight_decay: AdamW's, on matrices and kernels only.
        betas: AdamW's decay rates.
        ema_decay: greatest decay of the averaged weights, see averaged.py.
        sample_every: a sheet of originals and samples every so many steps; 0 for none.
        sample_count: pictures on that sheet.
        sample_steps: denoising steps of its samples.
        sample_guidance: their guidance scale.
        cache: encode all training pictures once before training, instead of at every step; the data module needs
            `cache` too and no augmentation of its own.
        channels_last: memory layout of the U-Net; faster on CPUs and on tensor cores.
        seed: seed of every random draw here.
    """

    def __init__(
        self,
        vae: str,
        tokenizer: str = "default",
        unet: dict[str, Any] | None = None,
        unet_from: str | None = None,
        sample_size: int | None = None,
        gradient_checkpointing: bool = False,
        out: str | None = None,
        out_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        style: Literal["sd", "sdxl"] = "sd",
        cross_dims: list[int] | tuple[int, ...] = (192,),
        null_length: int = 1,
        pooled_dim: int = 0,
        pool_heads: int = 1,
        spatial_channels: int = 0,
        spatial_scale: int = 1,
        feature_norm: bool = False,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        noise_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear",
        zero_terminal_snr: bool = False,
        min_snr: float = 0.0,
        drop: float = 0.1,
        flip: float = 0.0,
        lr: float = 1e-4,
        warmup_steps: int = 500,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        ema_decay: float = 0.9999,
        sample_every: int = 1000,
        sample_count: int = 8,
        sample_steps: int = 25,
        sample_guidance: float = 3.0,
        cache: bool = False,
        channels_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("drop", drop), ("flip", flip), ("ema_decay", ema_decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in 0..1, got {value}")
        if zero_terminal_snr and prediction_type != "v_prediction":
            raise ValueError(
                "zero_terminal_snr: expected prediction_type v_prediction: pure noise tells nothing about e"
            )
        self.save_hyperparameters()
        self.settings: Any = self.hparams
        self.parts = FrozenParts(tokenizer, vae)
        frozen = self.parts.tokenizer
        condition = Conditioner.for_tokenizer(
            frozen.config,
            frozen.quantizer.codebook,
            frozen.reconstructor,
            style=style,
            cross_dims=list(cross_dims),
            null_length=null_length,
            pooled_dim=pooled_dim,
            pool_heads=pool_heads,
            spatial_channels=spatial_channels,
            spatial_scale=spatial_scale,
            feature_norm=feature_norm,
        )
        self.conditioner = [
            condition
        ]  # in a list: its codebook and reconstructor are frozen and no part of this module
        self.projection = condition.projection.train()
        latent = self.parts.vae.config.latent_channels
        sizes = {
            "in_channels": latent + spatial_channels,
            "out_channels": latent,
            "cross_attention_dim": sum(cross_dims),
        }
        self.unet = load_unet(unet, unet_from, sizes)
        if sample_size is not None:
            self.unet.register_to_config(sample_size=sample_size)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule=noise_schedule,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=zero_terminal_snr,
            timestep_spacing="trailing" if zero_terminal_snr else "leading",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self.average_trained()
        self.encoded: EncodedSet | None = None
        self.shown: Tensor | None = None

    # The loss

    def diffusion_loss(
        self, encoded: Encoded, generator: torch.Generator, drop: float
    ) -> Float[Tensor, ""]:
        """Weighted mean square error of the prediction, at one step for each picture; see denoising.py."""
        noised = Noised.draw(encoded.latents, self.scheduler, generator)
        dropped = (torch.rand(len(noised.steps), generator=generator) < drop).to(
            noised.steps.device
        )
        condition = self.projection(encoded.features)
        if drop > 0:
            condition = condition.where(dropped, self.projection.unconditional(condition))
        factor = 2 ** (len(self.parts.vae.config.block_out_channels) - 1)
        return denoising_loss(
            self.unet, self.scheduler, noised, condition, factor, self.settings.min_snr
        )

    # Lightning's hooks

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        parts = int(self.trainer.accumulate_grad_batches)
        step = self.global_step * parts + batch_idx % parts
        generator = step_generator(self.settings.seed, step, self.global_rank, "cpu")
        images = batch["images"]
        flipped = torch.rand(len(images), generator=generator) < self.settings.flip
        if self.encoded is not None:
            encoded = self.encoded(batch["index"], flipped, self.device)
        else:
            flipped = flipped.to(images.device).view(-1, 1, 1, 1)
            encoded = self.parts(torch.where(flipped, images.flip(3), images))
        loss = self.diffusion_loss(encoded, generator, self.settings.drop)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same loss, without drops and with the same draws at every validation."""
        generator = step_generator(self.settings.seed, batch_idx, 2**31 + self.global_rank, "cpu")
        loss = self.diffusion_loss(self.parts(batch["images"]), generator, 0.0)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["images"]), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self.parts.to(self.device)
        super().on_validation_epoch_start()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.parts.to(self.device)
        sets = getattr(getattr(self.trainer, "datamodule", None), "sets", {})
        shown = sets.get("validation", sets.get("train"))
        if shown is not None and self.settings.sample_every:
            self.shown = torch.stack(
                [shown[i]["images"] for i in range(min(self.settings.sample_count, len(shown)))]
            )
        if self.settings.cache:
            self.encoded = self._encode_all(sets.get("train"))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        every, step = self.settings.sample_every, self.global_step
        last_part = (batch_idx + 1) % int(self.trainer.accumulate_grad_batches) == 0
        if every and last_part and step % every == 0 and self.trainer.is_global_zero:
            self.shown = (
                batch["images"][: self.settings.sample_count] if self.shown is None else self.shown
            )
            self._draw_sheet(self.shown)

    def on_fit_end(self) -> None:
        if self.settings.out is not None and self.trainer.is_global_zero:
            self.export(self.settings.out)

    # What comes out

    def decoder(self) -> PixelDecoder:
        """A decoder of the parameters as they are now; it shares them."""
        self.conditioner[0].to(self.device)
        decoder = PixelDecoder(
            self.conditioner[0], self.unet, self.parts.vae, copy.deepcopy(self.scheduler)
        )
        decoder.set_progress_bar_config(disable=True)
        return decoder

    def export(self, directory: str | Path) -> None:
        """Save a PixelDecoder of the averaged weights."""
        with self.averaged():
            decoder = copy.deepcopy(self.decoder())
        for part in (decoder.conditioner, decoder.unet, decoder.vae):
            nn.Module.to(part.cpu(), memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        decoder.save_pretrained(directory, dtype=DTYPES[self.settings.out_dtype])

    @torch.no_grad()
    def sample(self, images: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Pictures drawn from these pictures' codes by the averaged weights, 0..1, with the same noise each time."""
        s, training, codes = self.settings, self.unet.training, self.parts.codes(images)
        generators = [step_generator(s.seed, i, 2**32, "cpu") for i in range(len(images))]
        height, width = images.shape[-2:]
        bf16 = torch.autocast(
            self.device.type, torch.bfloat16, enabled="bf16" in str(self.trainer.precision)
        )
        self.unet.eval()
        with self.averaged(), bf16:
            decoder: Any = self.decoder()
            options: dict[str, Any] = {"height": height, "width": width, "output_type": "pt"}
            drawn = decoder(codes, s.sample_steps, s.sample_guidance, generators, **options).images
        self.unet.train(training)
        return drawn.float().cpu()

    def _draw_sheet(self, images: UInt8[Tensor, "batch 3 h w"]) -> None:
        drawn, original = self.sample(images.to(self.device)), images.cpu().float() / 255
        error = (drawn - original).square().mean((1, 2, 3)).clamp(min=1e-8)
        self.log("sample/psnr", -10 * error.log10().mean(), rank_zero_only=True)
        sheet = torch.cat([torch.cat(list(row), 2) for row in (original, drawn)], 1)
        pixels = (sheet * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        log_image(self, "samples", Image.fromarray(pixels))

    def _encode_all(self, images: Any) -> EncodedSet:
        if images is None or getattr(images, "pixels", None) is None:
            raise ValueError(
                "cache: expected a data module with cache=True, whose pictures lie decoded in memory"
            )
        if images.augment.flip or images.augment.cache_size != images.augment.size:
            raise ValueError(
                "cache: expected no augmentation in the data module (use `mirror` here), got flip or crops"
            )

        def report(done: int, total: int) -> None:
            if done == total or done % 2560 == 0:
                print(f"encoded {done} of {total} training pictures", flush=True)

        folder = Path(self.trainer.default_root_dir) / "cache"
        mine = folder if self.trainer.is_global_zero else None
        flipped = self.settings.flip > 0
        return EncodedSet(images.pixels, images.index, self.parts, flipped, mine, report=report)

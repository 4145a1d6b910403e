"""Training of Emu's image decoder: a U-Net learns to denoise images, given an LM's vectors.

    caption -frozen LM-> "caption <img>" -> generated vectors, of "" at 0.1 -VectorDecoder-> c -.
    image   -frozen VAE-> z;  z_t = a_t z + s_t e  ------------------------------------> U-Net -> e

Emu (section 2.3) trains on vectors that the model generates, not on those of the image itself,
since the decoder later gets generated ones. All random numbers come from a generator seeded by
(seed, step, rank), and the averaged weights are part of the checkpoint, so a resumed run repeats
the uninterrupted one exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lavit_lm.multimodal import MultimodalLM
from lavit_lm.objectives.emu.image_decoder import VectorDecoder
from lavit_lm.objectives.records import ImageVectors
from lavit_lm.training.generated_vectors import KEPT, GeneratedVectors, require_vectors
from lavit_lm.vision.vector_reader import VectorReader, VectorReaderConfig
from lavit_tok import PixelDecoder
from lavit_tok.training.decoder_training import DTYPES, WeightsDtype
from lavit_tok.training.denoising import DenoisingConfig, NoisyLatents, denoising_loss, vae_latents
from lavit_tok.training.ema import EMATraining
from lavit_tok.training.frozen import Frozen
from lavit_tok.training.logging import SampleConfig, log_image, step_generator
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class ReaderConfig:
    """The transformer that reads the generated vectors."""

    depth: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    hidden_size: int = 192
    """Width of the blocks."""


@dataclass(frozen=True)
class PromptSampleConfig(SampleConfig):
    """Logged samples of the decoder in training; `count` limits the prompts."""

    every: int = 0
    """Steps between two sheets of samples; 0 for none."""
    prompts: tuple[str, ...] = ()
    """Prompts of the samples."""


class EmuDecoderTraining(EMATraining):
    """Trains a reader, a PixelDecoder's projection and its U-Net; LM and VAE are frozen.

    Args:
        model: directory or Hub id of a MultimodalLM that generates vectors.
        pixel_decoder: "selected", directory or Hub id of the PixelDecoder to start from.
        reader: the transformer that reads the generated vectors.
        train_unet: train the U-Net too; else only the modules before it.
        fresh_keys: reinitialize the U-Net's key and value projections of the condition, as in Emu.
        cache_vectors: keep the generated vectors of each caption in memory as float16, instead of
            generating them again in the next epoch.
        loss: the loss.
        optimizer: AdamW.
        schedule: learning-rate schedule.
        ema_decay: largest decay of the averaged weights, see EMATraining.
        samples: logged samples.
        out: where the trained decoder is saved; None keeps checkpoints only.
        out_dtype: number format of the saved weights.
        seed: seed of all random numbers of the training.

    Raises:
        ValueError: a language model that generates codes, a pixel decoder without a diffusion
            model, or new projections that are not trained.
    """

    def __init__(
        self,
        model: str,
        pixel_decoder: str = "selected",
        reader: ReaderConfig = ReaderConfig(),
        train_unet: bool = True,
        fresh_keys: bool = True,
        cache_vectors: bool = False,
        loss: DenoisingConfig = DenoisingConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4),
        schedule: ScheduleConfig = ScheduleConfig(),
        ema_decay: float = 0.9999,
        samples: PromptSampleConfig = PromptSampleConfig(),
        out: str | None = None,
        out_dtype: WeightsDtype = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if fresh_keys and not train_unet:
            raise ValueError(
                "fresh_keys: expected train_unet, as new key and value projections must be trained"
            )
        self.save_arguments()
        self.loss, self.samples = loss, samples
        self.optimizer_config, self.schedule_config = optimizer, schedule
        self.out, self.out_dtype, self.seed = out, out_dtype, seed
        self.frozen_lm = Frozen(MultimodalLM.from_pretrained(model, decoder=None))
        pixels = PixelDecoder.from_pretrained(pixel_decoder)
        if pixels.unet is None:
            raise ValueError(
                f"pixel_decoder: expected one with a diffusion model, such as 'selected', got "
                f"{pixel_decoder!r}"
            )
        lm = self.lm
        self.vectors = GeneratedVectors(lm, KEPT if cache_vectors else 0)
        n = require_vectors(lm, model)
        c, width = pixels.conditioner.config, lm.model.causal.config.get_text_config().hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = VectorReaderConfig(width, n, c.width, c.patches, **asdict(reader))
            self.reader = VectorReader(sizes)
            if fresh_keys:
                renew_keys(pixels.unet)
        self.projection = pixels.conditioner.projection.requires_grad_(True).train()
        if self.projection.null is not None:
            # unused: the condition of an empty prompt takes its place
            self.projection.null.requires_grad_(False)
        pixels.unet.requires_grad_(train_unet)
        pixels.vae.requires_grad_(False)
        if train_unet:
            self.unet = pixels.unet.train()
        self.decoder = VectorDecoder(self.reader, pixels)  # no nn.Module: not registered twice
        self.start_average(ema_decay)
        self.null: Tensor | None = None

    @property
    def lm(self) -> MultimodalLM:
        """The frozen language model."""
        return self.frozen_lm.module

    # The loss

    def measure(self, captions: Sequence[str]) -> None:
        """Set the reader's normalization from the vectors of these captions, of all processes."""
        vectors: Any = self.vectors(captions)
        if self.num_processes > 1:
            vectors = self.all_gather(vectors).flatten(0, 1)
        self.reader.measure(vectors)

    def diffusion_loss(
        self,
        images: UInt8[Tensor, "b 3 h w"],
        captions: Sequence[str],
        generator: torch.Generator,
        condition_drop: float,
    ) -> Float[Tensor, ""]:
        """Weighted mean squared error of the prediction, at one step per image."""
        pixels = self.decoder.pixels
        noisy = NoisyLatents.draw(vae_latents(pixels.vae, images), pixels.scheduler, generator)
        dropped = noisy.draw_dropped(condition_drop, generator)
        if self.null is None:
            self.null = self.vectors([""])
        vectors = torch.where(dropped[:, None, None], self.null, self.vectors(captions))
        condition = self.decoder.conditioning(vectors)
        return denoising_loss(
            pixels.unet,
            pixels.scheduler,
            noisy,
            condition,
            pixels.vae_scale_factor,
            self.loss.min_snr,
        )

    # Lightning hooks

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        step, captions = self.micro_step(batch_idx), _captions(batch)
        generator = step_generator(self.seed, step, self.global_rank, "cpu")
        if step == 0:
            self.measure(captions)
        loss = self.diffusion_loss(batch["images"], captions, generator, self.loss.condition_drop)
        self.require_finite(loss)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(captions))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same loss with every condition, and with the same noise at every validation."""
        captions = _captions(batch)
        generator = step_generator(self.seed, batch_idx, 2**31 + self.global_rank, "cpu")
        loss = self.diffusion_loss(batch["images"], captions, generator, 0.0)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(captions), sync_dist=True)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._to_device()

    def on_validation_epoch_start(self) -> None:
        self._to_device()
        super().on_validation_epoch_start()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        prompts = list(self.samples.prompts[: self.samples.count])
        due = self.completes_step(batch_idx) and self.samples.due(self.global_step)
        if prompts and due and self.trainer.is_global_zero:
            log_image(self, "samples", self.sample(prompts))

    # The trained decoder

    def export(self, directory: str | Path) -> None:
        """Save an image decoder of the averaged weights."""
        with self.averaged():
            decoder = copy.deepcopy(self.decoder).to("cpu")
        decoder.save_pretrained(directory, DTYPES[self.out_dtype])

    @torch.no_grad()
    def sample(self, prompts: list[str]) -> Image.Image:
        """Images of prompts side by side, by the averaged weights, always with the same noise."""
        s, unet = self.samples, self.decoder.pixels.unet
        training = unet.training
        generators = [step_generator(self.seed, i, 2**32, "cpu") for i in range(len(prompts))]
        unet.eval()
        with self.averaged():
            outputs = ImageVectors(self.vectors(prompts), self.vectors([""]))
            images = self.decoder.decode(outputs, generators, s.steps, s.guidance, output_type="pt")
        unet.train(training)
        pixels = torch.cat(list(images.float().cpu()), 2).mul(255).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def _to_device(self) -> None:
        self.lm.model.to(self.device)
        self.decoder.to(self.device)


def renew_keys(unet: Any) -> int:
    """Reinitialize key and value projections of a U-Net's cross-attentions; returns how many."""
    projections = [
        projection
        for name, layer in unet.named_modules()
        if name.endswith("attn2")  # diffusers' name for cross-attention
        for projection in (layer.to_k, layer.to_v)
    ]
    for projection in projections:
        projection.reset_parameters()
    return len(projections)


def _captions(batch: dict[str, Any]) -> list[str]:
    if "captions" not in batch:
        raise ValueError(
            "the decoder is trained on vectors generated from captions, and the data have none: "
            "set data.caption_column"
        )
    return [text or "" for text in batch["captions"]]

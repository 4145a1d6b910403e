"""Train the sample decoder of a tokenizer of nested codes: plausible images at every budget.

    images -frozen tokenizer-> k exact codes, k log-uniform in 1..n for every image
           -reconstructor of the PixelDecoder, frozen-> features, colors
           -SampleDecoder, with one or two draws of noise-> one or two images

    loss = energy score of the images with the original (energy_score.py)
           + adversarial_weight * loss of a discriminator of maps (discriminator.py)

The energy score keeps images near the original and, if `repulsion` is above 0, two draws apart; the
discriminator makes them look like images. Both read the maps of the tokenizer's own frozen encoder.
Without repulsion one draw is enough, and the score is an absolute error of maps and pixels. The
network reads a random part of the images, enlarged or reduced at random, without which the decoder
learns patterns of pixels that look like texture to this network at this size, and to nobody else.
The decoder starts as the mean decoder beside it, which stays. Random numbers come from (seed, step,
rank), so that a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.decode.pipeline import PixelDecoder
from lavit_tok.decode.sample_decoder import SampleDecoder
from lavit_tok.encode.efficientnet import JoinedEncoder
from lavit_tok.training.decoder_training import DTYPES, WeightsDtype
from lavit_tok.training.discriminator import FeatureDiscriminator
from lavit_tok.training.energy_score import FeatureMaps, energy_score, neighborhoods
from lavit_tok.training.frozen import Frozen
from lavit_tok.training.logging import step_generator
from lavit_tok.training.mean_decoder_training import NestedDecoderTraining, psnr
from lavit_tok.training.nested_training import log_uniform
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig

VIEWS = (0.6, 1.0)
"""Sides of the parts of images that the network reads, as ratios; resized to VIEW_SIDE."""
VIEW_SIDE = 0.875
SCALED_ON = 64
"""Training images whose maps are scaled to unit deviation."""


class SampleDecoderTraining(NestedDecoderTraining):
    """Trains a SampleDecoder; the tokenizer and the rest of the PixelDecoder are frozen.

    Args:
        tokenizer: "default", directory or Hub id of the tokenizer whose codes are decoded; its
            encoder is an EfficientNet-Lite, whose maps the loss compares.
        decoder: "default", directory or Hub id of a PixelDecoder of its codes with a mean decoder.
        layers: residual blocks on each grid.
        noise_channels: of the noise.
        stages: of the network whose maps the loss compares, see FeatureMaps.
        repulsion: weight of the distance of two draws in the energy score; 1 is the proper score,
            0 the absolute error of one draw.
        adversarial_weight: of the discriminator's loss; 0 trains without discriminator.
        optimizer: AdamW.
        schedule: learning-rate schedule.
        ema_decay: largest decay of the averaged weights, which are exported.
        out: where the PixelDecoder is saved, with both decoders; None keeps checkpoints only.
        out_dtype: number format of the saved weights.
        seed: seed of all random numbers of the training.

    Raises:
        ValueError: a tokenizer without nested codes, colors or EfficientNet-Lite; a decoder of
            other codes or without mean decoder.
    """

    def __init__(
        self,
        tokenizer: str,
        decoder: str,
        layers: int = 1,
        noise_channels: int = 8,
        stages: tuple[int, ...] = (0, 1, 2, 3, 5),
        repulsion: float = 1.0,
        adversarial_weight: float = 1.0,
        optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4),
        schedule: ScheduleConfig = ScheduleConfig(),
        ema_decay: float = 0.998,
        out: str | None = None,
        out_dtype: WeightsDtype = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, seed)
        self.save_arguments()
        self.optimizer_config, self.schedule_config = optimizer, schedule
        self.out, self.out_dtype, self.stages = out, out_dtype, stages
        self.repulsion, self.adversarial_weight = repulsion, adversarial_weight
        encoder: Any = self.tokenizer.encoder
        if not isinstance(encoder, JoinedEncoder):
            raise ValueError(
                f"tokenizer: expected the encoder {JoinedEncoder.__name__}, "
                f"got {type(encoder).__name__}"
            )
        if not stages or not set(stages) <= set(range(len(encoder.network.stages) + 1)):
            raise ValueError(
                f"stages: expected some of 0..{len(encoder.network.stages)}, got {stages}"
            )
        pipeline = self.load_decoder(decoder)
        self._pipeline: Frozen[Any] = Frozen(pipeline)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.decoder = SampleDecoder.from_mean_decoder(
                pipeline.mean_decoder, layers, noise_channels
            )
            if adversarial_weight:
                channels = [encoder.network.channels[stage] for stage in stages]
                self.discriminator = FeatureDiscriminator(channels)
        self.decoder.requires_grad_(True).train()
        self.maps: FeatureMaps | None = None
        self.start_average(ema_decay)

    # Lightning hooks

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._pipeline.to(self.device)
        images = self.trainer.datamodule.sets["train"]
        count = min(SCALED_ON, len(images))
        some = torch.stack([images[i]["images"] for i in range(count)]).to(self.device)
        encoder: Any = self.tokenizer.encoder
        self.maps = FeatureMaps(encoder.network, self.stages, self.pixels(some))

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        generator = step_generator(self.seed, self.global_step, self.global_rank, self.device)
        images, patches = batch["images"], self.tokenizer.config.num_patches
        counts = log_uniform(len(images), patches, generator)
        joined = self.condition(images, counts)
        loss, parts = self.loss(joined, self.pixels(images), generator)
        self.require_finite(loss)
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """The score and the PSNR of a draw over budgets, with the same noise each time."""
        images, patches = batch["images"], self.tokenizer.config.num_patches
        pixels, count = self.pixels(images), 1
        true = self.compared(pixels)
        while count <= patches:
            generator = step_generator(self.seed, batch_index, 2**31 + count, self.device)
            joined = self.condition(images, torch.full((len(images),), count, device=self.device))
            drawn = self.draw(joined, generator)
            error = (drawn[: len(images)].clamp(-1, 1) - pixels).square().mean((1, 2, 3))
            score = energy_score(true, self.compared(drawn), self.repulsion)
            found = {"score": score, "psnr": psnr(error)}
            for name, value in found.items():
                self.log(f"val/{name}_{count}", value, batch_size=len(images), sync_dist=True)
            count *= 4

    # The steps of a training step

    @torch.no_grad()
    def condition(self, images: Tensor, counts: Tensor) -> Float[Tensor, "batch patches joined"]:
        """What the decoder reads: features and colors from the first `counts` codes."""
        codes = self.codes(self.features(images), counts)
        joined: Tensor = self._pipeline.module.conditioner.features(codes)
        return joined.float()

    def draw(
        self, joined: Float[Tensor, "batch patches joined"], generator: torch.Generator
    ) -> Float[Tensor, "draws 3 h w"]:
        """An image for every element of the batch, about -1..1; with repulsion another for each."""
        times = 2 if self.repulsion else 1
        shape = self.decoder.noise_shape(times * len(joined))
        noise = torch.randn(shape, generator=generator, device=joined.device)
        return self.decoder(joined.repeat(times, 1, 1), noise).float()

    def compared(
        self, images: Float[Tensor, "batch 3 h w"], view: tuple[int, int, int] | None = None
    ) -> list[Tensor]:
        """What the energy score compares: maps of the network, then neighborhoods of pixels.

        Args:
            images: about -1..1.
            view: top, left and side of the part that the network reads, resized; None is all.
        """
        assert self.maps is not None
        part = images
        if view is not None:
            top, left, side = view
            size = round(images.shape[-1] * VIEW_SIDE)
            part = F.interpolate(
                images[..., top : top + side, left : left + side],
                (size, size),
                mode="bilinear",
                antialias=True,
            )
        return self.maps(part) + neighborhoods(images)

    def loss(
        self, joined: Tensor, pixels: Float[Tensor, "batch 3 h w"], generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss and its parts."""
        images = self.draw(joined, generator)
        view = random_view(pixels.shape[-1], generator)
        drawn = self.compared(images, view)
        with torch.no_grad():
            true = self.compared(pixels, view)
        parts = {"score": energy_score(true, drawn, self.repulsion)}
        if not self.adversarial_weight:
            return parts["score"], parts
        count = len(self.stages)
        losses = self.discriminator.losses(true[:count], drawn[:count])
        parts["adversarial"], parts["discriminator"] = losses
        total = parts["score"] + self.adversarial_weight * losses[0] + losses[1]
        return total, parts

    def export(self, directory: str | Path) -> None:
        """Save the PixelDecoder, with the averaged weights."""
        with self.averaged():
            decoder = copy.deepcopy(self.decoder).cpu().requires_grad_(False).eval()
        known = self._pipeline.module.to("cpu")
        pipeline = PixelDecoder(
            known.conditioner, mean_decoder=known.mean_decoder, sample_decoder=decoder
        )
        pipeline.save_pretrained(directory, dtype=DTYPES[self.out_dtype])


def random_view(size: int, generator: torch.Generator) -> tuple[int, int, int]:
    """Top, left and side of a random square of images of `size` pixels."""

    def integer(least: int, most: int) -> int:
        drawn = torch.randint(least, most + 1, (), generator=generator, device=generator.device)
        return int(drawn)

    side = integer(*(round(ratio * size) for ratio in VIEWS))
    return integer(0, size - side), integer(0, size - side), side

"""Train the mean decoder of a tokenizer of nested codes: the expected image at every budget.

    images -frozen tokenizer-> k exact codes, k log-uniform in 1..n for every image
           -a copy of the tokenizer's reconstructor-> features, colors -MeanDecoder-> pixels

    loss = mean squared error of pixels, divided by that of the colors alone

Without the division, images with one code would dominate the loss. The copy of the reconstructor,
which the PixelDecoder holds anyway, is trained with the decoder: it no longer has to reconstruct
the encoder's features. Codes do not change. Random numbers come from (seed, step, rank), so that a
resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lavit_tok.codes import VisualCodes, first_ranks
from lavit_tok.decode.conditioner import Conditioner
from lavit_tok.decode.mean_decoder import MeanDecoder
from lavit_tok.decode.pipeline import PixelDecoder
from lavit_tok.tokenizer import VisualTokenizer
from lavit_tok.training.decoder_training import DTYPES, WeightsDtype
from lavit_tok.training.ema import EMATraining
from lavit_tok.training.feature_cache import FeatureCache
from lavit_tok.training.frozen import Frozen
from lavit_tok.training.logging import step_generator
from lavit_tok.training.nested_training import log_uniform
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig


class NestedDecoderTraining(EMATraining):
    """Training of a decoder of nested codes; the tokenizer is frozen. A subclass has `export`.

    Args:
        tokenizer: "default", directory or Hub id of the tokenizer whose codes are decoded.
        seed: seed of all random numbers of the training.

    Raises:
        ValueError: a tokenizer without nested codes or without colors.
    """

    kind = "pixel decoder"

    def __init__(self, tokenizer: str, seed: int) -> None:
        super().__init__()
        self.seed, self.tokenizer_name = seed, tokenizer
        frozen = VisualTokenizer.from_pretrained(tokenizer)
        c = frozen.config
        if not frozen.nested or not c.color_cells:
            raise ValueError(
                "tokenizer: expected nested codes and color_cells of at least 1, got sequence "
                f"{c.sequence!r} and color_cells {c.color_cells}"
            )
        self._tokenizer = Frozen(frozen)

    @property
    def tokenizer(self) -> VisualTokenizer:
        """The frozen tokenizer."""
        return self._tokenizer.module

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._tokenizer.to(self.device)

    def next_command(self) -> str:
        """Shards are made next."""
        return self.shards_command(self.tokenizer_name)

    def load_decoder(self, name: str) -> Any:
        """A PixelDecoder with a mean decoder, of the tokenizer's codes.

        Raises:
            ValueError: a pixel decoder without a mean decoder, or of other codes.
        """
        pipeline: Any = PixelDecoder.from_pretrained(name)
        if pipeline.mean_decoder is None:
            raise ValueError(f"{name}: expected a pixel decoder with a mean decoder")
        if pipeline.conditioner.fingerprint() != self.tokenizer.fingerprint():
            raise ValueError(f"{name}: expected a pixel decoder of this tokenizer's codes")
        return pipeline

    @torch.no_grad()
    def features(
        self, images: UInt8[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch patches width"]:
        """The frozen encoder's features."""
        return self.tokenizer.features(self.tokenizer.image_processor.normalize(images))

    @torch.no_grad()
    def codes(
        self, features: Float[Tensor, "batch patches width"], counts: Int64[Tensor, " batch"]
    ) -> VisualCodes:
        """The first `counts` exact codes of every image."""
        return self.tokenizer.encode_kept(features, first_ranks(counts, features.shape[1]))

    @staticmethod
    def pixels(images: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """-1..1."""
        return images.float() / 127.5 - 1


class MeanDecoderTraining(NestedDecoderTraining):
    """Trains a MeanDecoder and the reconstructor before it; the tokenizer is frozen.

    Args:
        tokenizer: "default", directory or Hub id of the tokenizer whose codes are decoded.
        channels: of the decoder's blocks, see MeanDecoder.
        layers: residual blocks on each grid.
        start_from: "default", directory or Hub id of a PixelDecoder of the tokenizer's codes to
            train on: its reconstructor, and its mean decoder in place of the two above.
        optimizer: AdamW.
        schedule: learning-rate schedule.
        ema_decay: largest decay of the averaged weights, which are exported.
        keep_features: whether the features of every image are kept in memory (FeatureCache).
        out: where the PixelDecoder is saved; None keeps checkpoints only.
        out_dtype: number format of the saved weights.
        seed: seed of all random numbers of the training.

    Raises:
        ValueError: a tokenizer without nested codes or without colors; a decoder to start from that
            is of other codes or has no mean decoder.
    """

    def __init__(
        self,
        tokenizer: str,
        channels: tuple[int, ...] = (128, 64, 32),
        layers: int = 1,
        start_from: str | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3),
        schedule: ScheduleConfig = ScheduleConfig(),
        ema_decay: float = 0.998,
        keep_features: bool = False,
        out: str | None = None,
        out_dtype: WeightsDtype = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, seed)
        self.save_arguments()
        self.optimizer_config, self.schedule_config = optimizer, schedule
        self.out, self.out_dtype = out, out_dtype
        frozen, c = self.tokenizer, self.tokenizer.config
        start = None if start_from is None else self.load_decoder(start_from)
        reconstructor = frozen.reconstructor if start is None else start.conditioner.reconstructor
        self.conditioner = Conditioner.for_tokenizer(
            c, frozen.quantizer.codebook, reconstructor, cross_dims=()
        )
        self.conditioner.requires_grad_(False)
        self.conditioner.reconstructor.requires_grad_(True).train()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.decoder = MeanDecoder(c.width, c.num_patches, c.color_cells, channels, layers)
        if start is not None:
            self.decoder = start.mean_decoder
        if self.decoder.image_size != c.image_size:
            raise ValueError(
                f"channels: expected {int(math.log2(c.patch_size))} numbers for patches of "
                f"{c.patch_size} pixels, got {channels}"
            )
        self.decoder.requires_grad_(True).train()
        self.encode = FeatureCache(self.features) if keep_features else self.features
        self.start_average(ema_decay)

    # Lightning hooks

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        generator = step_generator(self.seed, self.global_step, self.global_rank, self.device)
        images, patches = batch["images"], self.tokenizer.config.num_patches
        counts = log_uniform(len(images), patches, generator)
        joined = self.reconstruct(self.encode(images), counts)
        pixels = self.pixels(images)
        error = (self.decoder(joined).float() - pixels).square().mean((1, 2, 3))
        plain = (self.decoder.enlarged(joined.detach()) - pixels).square().mean((1, 2, 3))
        loss = (error / plain.clamp(min=1e-3)).mean()
        self.log_dict({"train/loss": loss.detach(), "train/psnr": psnr(error.detach())})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """PSNR over budgets, of the decoder and of the colors alone."""
        images, patches = batch["images"], self.tokenizer.config.num_patches
        features, pixels = self.encode(images), self.pixels(images)
        count = 1
        while count <= patches:
            lengths = torch.full((len(images),), count, device=self.device)
            joined = self.reconstruct(features, lengths)
            decoded = {"psnr": self.decoder(joined), "colors": self.decoder.enlarged(joined)}
            for name, output in decoded.items():
                error = (output.clamp(-1, 1) - pixels).square().mean((1, 2, 3))
                self.log(f"val/{name}_{count}", psnr(error), batch_size=len(images), sync_dist=True)
            count *= 4

    # Parts of a training step

    def reconstruct(
        self, features: Float[Tensor, "batch patches width"], counts: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch patches joined"]:
        """The decoder's inputs: features and colors, from the first `counts` codes."""
        return self.conditioner.features(self.codes(features, counts)).float()

    def export(self, directory: str | Path) -> None:
        """Save a PixelDecoder of the averaged weights."""
        with self.averaged():
            decoder, conditioner = (
                copy.deepcopy(part).cpu().requires_grad_(False).eval()
                for part in (self.decoder, self.conditioner)
            )
        pipeline = PixelDecoder(conditioner, mean_decoder=decoder)
        pipeline.save_pretrained(directory, dtype=DTYPES[self.out_dtype])


def psnr(error: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over images of the PSNR, from squared errors of pixels in -1..1."""
    return -10 * (error / 4).clamp(min=1e-7).log10().mean()

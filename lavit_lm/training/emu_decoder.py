"""Training of a decoder of vectors: a U-Net learns to denoise a picture, given what a language model says of its words.

    caption -frozen LM-> "caption <|img|>" -> vectors it says, those of "" at 0.1 -VectorDecoder-> condition -.
    picture -frozen VAE-> z;  z_t = a_t z + s_t e  -----------------------------------------------------> U-Net -> e

Emu (section 2.3) trains on vectors that the model *said*, not on those it reads of the picture, since it is these that
will be drawn. Everything random is drawn from a generator seeded by (seed, step, rank), and the averaged weights are
part of the checkpoint, so a resumed run repeats the uninterrupted one exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lavit_lm.multimodal import MultimodalLM
from lavit_lm.objectives.emu.image_decoder import VectorDecoder, VectorReader, VectorReaderConfig
from lavit_lm.objectives.records import ImageVectors
from lavit_tok import PixelDecoder
from lavit_tok.training.denoising import Noised, denoising_loss, vae_latents
from lavit_tok.training.ema import AveragedTraining
from lavit_tok.training.logging import log_image, step_generator


class EmuDecoderTraining(AveragedTraining):
    """Trains a reader, a PixelDecoder's projection, and its U-Net; language model and VAE stay frozen.

    Args:
        model: directory or Hub id of a MultimodalLM that says vectors.
        pixel_decoder: "default", directory or Hub id of the PixelDecoder to start from.
        out: where the finished decoder is saved; None keeps checkpoints only.
        out_dtype: number format of the saved weights.
        depth, heads, hidden_size: blocks, heads and width of the reader.
        train_unet: train the U-Net too; else only what stands before it.
        fresh_keys: draw the U-Net's key and value projections of the condition anew, as Emu does.
        drop: probability that a caption's vectors are replaced by those of an empty prompt.
        min_snr: see lavit_tok.denoising_loss.
        remember: keep what the model says of each caption in memory, as 16-bit numbers, instead of asking it anew.
        lr: peak learning rate.
        warmup_steps: linear warm-up, before a cosine to 0.
        weight_decay: AdamW's, on matrices and kernels only.
        betas: AdamW's.
        ema_decay: greatest decay of the averaged weights, see AveragedTraining.
        samples: prompts that are drawn every `sample_every` steps.
        sample_every: 0 for never.
        sample_steps, sample_guidance: of these drawings.
        seed: of every random draw here.

    Raises:
        ValueError: a language model that says codes, a probability outside 0..1, or new keys that nobody trains.
    """

    def __init__(
        self,
        model: str,
        pixel_decoder: str = "default",
        out: str | None = None,
        out_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        depth: int = 2,
        heads: int = 4,
        hidden_size: int = 192,
        train_unet: bool = True,
        fresh_keys: bool = True,
        drop: float = 0.1,
        min_snr: float = 0.0,
        remember: bool = False,
        lr: float = 1e-4,
        warmup_steps: int = 100,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        ema_decay: float = 0.9999,
        samples: Sequence[str] = (),
        sample_every: int = 0,
        sample_steps: int = 25,
        sample_guidance: float = 3.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("drop", drop), ("ema_decay", ema_decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in 0..1, got {value}")
        if fresh_keys and not train_unet:
            raise ValueError(
                "fresh_keys: new key and value projections must be trained, and train_unet is false"
            )
        self.save_hyperparameters()
        self.settings: Any = self.hparams
        # In lists: frozen, neither saved nor moved by Lightning.
        self._lm = [MultimodalLM.from_pretrained(model, decoder=None)]
        self._pixels = [PixelDecoder.from_pretrained(pixel_decoder)]
        if self.lm.objective.image_output.kind != "vectors":
            raise ValueError(
                f"model: expected one that says vectors, got {model}, which says codes ({self._named})"
            )
        pixels, lm = self._pixels[0], self.lm
        c, width = pixels.conditioner.config, lm.model.causal.config.get_text_config().hidden_size
        n = lm.objective.image_output.limits(lm.visual_tokenizer.config.num_patches)[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reader = VectorReader(
                VectorReaderConfig(width, n, c.width, c.patches, depth, heads, hidden_size)
            )
            if fresh_keys:
                renew_keys(pixels.unet)
        self.projection = pixels.conditioner.projection.requires_grad_(True).train()
        if self.projection.null is not None:
            self.projection.null.requires_grad_(
                False
            )  # in its place are the vectors of an empty prompt
        pixels.unet.requires_grad_(train_unet)
        pixels.vae.requires_grad_(False)
        if train_unet:
            self.unet = pixels.unet.train()
        self.drawn = VectorDecoder(self.reader, pixels)
        self.average_trained()
        self.said: dict[str, Tensor] = {}
        self.null: Tensor | None = None

    @property
    def lm(self) -> MultimodalLM:
        """The frozen language model."""
        return self._lm[0]

    @property
    def _named(self) -> str:
        return self.lm.objective.name

    @property
    def _processes(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    # The loss

    def vectors(self, captions: Sequence[str]) -> Float[Tensor, "b n d"]:
        """What the language model says of captions."""
        wanted = list(dict.fromkeys(text for text in captions if text not in self.said))
        said = dict(self.said)
        if wanted:
            with torch.autocast(
                self.device.type, enabled=False
            ):  # as it will say them when they are drawn
                new = self.lm.generate_vectors_batch(
                    [text if text.strip() else [] for text in wanted]
                )
            said |= dict(zip(wanted, new.half() if self.settings.remember else new, strict=True))
        if self.settings.remember:
            self.said = said
        return torch.stack(
            [said[text].float() for text in captions]
        )  # autocast cannot stack float16

    def measure(self, captions: Sequence[str]) -> None:
        """Tell the reader how far apart lies what the model says of these captions, on all processes together."""
        said: Any = self.vectors(captions)
        self.reader.measure(said if self._processes == 1 else self.all_gather(said).flatten(0, 1))

    def diffusion_loss(
        self,
        images: UInt8[Tensor, "b 3 h w"],
        captions: Sequence[str],
        generator: torch.Generator,
        drop: float,
    ) -> Float[Tensor, ""]:
        """Of one step for each picture; all chance is the generator's, which is on the CPU."""
        pixels = self.drawn.pixels
        noised = Noised.draw(vae_latents(pixels.vae, images), pixels.scheduler, generator)
        dropped = (torch.rand(len(images), generator=generator) < drop).to(images.device)
        if self.null is None:
            self.null = self.vectors([""])
        given = torch.where(dropped[:, None, None], self.null, self.vectors(captions))
        condition, factor = self.drawn.conditioning(given), pixels.vae_scale_factor
        return denoising_loss(
            pixels.unet, pixels.scheduler, noised, condition, factor, self.settings.min_snr
        )

    # Lightning's hooks

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        parts = int(self.trainer.accumulate_grad_batches)
        step = self.global_step * parts + batch_idx % parts
        generator, captions = (
            step_generator(self.settings.seed, step, self.global_rank, "cpu"),
            _captions(batch),
        )
        if step == 0:
            self.measure(captions)
        loss = self.diffusion_loss(batch["images"], captions, generator, self.settings.drop)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"step {self.global_step}: the loss is {float(loss)}; stopped before it spoils the weights"
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["images"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same loss, without drops and with the same draws at every validation."""
        generator = step_generator(self.settings.seed, batch_idx, 2**31 + self.global_rank, "cpu")
        loss = self.diffusion_loss(batch["images"], _captions(batch), generator, 0.0)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["images"]), sync_dist=True)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._to_device()

    def on_validation_epoch_start(self) -> None:
        self._to_device()
        super().on_validation_epoch_start()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        s, step = self.settings, self.global_step
        last_part = (batch_idx + 1) % int(self.trainer.accumulate_grad_batches) == 0
        if (
            s.samples
            and s.sample_every
            and last_part
            and step % s.sample_every == 0
            and self.trainer.is_global_zero
        ):
            log_image(self, "samples", self.sample(list(s.samples)))

    def on_fit_end(self) -> None:
        if self.settings.out is not None and self.trainer.is_global_zero:
            dtype = (
                None
                if self.settings.out_dtype == "float32"
                else getattr(torch, self.settings.out_dtype)
            )
            with self.averaged():
                copy.deepcopy(self.drawn).to("cpu").save_pretrained(self.settings.out, dtype)

    # What comes out

    @torch.no_grad()
    def sample(self, prompts: list[str]) -> Image.Image:
        """Pictures of prompts side by side, by the averaged weights, with the same noise each time."""
        s, unet = self.settings, self.drawn.pixels.unet
        training, generators = (
            unet.training,
            [step_generator(s.seed, i, 2**32, "cpu") for i in range(len(prompts))],
        )
        unet.eval()
        with self.averaged():
            outputs = ImageVectors(self.vectors(prompts), self.vectors([""]))
            options = generators, s.sample_steps, s.sample_guidance
            drawn = self.drawn.decode(outputs, *options, output_type="pt")
        unet.train(training)
        pixels = torch.cat(list(drawn.float().cpu()), 2).mul(255).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def _to_device(self) -> None:
        self.lm.model.to(self.device)
        self.drawn.to(self.device)


def renew_keys(unet: Any) -> int:
    """Draw the key and value projections of a U-Net's cross-attentions anew, from torch's own generator; how many."""
    renewed = [
        projection
        for name, part in unet.named_modules()
        if name.endswith("attn2")
        for projection in (part.to_k, part.to_v)
    ]
    for projection in renewed:
        projection.reset_parameters()
    return len(renewed)


def _captions(batch: dict[str, Any]) -> list[str]:
    """Raises ValueError for data without captions."""
    if "captions" not in batch:
        raise ValueError(
            "the decoder is trained on what the model says of captions, and the data have none: give "
            "data.caption_column"
        )
    return [text or "" for text in batch["captions"]]

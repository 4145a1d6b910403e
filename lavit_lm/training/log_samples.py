"""Examples logged during training: what the model says of held-out pictures, and draws for held-out captions.

    every N steps    held-out pictures' codes -> captions                  texts/captions-0000500.md, TensorBoard
                     held-out captions -> codes -> pixel decoder           pictures/generated-0000500.png, TensorBoard
                     above each its picture's own codes, decoded

The callback trains nothing and changes nothing: the run's numbers are the same with and without it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image as Image
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from lavit_lm.multimodal import MultimodalLM
from lavit_lm.sequences.segments import ImageSegment, TextSegment
from lavit_tok import PixelDecoder, VisualCodes
from lavit_tok.training.logging import log_image, log_text


class LogSamples(pl.Callback):
    """Log captions, and pictures if there is a decoder, of the same held-out pairs again and again.

    Args:
        every: optimizer steps between two samples.
        pictures: how many held-out pairs, spread evenly over the validation split.
        decoder: the pixel decoder: "default", directory or Hub id; None logs captions only, as do objectives that say
            vectors for a picture.
        max_tokens: of a caption.
        guidance_scale: of the language model.
        num_inference_steps: of the pixel decoder.
        seed: with the step, of all that is drawn.

    Raises:
        ValueError: every or pictures below 1.
    """

    def __init__(
        self,
        every: int = 500,
        images: int = 4,
        decoder: str | None = "default",
        max_tokens: int = 32,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        seed: int = 0,
    ) -> None:
        for name, value in (("every", every), ("images", images)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.every, self.images, self.max_tokens, self.seed = every, images, max_tokens, seed
        self.guidance_scale, self.num_inference_steps = guidance_scale, num_inference_steps
        self._decoder: PixelDecoder | str | None = decoder
        self._last = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last or step % self.every:
            return  # `step` stands still within an accumulated step
        self._last = step
        with isolate_rng(), evaluation_mode(module.model), torch.no_grad():
            try:
                self._log(trainer, module)
            except ValueError as error:  # a sample must not end a training
                warnings.warn(f"step {step}: no samples are logged: {error}", stacklevel=2)

    def _log(self, trainer: Any, module: Any) -> None:
        pairs = self._pairs(trainer.datamodule.held_out.examples)
        size = module.codebook_size
        captions = [text for _, text in pairs]
        lm = MultimodalLM(
            module.model, module.processor, module.visual, self._decoder, module.objective
        )
        shown = [
            VisualCodes.from_list(_codes(i), size) if i.image is None else _pixels(i)
            for i, _ in pairs
        ]
        said = lm.caption(shown, self.max_tokens)
        if trainer.is_global_zero:
            lines = ["| caption | the model's |", "| --- | --- |"]
            lines += [
                f"| {_cell(true)} | {_cell(own)} |"
                for true, own in zip(captions, said, strict=True)
            ]
            log_text(module, "captions", "\n".join(lines) + "\n")
        if self._decoder is None or module.objective.image_output.kind != "codes":
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + module.global_step)
        drawn = lm.generate_codes_batch(captions, self.guidance_scale, generator)
        if not trainer.is_global_zero:
            return  # with sharded weights every process had to help, but one draws
        self._decoder = lm.decoder
        both = VisualCodes.from_list(
            [row for image, _ in pairs for row in _codes(image)] + drawn.to_list(), size
        )
        images = lm.decoder.decode(both, generator, num_inference_steps=self.num_inference_steps)
        log_image(module, "generated", _sheet(images[: len(pairs)], images[len(pairs) :]))

    def _pairs(self, samples: Any) -> list[tuple[ImageSegment, str]]:
        """Held-out pictures with their captions, the same ones each time."""
        found: dict[int, tuple[ImageSegment, str]] = {}
        for number in [
            *range(0, len(samples), max(1, len(samples) // self.images)),
            *range(len(samples)),
        ]:
            segments = samples[number][0]
            if [type(segment) for segment in segments] == [ImageSegment, TextSegment]:
                found[number] = (segments[0], segments[1].text)
            if len(found) == self.images:
                break
        if not found:
            raise ValueError("the validation split has no captioned picture")
        return list(found.values())


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and, where weights are sharded, with whole weights; afterwards everything is as it was."""
    from torch.distributed.fsdp import FSDPModule

    modes = [(part, part.training) for part in model.modules()]
    sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
    model.eval()
    for part in sharded:
        part.unshard()
    try:
        with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
            yield
    finally:
        for part in sharded:
            part.reshard()
        for module, mode in modes:
            module.training = mode


def _codes(image: ImageSegment) -> list[list[int]]:
    return [] if image.codes is None else [image.codes.tolist()]


def _pixels(image: ImageSegment) -> Any:
    return image.image() if callable(image.image) else image.image


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _sheet(above: list[Any], below: list[Any]) -> Image.Image:
    """Two rows of pictures of one size."""
    width, height = above[0].size
    sheet = Image.new("RGB", (width * len(above), 2 * height))
    for row, images in enumerate((above, below)):
        for column, image in enumerate(images):
            sheet.paste(image, (column * width, row * height))
    return sheet

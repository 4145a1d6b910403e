"""Log captions of held-out images and images for held-out captions during training.

    every N steps    codes of held-out images -> captions              texts/captions-0000500.md
                     held-out captions -> codes -> image decoder       images/generated-0000500.png
                     (above: codes of their own images, decoded)       both also in TensorBoard

The callback changes neither weights nor random generators: losses are equal with and without it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from lavit_lm.multimodal import MultimodalLM, shipped_decoder
from lavit_lm.sequences.segments import ImageSegment, TextSegment
from lavit_tok import VisualCodes
from lavit_tok.training.logging import log_image, log_text


class LogSamples(pl.Callback):
    """Log captions, and images if there is a decoder, always of the same held-out examples.

    Args:
        every: optimizer steps between two samples.
        images: number of held-out examples, spread evenly over the validation split.
        decoder: the image decoder: "default", a directory or a Hub id; None logs captions only, as
            for objectives that generate vectors. "default" is, for another visual tokenizer than
            the shipped one, the decoder in the folder beside it, or None.
        max_new_tokens: of a caption.
        guidance_scale: of the language model.
        num_inference_steps: of the image decoder.
        seed: of the sampling, together with the step.

    Raises:
        ValueError: `every` or `images` below 1.
    """

    def __init__(
        self,
        every: int = 500,
        images: int = 4,
        decoder: str | None = "default",
        max_new_tokens: int = 32,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        seed: int = 0,
    ) -> None:
        for name, value in (("every", every), ("images", images)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.every, self.images, self.seed = every, images, seed
        self.max_new_tokens, self.guidance_scale = max_new_tokens, guidance_scale
        self.num_inference_steps = num_inference_steps
        self._decoder: Any = decoder
        self._last = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A resumed run does not repeat the samples of its first step."""
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Log at every N-th optimizer step."""
        step = trainer.global_step
        if step == self._last or step % self.every:
            return  # with gradient accumulation, several batches have the same step
        self._last = step
        with isolate_rng(), evaluation_mode(module.model), torch.no_grad():
            try:
                self._log(trainer, module)
            except ValueError as error:  # must not end the training
                warnings.warn(f"step {step}: no samples are logged: {error}", stacklevel=2)

    def _log(self, trainer: Any, module: Any) -> None:
        examples = self._examples(trainer.datamodule.held_out_examples)
        captions = [text for _, text in examples]
        self._decoder = shipped_decoder(self._decoder, module.visual)
        if self._decoder == "default" and module.visual_tokenizer != "default":
            beside = Path(module.visual_tokenizer).parent / "decoder"
            self._decoder = str(beside) if beside.is_dir() else None
        lm = MultimodalLM(
            module.model, module.processor, module.visual, self._decoder, module.objective
        )
        size = module.codebook_size
        images = [
            VisualCodes.from_list(_codes(i), size) if i.image is None else _pixels(i)
            for i, _ in examples
        ]
        generated = lm.caption(images, self.max_new_tokens)
        if trainer.is_global_zero:
            lines = ["| caption | generated |", "| --- | --- |"]
            pairs = zip(captions, generated, strict=True)
            lines += [f"| {_cell(true)} | {_cell(text)} |" for true, text in pairs]
            log_text(module, "captions", "\n".join(lines) + "\n")
        if self._decoder is None or module.objective.image_output.kind != "codes":
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + module.global_step)
        # Every process takes part, since weights may be sharded; one decodes and logs.
        codes = lm.generate_codes_batch(captions, self.guidance_scale, generator)
        if not trainer.is_global_zero:
            return
        self._decoder = lm.decoder
        originals = [codes for image, _ in examples for codes in _codes(image)]
        both = VisualCodes.from_list(originals + codes.to_list(), size)
        steps = {"num_inference_steps": self.num_inference_steps}
        decoded = np.stack([np.asarray(i) for i in lm.decode_images(both, generator, **steps)])
        rows = decoded[: len(originals)], decoded[len(originals) :]
        sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
        log_image(module, "generated", Image.fromarray(sheet))

    def _examples(self, held_out: Any) -> list[tuple[ImageSegment, str]]:
        """Held-out images with their captions, the same ones each time."""
        examples: dict[int, tuple[ImageSegment, str]] = {}
        spread = range(0, len(held_out), max(1, len(held_out) // self.images))
        for number in [*spread, *range(len(held_out))]:
            segments = held_out[number][0]
            if [type(segment) for segment in segments] == [ImageSegment, TextSegment]:
                examples[number] = (segments[0], segments[1].text)
            if len(examples) == self.images:
                break
        if not examples:
            raise ValueError("the validation split has no image with a caption")
        return list(examples.values())


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with unsharded weights; every module's mode is restored afterwards."""
    from torch.distributed.fsdp import FSDPModule

    modes = [(part, part.training) for part in model.modules()]
    sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
    model.eval()
    for part in sharded:
        part.unshard()
    try:
        # Compiled modules would be compiled again for each length of a prompt.
        with torch.compiler.set_stance("force_eager"):
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

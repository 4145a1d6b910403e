"""Any tokenizer behind one small interface, so that all of them are measured by the same code.

    uint8 [b 3 S S] -encode-> VisualCodes (codes with lengths) -decode-> uint8 [b 3 S S]

`--tokenizer` names one of these:

    default | DIR | Hub id           ours: VisualTokenizer, with --decoder a PixelDecoder
    emu3 | chameleon | janus         the VQ-VAEs of `transformers`, at their published sizes, with random weights
    vqmodel                          `diffusers` VQModel at the sizes of VQGAN f16, with random weights
    emu3:DIR (or a Hub id), ...      the same with weights: a folder of that model alone, safetensors
    package.module:function          yours: function(device) gives any object with the attributes of ImageTokenizer

Only a command line names code to run; no class and no function is ever taken from a file. Random weights are good for
speed, FLOPs and token counts. Their pictures and codebook figures mean nothing, and every result says so.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from grid_tokenizers import KINDS, RANDOM, GridTokenizer, count, to_uint8, weights_digest
from jaxtyping import UInt8
from torch import Tensor, nn

from lavit_tok import PixelDecoder, VisualCodes, VisualTokenizer

__all__ = ["KINDS", "RANDOM", "GridTokenizer", "ImageTokenizer", "Lavit", "count", "load"]


@runtime_checkable
class ImageTokenizer(Protocol):
    """What a tokenizer needs to be measured."""

    name: str
    """What results call it."""
    weights: str
    """Where its weights come from; RANDOM where they are random."""
    identity: str
    """Changes with the weights and the decoder's settings: a resumed run never mixes two tokenizers."""
    image_size: int
    """S, the side of its pictures in pixels."""
    codebook_size: int
    """K: codes are 0..K-1."""
    most_codes: int
    """The most codes that one picture can have."""
    decodes: bool
    """Whether decode() works."""
    parameters: dict[str, int]
    """Numbers of weights used by "encode" and by "decode"; what both use counts in both."""

    def encode(self, images: UInt8[Tensor, "b 3 s s"]) -> VisualCodes:
        """Codes of a batch, on the CPU, each picture with its own number of them."""

    def decode(
        self, codes: VisualCodes, generators: Sequence[torch.Generator]
    ) -> UInt8[Tensor, "b 3 s s"]:
        """Pictures, on the CPU. One generator a picture, so that none depends on its batch; or it is not random."""


class Lavit:
    """Ours. `encode` takes a budget as well; its rooms (`tokenizer`) give what the feature measures need."""

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        decoder: PixelDecoder | None = None,
        name: str = "lavit-tok",
        weights: str = "given",
        steps: int = 25,
        guidance: float = 3.0,
    ) -> None:
        self.tokenizer, self.decoder, self.steps, self.guidance = (
            tokenizer,
            decoder,
            steps,
            guidance,
        )
        self.name, self.weights, config = name, weights, tokenizer.config
        self.image_size, self.codebook_size, self.most_codes = (
            config.image_size,
            config.codebook_size,
            config.num_patches,
        )
        self.decodes = decoder is not None
        encoding = [tokenizer.encoder, tokenizer.selector, tokenizer.merger, tokenizer.quantizer]
        drawing = (
            [] if decoder is None else [decoder.conditioner, decoder.unet, decoder.vae.decoder]
        )
        self.parameters = {"encode": count(*encoding), "decode": count(*drawing)}
        parts = (
            [tokenizer]
            if decoder is None
            else [tokenizer, decoder.conditioner, decoder.unet, decoder.vae]
        )
        self.identity = f"{weights_digest(*parts)}, {steps} steps, guidance {guidance:g}"
        if decoder is not None:
            decoder.set_progress_bar_config(disable=True)

    def encode(
        self, images: UInt8[Tensor, "b 3 s s"], budget: int | float | None = None
    ) -> VisualCodes:
        return self.tokenizer.encode(images, budget).to("cpu")

    def decode(
        self, codes: VisualCodes, generators: Sequence[torch.Generator]
    ) -> UInt8[Tensor, "b 3 s s"]:
        if self.decoder is None:
            raise ValueError(
                f"{self.name}: no decoder was given (--decoder), so there are no pictures to measure"
            )
        drawn = self.decoder(
            codes.to(self.tokenizer.device),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=list(generators),
            output_type="pt",
        ).images.float()
        if drawn.shape[-1] != self.image_size:
            side = (self.image_size, self.image_size)
            drawn = nn.functional.interpolate(drawn, side, mode="bicubic", antialias=True)
        return to_uint8(drawn, 0.0)


FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load(
    name: str,
    device: str = "cpu",
    image_size: int = 256,
    decoder: str | None = None,
    steps: int = 25,
    guidance: float = 3.0,
) -> ImageTokenizer:
    """The tokenizer that a command line names; see the top of this file.

    Args:
        image_size: of the grid tokenizers; ours and yours say their own.
        decoder, steps, guidance: of ours.

    Raises:
        ValueError: a decoder for a tokenizer that has its own, or a factory that gives something else.
    """
    kind, _, rest = name.partition(":")
    if decoder is not None and (kind in KINDS or FACTORY.fullmatch(name)):
        raise ValueError(f"--decoder {decoder}: {name} draws its pictures itself; expected none")
    if kind in KINDS:
        found = KINDS[kind](image_size, rest or None)
        found.model.to(device)
        return found
    if FACTORY.fullmatch(name):
        return _from_factory(kind, rest, device)
    tokenizer = VisualTokenizer.from_pretrained(name, device=device)
    drawing = None if decoder is None else PixelDecoder.from_pretrained(decoder, device=device)
    return Lavit(tokenizer, drawing, weights=Path(name).name, steps=steps, guidance=guidance)


def _from_factory(module: str, function: str, device: str) -> ImageTokenizer:
    try:
        found = getattr(importlib.import_module(module), function)(device)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"--tokenizer {module}:{function}: {error}; its folder must be on PYTHONPATH, or the package installed"
        ) from error
    missing = [name for name in ATTRIBUTES if not hasattr(found, name)]
    if missing:
        raise ValueError(
            f"{module}:{function} gave a {type(found).__name__} without {', '.join(missing)}; expected what "
            "adapters.ImageTokenizer lists"
        )
    return found


ATTRIBUTES = (*ImageTokenizer.__annotations__, "encode", "decode")

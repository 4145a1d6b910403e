"""Any tokenizer behind one small interface, so that all of them are measured by the same code.

    uint8 [b 3 S S] -encode-> VisualCodes (codes with lengths) -decode-> uint8 [b 3 S S]

`--tokenizer` names one of these:

    default | DIR | Hub id      ours: VisualTokenizer, with --decoder a PixelDecoder
    vqmodel | vqmodel:DIR       diffusers' VQModel, with random weights or a directory's
    package.module:function     yours: function(device) returns an object like ImageTokenizer

With random weights images and codebook use mean nothing, as every result states. Only a command
line names code to run, never a file.
"""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from benchmarks.shared.cache import digest
from lavit_tok import PixelDecoder, VisualCodes, VisualTokenizer

Images = UInt8[Tensor, "b 3 s s"]
RANDOM = "random weights"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
OPTIONS: dict[str, tuple[Any, ...]] = {
    "tokenizer": ("default", "'default', a directory, a Hub id, or see docs/benchmarks.md"),
    "image_size": (256, "pixels, of vqmodel"),
    "squeeze": (False, "resize whole images to a square, without the protocol's center crop"),
}


@runtime_checkable
class ImageTokenizer(Protocol):
    """What a tokenizer needs to be measured."""

    name: str
    """What results call it."""
    weights: str
    """Where its weights come from; RANDOM where they are random."""
    identity: str
    """Changes with weights and options: a resumed run never mixes two tokenizers."""
    image_size: int
    """S, the side of its images in pixels."""
    codebook_size: int
    """K: codes are 0..K-1."""
    max_codes: int
    """The most codes that one image can have."""
    decodes: bool
    """Whether decode() works."""
    parameters: dict[str, int]
    """Numbers of weights used by "encode" and by "decode"; what both use counts in both."""

    def encode(self, images: Images) -> VisualCodes:
        """Codes of a batch, on the CPU, each image with its own number of them."""

    def decode(self, codes: VisualCodes, generators: Sequence[torch.Generator]) -> Images:
        """Images, on the CPU. One generator per image, so that none depends on its batch."""


class Lavit:
    """Our tokenizer, and its pixel decoder if there is one."""

    name = "lavit-tok"

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        decoder: Any,
        weights: str,
        steps: int,
        guidance: float,
        mode: str | None = None,
    ) -> None:
        self.tokenizer, self.decoder, self.weights = tokenizer, decoder, weights
        self.options = {"num_inference_steps": steps, "guidance_scale": guidance, "mode": mode}
        config = tokenizer.config
        self.image_size, self.codebook_size = config.image_size, config.codebook_size
        self.max_codes, self.decodes = config.num_patches, decoder is not None
        modules = tokenizer.encoder, tokenizer.selector, tokenizer.merger, tokenizer.quantizer
        self.parameters = {"encode": count_weights(*modules), "decode": 0}
        self.identity = digest(tokenizer, decoder, steps, guidance, mode)
        if decoder is not None:
            used = decoder.conditioner, decoder.unet, getattr(decoder.vae, "decoder", None)
            self.parameters["decode"] = count_weights(*used, decoder.mean_decoder)
            decoder.set_progress_bar_config(disable=True)

    def encode(self, images: Images) -> VisualCodes:
        return self.tokenizer.encode(images).to("cpu")

    def decode(self, codes: VisualCodes, generators: Sequence[torch.Generator]) -> Images:
        if self.decoder is None:
            raise ValueError("--decoder: expected one, to have images to measure")
        codes, options = codes.to(self.tokenizer.device), {"output_type": "pt", **self.options}
        images = self.decoder(codes, generator=list(generators), **options).images.float()
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = nn.functional.interpolate(images, size, mode="bicubic", antialias=True)
        return to_bytes(images)


class VQModelTokenizer:
    """diffusers' VQModel: one code for every cell of a grid.

    By default VQGAN f16 (Esser et al., CVPR 2021) with random weights, the same each time.

    Args:
        weights: directory or Hub id of a VQModel, as safetensors.
        changes: to the default sizes.
    """

    name = "vqmodel"

    def __init__(self, size: int, weights: str | None = None, **changes: Any) -> None:
        from diffusers import VQModel

        config = {"block_out_channels": (128, 128, 256, 256, 512), "layers_per_block": 2}
        config |= {"latent_channels": 256, "num_vq_embeddings": 16384, "sample_size": size}
        config |= changes
        blocks = len(config["block_out_channels"])
        config |= {"down_block_types": ("DownEncoderBlock2D",) * blocks}
        config |= {"up_block_types": ("UpDecoderBlock2D",) * blocks}
        self.weights, self.image_size, self.decodes = RANDOM, size, True
        if weights is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model: Any = VQModel(**config)
        else:
            self.weights, model = Path(weights).name, VQModel.from_pretrained(weights)
        self.model, factor = model.eval(), 2 ** (len(model.config.block_out_channels) - 1)
        if size % factor:
            raise ValueError(f"vqmodel: expected an image size that {factor} divides, got {size}")
        self.side, self.codebook_size = size // factor, model.config.num_vq_embeddings
        self.max_codes = self.side**2
        self.identity = f"vqmodel {size} {self.weights} {digest(model)}"
        shared = count_weights(model.quantize)
        self.parameters = {
            "encode": count_weights(model.encoder, model.quant_conv) + shared,
            "decode": count_weights(model.decoder, model.post_quant_conv) + shared,
        }

    def encode(self, images: Images) -> VisualCodes:
        codes = self.tokens(images.to(self.model.device) / 127.5 - 1).cpu()
        keep = torch.ones_like(codes, dtype=torch.bool)
        return VisualCodes(codes.flatten(), keep.sum(1), keep, self.codebook_size)

    @torch.no_grad()
    def tokens(self, pixels: Float[Tensor, "b 3 s s"]) -> Int64[Tensor, "b cells"]:
        """Pixels of -1..1 to codes."""
        latents = self.model.encode(pixels).latents
        return self.model.quantize(latents)[2][2].view(len(pixels), self.max_codes)

    @torch.no_grad()
    def decode(self, codes: VisualCodes, generators: Any = ()) -> Images:
        quantize, values = self.model.quantize, codes.values.to(self.model.device)
        shape = len(codes), self.side, self.side, self.model.quantize.embedding.embedding_dim
        entries = quantize.get_codebook_entry(values, shape)
        return to_bytes((self.model.decoder(self.model.post_quant_conv(entries)) + 1) / 2)


def to_bytes(images: Tensor) -> Images:
    """Floats of 0..1 to bytes, rounded, on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def count_weights(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


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
        image_size: of vqmodel; ours and yours have their own.
        decoder, steps, guidance: of ours.

    Raises:
        ValueError: a decoder for a tokenizer that has its own, or a factory that returns another
            object.
    """
    kind, _, rest = name.partition(":")
    factory = FACTORY.fullmatch(name)
    if decoder is not None and (kind == "vqmodel" or factory):
        raise ValueError(f"--decoder {decoder}: {name} decodes by itself; expected no decoder")
    if kind == "vqmodel":
        grid = VQModelTokenizer(image_size, rest or None)
        grid.model.to(device)
        return grid
    if not factory:
        tokenizer = VisualTokenizer.from_pretrained(name, device=device)
        pixels = None if decoder is None else PixelDecoder.from_pretrained(decoder, device=device)
        return Lavit(tokenizer, pixels, Path(name).name, steps, guidance)
    try:
        found = getattr(importlib.import_module(kind), rest)(device)
    except (ModuleNotFoundError, AttributeError) as error:
        hint = "its folder must be on PYTHONPATH, or the package installed"
        raise ValueError(f"--tokenizer {name}: {error}; {hint}") from error
    if not isinstance(found, ImageTokenizer):
        kind, names = type(found).__name__, ", ".join(ImageTokenizer.__annotations__)
        raise ValueError(f"{name} returned a {kind}; expected encode, decode, {names}")
    return found

"""The VQ-VAEs that `transformers` and `diffusers` carry: one code for every cell of a grid, whatever the picture shows.

    uint8 [b 3 S S] -> -1..1 -encoder, nearest codebook row-> codes [b cells] -decoder-> -1..1 -> uint8 [b 3 S S]

By config at their published sizes, with random weights that are the same each time, or from a folder or Hub id that
holds that model alone, as safetensors. The class is fixed by the name here, never by a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from lavit_tok import VisualCodes

RANDOM = "random weights"
PARTS = ("encoder", "quant_conv", "quantize", "post_quant_conv", "decoder")
"""What the modules of all four are called."""


def weights_digest(*modules: nn.Module) -> str:
    """12 hexadecimal digits of all weights and buffers."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            found.update(name.encode())
            found.update(
                value.detach()
                .to("cpu", copy=False)
                .contiguous()
                .flatten()
                .view(torch.uint8)
                .numpy()
            )
    return found.hexdigest()[:12]


def count(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


@dataclass(frozen=True, eq=False)
class GridTokenizer:
    """A convolutional VQ-VAE: one code for every cell of a side x side grid, whatever the picture shows.

    The four of `transformers` and `diffusers` name their parts alike (encoder, quant_conv, quantize, post_quant_conv,
    decoder); how they are called differs, hence `tokens` and `pixels`. Pictures go in and come out as -1..1.
    """

    name: str
    weights: str
    image_size: int
    side: int
    codebook_size: int
    model: nn.Module
    tokens: Callable[[Float[Tensor, "b 3 s s"]], Int64[Tensor, "b cells"]]
    pixels: Callable[[Int64[Tensor, "b side side"]], Float[Tensor, "b 3 s s"]] | None

    @property
    def identity(self) -> str:
        return f"{self.name} {self.image_size} {self.weights} {weights_digest(self.model)}"

    @property
    def most_codes(self) -> int:
        return self.side**2

    @property
    def decodes(self) -> bool:
        return self.pixels is not None

    @property
    def parameters(self) -> dict[str, int]:
        part = {name: count(getattr(self.model, name, None)) for name in PARTS}
        coding = part["encoder"] + part["quant_conv"] + part["quantize"]
        drawing = part["quantize"] + part["post_quant_conv"] + part["decoder"]
        return {"encode": coding, "decode": drawing if self.decodes else 0}

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "b 3 s s"]) -> VisualCodes:
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"{self.name}: expected {self.image_size} pixels a side, got {list(images.shape)}"
            )
        like = next(self.model.parameters())
        found = (
            self.tokens(images.to(like.device, like.dtype) / 127.5 - 1)
            .reshape(len(images), -1)
            .cpu()
        )
        if found.shape[1] != self.most_codes:
            raise ValueError(
                f"{self.name}: expected {self.most_codes} codes a picture, got {found.shape[1]}"
            )
        lengths = torch.full((len(images),), self.most_codes)
        return VisualCodes(
            found.flatten(), lengths, torch.ones_like(found, dtype=torch.bool), self.codebook_size
        )

    @torch.no_grad()
    def decode(
        self, codes: VisualCodes, generators: Sequence[torch.Generator] = ()
    ) -> UInt8[Tensor, "b 3 s s"]:
        if self.pixels is None:
            raise ValueError(
                f"{self.name}: `transformers` carries no decoder of it, so it can only encode"
            )
        grid = codes.padded().view(len(codes), self.side, self.side)
        return to_uint8(self.pixels(grid.to(next(self.model.parameters()).device)), -1.0)


def to_uint8(images: Tensor, low: float) -> UInt8[Tensor, "b 3 s s"]:
    """Floats of low..1 to bytes, rounded."""
    return (((images.float() - low) / (1 - low)).clamp(0, 1) * 255).round().to("cpu", torch.uint8)


# The tokenizers that the field's libraries carry


def _model(
    kind: Any, config: Any, weights: str | None, build: Callable[[], nn.Module]
) -> tuple[Any, str]:
    """The model with these weights, or by config with random ones that are the same each time."""
    if weights is not None:
        return kind.from_pretrained(weights, use_safetensors=True).eval(), Path(weights).name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval(), RANDOM


def _cells(name: str, size: int, factor: int) -> int:
    if size % factor:
        raise ValueError(f"{name}: expected an image size that {factor} divides, got {size}")
    return size // factor


def emu3(size: int, weights: str | None = None, **changes: Any) -> GridTokenizer:
    """Emu3's VQ-VAE, made for video: a still picture is four equal frames, as `transformers` has it."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    config = Emu3VQVAEConfig(**changes)
    model, source = _model(Emu3VQVAE, config, weights, lambda: Emu3VQVAE(config))
    config, side = model.config, _cells("emu3", size, model.vision_spatial_factor)

    def tokens(pixels: Tensor) -> Tensor:
        sizes = torch.tensor([[size, size]] * len(pixels))
        return torch.stack(list(model.encode(pixels, sizes).image_tokens))

    return GridTokenizer(
        "emu3", source, size, side, config.codebook_size, model, tokens, model.decode
    )


def chameleon(size: int, weights: str | None = None, **changes: Any) -> GridTokenizer:
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    config = ChameleonVQVAEConfig(**{"resolution": size, **changes})
    model, source = _model(ChameleonVQVAE, config, weights, lambda: ChameleonVQVAE(config))
    config = model.config
    side = _cells("chameleon", size, 2 ** (len(config.channel_multiplier) - 1))
    return GridTokenizer(
        "chameleon",
        source,
        size,
        side,
        config.num_embeddings,
        model,
        lambda x: model.encode(x).image_tokens,
        None,
    )


def janus(size: int, weights: str | None = None, **changes: Any) -> GridTokenizer:
    """Janus's (LlamaGen's) VQ-VAE as `transformers` computes it: rows are normalised when decoding only."""
    from transformers.models.janus.modeling_janus import JanusVQVAE, JanusVQVAEConfig

    multipliers = changes.get("channel_multiplier", JanusVQVAEConfig().channel_multiplier)
    side = _cells("janus", size, 2 ** (len(multipliers) - 1))
    config = JanusVQVAEConfig(**{"num_patches": side, **changes})
    model, source = _model(JanusVQVAE, config, weights, lambda: JanusVQVAE(config))
    config = model.config
    side = _cells("janus", size, 2 ** (len(config.channel_multiplier) - 1))
    model.quantize.quant_state_dims = [
        side,
        side,
    ]  # what decode() expects, wherever its weights were trained

    def pixels(grid: Tensor) -> Tensor:
        return model.decode(grid.flatten(1))

    return GridTokenizer(
        "janus",
        source,
        size,
        side,
        config.num_embeddings,
        model,
        lambda x: model.encode(x).image_tokens,
        pixels,
    )


def vqmodel(size: int, weights: str | None = None, **changes: Any) -> GridTokenizer:
    """diffusers' VQModel; by config at the sizes of VQGAN f16 (Esser et al., CVPR 2021): 16,384 codes of 256."""
    from diffusers import VQModel

    widths = changes.get("block_out_channels", (128, 128, 256, 256, 512))
    config = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 2,
        "latent_channels": 256,
        "num_vq_embeddings": 16384,
        "sample_size": size,
        **changes,
    }
    model, source = _model(VQModel, config, weights, lambda: VQModel(**config))
    settings = model.config
    side = _cells("vqmodel", size, 2 ** (len(settings.block_out_channels) - 1))
    dim = settings.vq_embed_dim or settings.latent_channels

    def tokens(x: Tensor) -> Tensor:
        return model.quantize(model.encode(x).latents)[2][2].view(len(x), -1)

    def pixels(grid: Tensor) -> Tensor:
        rows = model.quantize.get_codebook_entry(grid.flatten(), (len(grid), side, side, dim))
        return model.decoder(
            model.post_quant_conv(rows), rows if settings.norm_type == "spatial" else None
        )

    return GridTokenizer(
        "vqmodel", source, size, side, settings.num_vq_embeddings, model, tokens, pixels
    )


KINDS: dict[str, Callable[..., GridTokenizer]] = {
    "emu3": emu3,
    "chameleon": chameleon,
    "janus": janus,
    "vqmodel": vqmodel,
}

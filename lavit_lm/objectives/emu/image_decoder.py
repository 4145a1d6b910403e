"""Emu's image decoder: a transformer from an LM's vectors to what a PixelDecoder's U-Net reads.

    codes    -codebook, reconstructor-> features [b p w] -.
                                                          +-projection-> Conditioning -U-Net, VAE->
                                                          pixels
    vectors [b n d] -VectorReader----> features [b p w] --'

Emu conditions Stable Diffusion on its 32 vectors by new key and value projections of the LM's
width. Here the reader, with a learned query for each patch, maps them to the features that the
U-Net was trained on, positions included, so that a pretrained U-Net is trained further; its key and
value projections can be initialized anew as well (training/emu_decoder.py). Guidance subtracts the
prediction for the vectors of an empty prompt, not for zeros.

    vector_decoder.json     sizes of the reader
    reader.safetensors      its weights
    pixels/                 the PixelDecoder
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lavit_lm.objectives.records import ImageVectors
from lavit_tok import Conditioning, PixelDecoder, WeightsError
from lavit_tok.checkpoints.files import atomic_files
from lavit_tok.checkpoints.weights import (
    check_layers,
    empty,
    find_directory,
    load_weights,
    read_header,
    save_weights,
)
from lavit_tok.nn.attention import Block

FORMAT, VERSION = "lavit_lm.vector_decoder", 1
READER = "reader.safetensors"


@dataclass(frozen=True)
class VectorReaderConfig:
    """Sizes of a VectorReader.

    Args:
        width: d, of the vectors; the LM's hidden size.
        vectors: n, per image.
        features: w, width of the features.
        patches: p, number of features.
        depth, heads, hidden_size: blocks, heads and width of the transformer.

    Raises:
        ValueError: a number below 1, or heads that do not divide the width.
    """

    width: int
    vectors: int
    features: int
    patches: int
    depth: int = 2
    heads: int = 4
    hidden_size: int = 192

    def __post_init__(self) -> None:
        positive = all(isinstance(n, int) and n > 0 for n in asdict(self).values())
        if not positive or self.hidden_size % self.heads:
            raise ValueError(
                "expected integers above 0, and a hidden_size that is a multiple of heads, got "
                f"{self}"
            )


class VectorReader(nn.Module):
    """[b n d] -> [b p w]: one query per patch attends to the other queries and to all vectors.

    Vectors of different prompts differ little compared with their mean, so they are normalized by a
    mean and a standard deviation that `measure` computes once and the weights contain.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: VectorReaderConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, 1e-5
        self.config = config
        self.register_buffer("mean", torch.zeros(config.vectors, config.width))
        self.register_buffer("deviation", torch.ones(config.vectors, 1))
        self.read = nn.Linear(config.width, size)
        self.positions = nn.Parameter(torch.randn(config.vectors, size) * 0.02)
        self.queries = nn.Parameter(torch.randn(config.patches, size) * 0.02)
        self.blocks = nn.ModuleList(
            Block(size, config.heads, 4 * size, eps) for _ in range(config.depth)
        )
        self.out = nn.Sequential(nn.LayerNorm(size, eps), nn.Linear(size, config.features))

    def forward(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b p w"]:
        context = self.read((vectors - self.mean) / self.deviation) + self.positions
        x = self.queries.expand(len(vectors), -1, -1)
        for block in self.blocks:
            x = block(x, context, None, None)
        return self.out(x)

    @torch.no_grad()
    def measure(self, vectors: Float[Tensor, "b n d"]) -> None:
        """Set mean [n d] and deviation [n 1] from vectors generated after different prompts."""
        self.mean.copy_(vectors.mean(0))
        deviation = (vectors - self.mean).square().mean((0, 2)).sqrt()
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0)[:, None])


class VectorDecoder:
    """ImageDecoder of the vectors of one language model.

    Args:
        reader: vectors -> features of every patch.
        pixels: the PixelDecoder whose U-Net is conditioned on these; of its conditioner, only the
            projection is used.

    Raises:
        ValueError: components whose sizes do not fit each other.
    """

    def __init__(self, reader: VectorReader, pixels: PixelDecoder) -> None:
        c, config = pixels.conditioner.config, reader.config
        if (config.patches, config.features) != (c.patches, c.width):
            raise ValueError(
                f"the pixel decoder needs {c.patches} features of width {c.width}, the reader "
                f"makes {config.patches} of "
                f"width {config.features}"
            )
        self.reader, self.pixels = reader, pixels
        pixels.set_progress_bar_config(disable=True)

    def conditioning(self, vectors: Float[Tensor, "b n d"]) -> Conditioning:
        """What the U-Net is conditioned on. Raises ValueError for vectors of another model."""
        config, weight = self.reader.config, self.reader.queries
        if tuple(vectors.shape[1:]) != (config.vectors, config.width):
            raise ValueError(
                f"expected {config.vectors} vectors of width {config.width} per image, got shape "
                f"{list(vectors.shape)}: this decoder was trained for another language model"
            )
        return self.pixels.conditioner.projection(self.reader(vectors.to(weight)))

    @torch.no_grad()
    def decode(
        self,
        outputs: ImageVectors,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | int = 7.5,
        **options: Any,
    ) -> Any:
        """See ImageDecoder.

        Args:
            outputs: vectors, and those of an empty prompt.
            generator: source of the noise.
            num_inference_steps: 50 as published.
            guidance_scale: 7.5 as published, 5.0 for FID; 1 for no guidance.
            options: PixelDecoder.decode_condition's other arguments: latents, height, width,
                output_type, ...

        Raises:
            ValueError: vectors of another model, or an impossible size.
        """
        condition = self.conditioning(outputs.vectors)
        unconditional = self.conditioning(
            outputs.unconditional.expand(len(outputs.vectors), -1, -1)
        )
        return self.pixels.decode_condition(
            condition, unconditional, num_inference_steps, guidance_scale, generator, **options
        )

    def to(self, device: torch.device | str) -> VectorDecoder:
        """Move reader and pixel decoder."""
        self.reader.to(device)
        self.pixels.to(device)
        return self

    def save_pretrained(
        self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> None:
        """Write the directory, floats as `dtype`. Raises WeightsError for NaN or infinity."""
        values = {"format": FORMAT, "version": VERSION, "reader": asdict(self.reader.config)}
        with atomic_files(Path(directory)) as folder:
            save_weights(self.reader, folder, dtype, single=READER)
            self.pixels.save_pretrained(folder / "pixels", dtype=dtype)
            (folder / "vector_decoder.json").write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> VectorDecoder:
        """Load a directory, or a Hub id.

        Raises:
            WeightsError: "default", since none is shipped; files or tensors that are missing,
                unexpected or mis-shaped.
        """
        if str(name) == "default":
            raise WeightsError(
                "no decoder of vectors is shipped with this version, since it is trained for one "
                "language model: "
                "train one with lavit-lm fit-decoder (recipes/lm/emu-decoder.yaml), and give its "
                "directory"
            )
        directory = find_directory(name, None)
        path = directory / "vector_decoder.json"
        try:
            values = read_header(path, FORMAT, VERSION, ("reader",))
            check_layers(values["reader"], directory, READER, "reader")
            config = VectorReaderConfig(**values["reader"])
            reader = empty(lambda: VectorReader(config), torch.float32, directory, READER)
        except (ValueError, TypeError) as error:
            raise WeightsError(
                f"{path}: expected the directory of a decoder of vectors, as written by lavit-lm "
                f"fit-decoder: {error}"
            ) from None
        load_weights(reader, directory, READER)
        pixels = PixelDecoder.from_pretrained(directory / "pixels", dtype=dtype, device=device)
        try:
            return cls(reader.to(device=device, dtype=dtype).eval().requires_grad_(False), pixels)
        except ValueError as error:
            raise WeightsError(f"{directory}: {error}") from None

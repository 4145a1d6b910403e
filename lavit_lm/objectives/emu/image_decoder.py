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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lavit_lm.objectives.records import ImageVectors
from lavit_lm.vision.vector_reader import VectorReader, VectorReaderConfig
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

FORMAT, VERSION = "lavit_lm.vector_decoder", 1
READER = "reader.safetensors"


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
        vectors = vectors.to(self.reader.queries)
        return self.pixels.conditioner.projection(self.reader(vectors))

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

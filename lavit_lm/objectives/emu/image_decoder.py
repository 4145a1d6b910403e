"""Vectors that a language model says for a picture -> pixels: a small reader before a PixelDecoder's own U-Net.

    codes    -codebook, reconstructor-> features [b p w] -.
                                                          +-projection-> Conditioning -U-Net, VAE-> pixels
    vectors [b n d] -VectorReader----> features [b p w] --'

Emu hands its 32 vectors to Stable Diffusion by new key and value projections of the language model's width. Here the
reader, with a learned query for each patch, makes of them what a U-Net was trained to read already, places included, so
that a trained one learns on; its keys and values can be made new besides (pixels/decoder_training.py). What guidance
subtracts is the condition of the vectors said after an empty prompt, not zeros.

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavit_tok import Conditioning, PixelDecoder, WeightsError
from lavit_tok.nn.attention import Block

FORMAT, VERSION = "lavit_lm.vector_decoder", 1


@dataclass(frozen=True)
class VectorReaderConfig:
    """Sizes of a VectorReader.

    Args:
        width: d, of the vectors; the language model's.
        vectors: n, of a picture.
        features: w, width of what is made of them.
        patches: p, how many of those.
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
        wrong = {
            name: value
            for name, value in asdict(self).items()
            if not isinstance(value, int) or value < 1
        }
        if wrong or self.hidden_size % self.heads:
            raise ValueError(
                f"expected whole numbers above 0, and heads that divide the hidden_size width, got {self}"
            )


class VectorReader(nn.Module):
    """[b n d] -> [b p w]: a query for each patch looks at the others and at all vectors, whose numbers it is told.

    What is said of different prompts differs by little against what it has in common, so it is read as differences from
    a mean, in units of a deviation, which `measure` takes once and the weights keep.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: VectorReaderConfig) -> None:
        super().__init__()
        hidden_size, eps = shape.hidden_size, 1e-5
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape.vectors, shape.width))
        self.register_buffer("deviation", torch.ones(shape.vectors, 1))
        self.read = nn.Linear(shape.width, hidden_size)
        self.places = nn.Parameter(torch.randn(shape.vectors, hidden_size) * 0.02)
        self.queries = nn.Parameter(torch.randn(shape.patches, hidden_size) * 0.02)
        self.blocks = nn.ModuleList(
            Block(hidden_size, shape.heads, 4 * hidden_size, eps) for _ in range(shape.depth)
        )
        self.out = nn.Sequential(
            nn.LayerNorm(hidden_size, eps), nn.Linear(hidden_size, shape.features)
        )

    def forward(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b p w"]:
        context = self.read((vectors - self.mean) / self.deviation) + self.places
        x = self.queries.expand(len(vectors), -1, -1)
        for block in self.blocks:
            x = block(x, context, None, None)
        return self.out(x)

    @torch.no_grad()
    def measure(self, vectors: Float[Tensor, "b n d"]) -> None:
        """Take the mean [n d], and one deviation for each of the n, of what is said of different prompts."""
        self.mean.copy_(vectors.mean(0))
        deviation = (vectors - self.mean).square().mean((0, 2)).sqrt()
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0)[:, None])


class VectorDecoder:
    """Draws the pictures that a language model said in vectors.

    Args:
        reader: vectors -> features of every patch.
        pixels: the PixelDecoder whose U-Net reads these; of its condition, the projection alone is used.

    Raises:
        ValueError: parts whose sizes do not fit each other.
    """

    def __init__(self, reader: VectorReader, pixels: PixelDecoder) -> None:
        c, shape = pixels.conditioner.config, reader.shape
        if (shape.patches, shape.features) != (c.patches, c.width):
            raise ValueError(
                f"the pixel decoder reads {c.patches} features of width {c.width}, the reader makes {shape.patches} of "
                f"width {shape.features}"
            )
        self.reader, self.pixels = reader, pixels
        pixels.set_progress_bar_config(disable=True)

    def conditioning(self, vectors: Float[Tensor, "b n d"]) -> Conditioning:
        """What the U-Net reads. Raises ValueError for vectors of another model."""
        shape, weight = self.reader.shape, self.reader.queries
        if tuple(vectors.shape[1:]) != (shape.vectors, shape.width):
            raise ValueError(
                f"expected {shape.vectors} vectors of width {shape.width} a picture, got {list(vectors.shape)}: this "
                "decoder was trained on what another language model says"
            )
        return self.pixels.conditioner.projection(self.reader(vectors.to(weight)))

    @torch.no_grad()
    def __call__(
        self,
        vectors: Float[Tensor, "b n d"],
        null: Float[Tensor, "1 n d"],
        num_inference_steps: int = 50,
        guidance_scale: float | int = 7.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **drawing: Any,
    ) -> Any:
        """Draw a picture for each.

        Args:
            null: what the language model says after an empty prompt.
            num_inference_steps, guidance_scale: 50 and 7.5 as published, 5.0 for FID; at a scale of 1 `null` is not
                asked.
            generator: source of the noise; a list of one a picture makes each independent of its batch.
            drawing: PixelDecoder.draw's other arguments: latents, height, width, output_type, ...

        Returns: an object with `.images`.

        Raises:
            ValueError: vectors of another model, or an impossible size.
        """
        from diffusers import ImagePipelineOutput

        given, free = (
            self.conditioning(vectors),
            self.conditioning(null.expand(len(vectors), -1, -1)),
        )
        options = num_inference_steps, guidance_scale, generator
        return ImagePipelineOutput(
            images=self.pixels.decode_condition(given, free, *options, **drawing)
        )

    def to(self, device: torch.device | str) -> VectorDecoder:
        self.reader.to(device)
        self.pixels.to(device)
        return self

    def save_pretrained(
        self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> None:
        """Write the directory, floats as `dtype`. Raises WeightsError for weights that are NaN or infinite."""
        out = Path(directory)
        state = {
            n: t.detach().cpu().contiguous().to(dtype or t.dtype)
            for n, t in self.reader.state_dict().items()
        }
        _require_finite(state, f"{out}: not saved")
        out.mkdir(parents=True, exist_ok=True)
        self.pixels.save_pretrained(out / "pixels", dtype=dtype)
        save_file(state, out / "reader.safetensors")
        values = {"format": FORMAT, "version": VERSION, "reader": asdict(self.reader.shape)}
        (out / "vector_decoder.json").write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> VectorDecoder:
        """A directory, or a Hub id.

        Raises:
            WeightsError: "default", since none ships; files or tensors that are missing, unexpected or mis-shaped.
        """
        directory = _directory(name)
        reader = VectorReader(_shape(directory / "vector_decoder.json"))
        file = directory / "reader.safetensors"
        try:
            state = load_file(file)
            reader.load_state_dict(state)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise WeightsError(f"{file}: {error}") from None
        _require_finite(state, str(file))
        pixels = PixelDecoder.from_pretrained(directory / "pixels", dtype=dtype, device=device)
        try:
            return cls(reader.to(device=device, dtype=dtype).eval().requires_grad_(False), pixels)
        except ValueError as error:
            raise WeightsError(f"{directory}: {error}") from None


def _shape(path: Path) -> VectorReaderConfig:
    try:
        values = json.loads(path.read_text())
        if (values["format"], values["version"]) != (FORMAT, VERSION):
            raise ValueError(
                f"expected {FORMAT} version {VERSION}, got {values['format']} {values['version']}"
            )
        return VectorReaderConfig(**values["reader"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(
            f"{path}: expected the directory of a decoder of vectors, as lavit-lm fit-decoder writes it: {error!r}"
        ) from None


def _directory(name: str | os.PathLike[str]) -> Path:
    if str(name) == "default":
        raise WeightsError(
            "no decoder of vectors ships with this version: it belongs to one language model; train it by "
            "lavit-lm fit-decoder (recipes/lm/emu-decoder.yaml), and name its directory"
        )
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's errors are of many kinds
        raise WeightsError(
            f"{name}: neither a directory nor a Hub id that can be fetched: {error}"
        ) from None


def _require_finite(state: dict[str, Tensor], label: str) -> None:
    if broken := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise WeightsError(f"{label}: these tensors hold NaN or infinity: {broken}")

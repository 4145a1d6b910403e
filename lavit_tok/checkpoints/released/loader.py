"""LaVIT's released files -> our tokenizer and pixel decoder (their names and layout: names.py).

Sizes are read from the shapes of the tensors, except for the number of heads (see head_count).
Models are built on the meta device, compared with the files tensor by tensor, and filled as the
files are read, so that loading needs hardly more memory than the weights.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lavit_tok.checkpoints.released import names
from lavit_tok.checkpoints.released.pickled import (
    FileMapping,
    PickledTensors,
    Shape,
    TensorRecipe,
    expand,
)
from lavit_tok.checkpoints.weights import WeightsError, empty
from lavit_tok.config import ConfigError, TokenizerConfig
from lavit_tok.nn.attention import Formula
from lavit_tok.tokenizer import VisualTokenizer

if TYPE_CHECKING:
    from lavit_tok.decode.pipeline import PixelDecoder


def head_count(width: int) -> int:
    """Attention heads of a release of this width, which the shapes of the tensors do not show.

    Heads have dimension 88, as published (16 heads at width 1408), if that divides the width.
    For other widths dimension 16, or else 4 heads, is assumed; load_released warns of it.
    """
    if width % 88 == 0:
        return width // 88
    return width // 16 if width % 16 == 0 else math.gcd(width, 4)


def load_released(
    directory: str | os.PathLike[str],
    decoder: names.DecoderKind | None = None,
    *,
    attention: Formula = "compat",
    num_heads: int | None = None,
    continuous: bool | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[VisualTokenizer, PixelDecoder | None]:
    """Load the released LaVIT weights; only the files needed are opened.

    Args:
        directory: with the layout of released/names.py.
        decoder: pixel decoder to load. The tokenizer then shares its reconstructor. Without a
            decoder the tokenizer gets the low-res reconstructor, else the high-res one, else none,
            so that it only encodes.
        attention: "compat" is the formula that these weights were trained with; for "strict" see
            nn/attention.py.
        num_heads: attention heads of every model; by default head_count(width).
        continuous: load what VisualTokenizer.embed needs; by default if its file exists.
        dtype: of the weights; selector and codebook stay in float32.
        device: of the weights.

    Returns:
        The tokenizer, and the decoder or None.

    Raises:
        WeightsError: absent files; missing, unexpected or mis-shaped tensors, all listed by file; a
            file with more than tensors, of which no code is run.
        ValueError: an unknown decoder, or a number of heads that does not divide the width.
    """
    if decoder not in ("highres", "lowres", None):
        raise ValueError(f"decoder: expected 'highres', 'lowres' or None, got {decoder!r}")
    root = Path(directory)
    files = {
        part: PickledTensors([path], names.FILES[part])
        for part, path in _find(root, decoder, continuous).items()
    }
    config = _read_config(files, num_heads, attention)
    models = nn.ModuleDict({"tokenizer": empty(lambda: VisualTokenizer(config), dtype)})
    mappings = _tokenizer_mappings(files, config)
    if decoder is not None:
        # Imported here, since encoding alone needs no diffusers.
        from lavit_tok.checkpoints.released import pixel_decoder

        models.update(pixel_decoder.build(root, decoder, files, config, dtype))
        mappings = pixel_decoder.add_mappings(root, decoder, files, models, mappings)
    ours = models.state_dict()
    problems = [line for mapping in mappings for line in mapping.problems(ours)]
    if problems:
        raise WeightsError(
            f"{root}: these files do not hold what the model needs:\n" + "\n".join(problems)
        )
    filled = _constants(ours, device)
    for mapping in mappings:
        filled.update(mapping.read(ours, device))
    if decoder is not None:
        filled.update(pixel_decoder.shared(ours, filled))
    models.load_state_dict(filled, assign=True)
    tokenizer = models["tokenizer"]
    assert isinstance(tokenizer, VisualTokenizer)
    return tokenizer, None if decoder is None else pixel_decoder.pipeline(root, decoder, models)


def _find(
    root: Path, decoder: names.DecoderKind | None, continuous: bool | None
) -> dict[str, Path]:
    """Paths of the files to read. Raises WeightsError listing those that are missing."""
    wanted = ["encoder", "tokenizer"]
    present = [kind for kind in ("lowres", "highres") if (root / names.FILES[kind]).is_file()]
    wanted += [decoder] if decoder else present[:1]
    if decoder == "lowres":
        wanted.append("null")
    if continuous or (continuous is None and (root / names.FILES["continuous"]).is_file()):
        wanted.append("continuous")
    paths = {part: root / names.FILES[part] for part in wanted}
    absent = [names.FILES[part] for part, path in paths.items() if not path.is_file()]
    if absent:
        expected = "expected the files of a LaVIT release"
        raise WeightsError(f"{root}: {expected}, these are missing: {', '.join(absent)}")
    return paths


class _Shapes:
    """Shapes that determine the sizes of a model; missing ones are collected for one message."""

    def __init__(self, files: dict[str, PickledTensors]) -> None:
        self.files = {part: (file.label, file.shapes) for part, file in files.items()}
        self.problems: list[str] = []

    def of(self, part: str, name: str, ndim: int) -> Shape:
        label, shapes = self.files[part]
        shape = shapes.get(name)
        if shape is None or len(shape) != ndim or 0 in shape:
            got = "missing    " if shape is None else "mis-shaped "
            sizes = f"expected {ndim} dimensions, got {shape and list(shape)}"
            self.problems.append(f"{label}: {got} {name}: {sizes}")
            return (1,) * ndim
        return shape

    def depth(self, part: str, prefix: str = "") -> int:
        """Number of blocks."""
        pattern = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
        return len({match[1] for name in self.files[part][1] if (match := pattern.match(name))})


def _read_config(
    files: dict[str, PickledTensors], num_heads: int | None, attention: Formula
) -> TokenizerConfig:
    """The config that the shapes of the tensors imply."""
    shapes = _Shapes(files)
    width, _, patch, _ = shapes.of("encoder", "patch_embed.proj.weight", 4)
    patches = shapes.of("encoder", "pos_embed", 3)[1] - 1
    codes, code_dim = shapes.of("tokenizer", "quantize.embedding.weight", 2)
    encoder_mlp = shapes.of("encoder", "blocks.0.mlp.fc1.bias", 1)[0]
    mlp = shapes.of("tokenizer", "causal_encoder.blocks.0.mlp.fc1.bias", 1)[0]
    llm_width = shapes.of("continuous", "vit_proj.bias", 1)[0] if "continuous" in files else 0
    if shapes.problems:
        raise WeightsError(
            "tensors that determine the size of the model are missing:\n"
            + "\n".join(shapes.problems)
        )
    side = math.isqrt(patches)
    if side * side != patches or side == 0:
        expected = f"expected 1 + a square number of positions, got 1 + {patches}"
        raise WeightsError(f"{files['encoder'].label}: pos_embed: {expected}")
    if num_heads is None:
        num_heads = head_count(width)
        if width % 88:
            warnings.warn(
                f"the number of attention heads is not in the weights; for width {width} it is "
                f"assumed to be {num_heads}. With a wrong number every code would be wrong: set "
                "load_released(num_heads=...)",
                stacklevel=3,
            )
    published = TokenizerConfig.mlp_ratio
    encoder = {
        **TokenizerConfig.lavit().encoder,
        "hidden_size": width,
        "intermediate_size": encoder_mlp,
        "num_hidden_layers": shapes.depth("encoder"),
        "num_attention_heads": num_heads,
        "image_size": side * patch,
        "patch_size": patch,
    }
    reconstructor = next((kind for kind in ("lowres", "highres") if kind in files), None)
    try:
        return TokenizerConfig(
            encoder=encoder,
            codebook_size=codes,
            code_dim=code_dim,
            merger_depth=shapes.depth("tokenizer", "causal_encoder."),
            merger_position=False,
            dither=False,
            reconstructor_depth=shapes.depth(reconstructor) if reconstructor else 0,
            num_heads=num_heads,
            mlp_ratio=published if int(width * published) == mlp else (mlp + 0.5) / width,
            attention=attention,
            continuous_width=llm_width,
            continuous_depth=shapes.depth("continuous", "causal_encoder.") if llm_width else 0,
        )
    except ConfigError as error:
        raise WeightsError(f"the shapes of this release fit no model: {error}") from None


def _tokenizer_mappings(
    files: dict[str, PickledTensors], config: TokenizerConfig
) -> list[FileMapping]:
    """The tensors of the tokenizer that each file fills."""
    merger, depth = "tokenizer.merger.", config.merger_depth
    layers = config.encoder["num_hidden_layers"]
    continuous, depth_c = "tokenizer.continuous.", config.continuous_depth
    recipes: dict[str, dict[str, TensorRecipe]] = {
        "encoder": expand(names.ENCODER, layers, "tokenizer.encoder.model."),
        "tokenizer": {
            **expand(names.SELECTOR, 0, "tokenizer.selector.", "token_predictor."),
            **expand(names.MERGER, depth, merger, "causal_encoder."),
            **expand(names.QUANTIZER, 0, "tokenizer.quantizer."),
        },
        "continuous": {
            **expand(names.MERGER, depth_c, f"{continuous}merger.", "causal_encoder."),
            **expand(names.CONTINUOUS, 0, continuous),
        },
    }
    for kind in ("lowres", "highres"):
        depth = config.reconstructor_depth
        recipes[kind] = expand(names.RECONSTRUCTOR, depth, "tokenizer.reconstructor.")
    return [
        FileMapping(file, recipes[key], names.DROPPED.get(key, ()))
        for key, file in files.items()
        if key in recipes
    ]


def _constants(ours: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The encoder's final norm, which transformers' class has and LaVIT does not apply."""
    norm = "tokenizer.encoder.model.post_layernorm."
    filled = {norm + "weight": torch.ones_like, norm + "bias": torch.zeros_like}
    return {name: make(ours[name], device=device) for name, make in filled.items()}

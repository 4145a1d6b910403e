"""LaVIT's released files -> our tokenizer and pixel decoder (names and layout: released_names.py).

Sizes are read off the tensors, except for the number of heads, which leaves no trace there (see head_count). Models are
built without memory, compared with the files tensor by tensor, and filled as the files are read: loading needs the
weights' own size and little more.
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
    """Attention heads of a release of this width; tensors have the same shapes for any number of heads.

    Heads are 88 wide, as published (16 heads at width 1408), wherever that divides the width. Smaller models have
    heads of 16, or else 4 heads; load_released says so, and takes another number.
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
    """The released LaVIT weights in our classes. Only files that this needs are opened.

    Args:
        directory: laid out as released_names.py shows.
        decoder: which pixel decoder to load too. The tokenizer's reconstructor is then that decoder's, and both share
            its memory. Without a decoder it is the low-res one, else the high-res one, else none: such a tokenizer
            only encodes.
        attention: "compat" is the formula that these weights were trained with; "strict" see attention.py.
        num_heads: attention heads of every part; head_count(width) if not given.
        continuous: load what VisualTokenizer.embed needs; by default if its file is there.
        dtype: of the weights, whatever the files hold; selector and codebook stay in float32.
        device: where the weights go.

    Returns: the tokenizer, and the decoder or None.

    Raises:
        WeightsError: absent files; missing, unexpected or mis-shaped tensors, all listed by file; a file that asks for
            more than tensors, nothing of which is run.
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
    parts = _tokenizer_parts(files, config)
    if decoder is not None:
        from lavit_tok.checkpoints.released import (
            pixel_decoder as drawing,  # here, so that only those who draw import diffusers
        )

        models.update(drawing.build(root, decoder, files, config, dtype))
        parts = drawing.add_parts(root, decoder, files, models, parts)
    ours = models.state_dict()
    problems = [line for part in parts for line in part.problems(ours)]
    if problems:
        raise WeightsError(
            f"{root}: these files do not hold what the model needs:\n" + "\n".join(problems)
        )
    filled = _constants(ours, device)
    for part in parts:
        filled.update(part.read(ours, device))
    if decoder is not None:
        filled.update(drawing.shared(ours, filled))
    models.load_state_dict(filled, assign=True)
    tokenizer = models["tokenizer"]
    assert isinstance(tokenizer, VisualTokenizer)
    return tokenizer, None if decoder is None else drawing.pipeline(root, decoder, models)


def _find(
    root: Path, decoder: names.DecoderKind | None, continuous: bool | None
) -> dict[str, Path]:
    """Paths of the files to read. Raises WeightsError listing those that are needed and absent."""
    wanted = ["encoder", "tokenizer"]
    wanted += (
        [decoder]
        if decoder
        else [kind for kind in ("lowres", "highres") if (root / names.FILES[kind]).is_file()][:1]
    )
    if decoder == "lowres":
        wanted.append("null")
    if continuous or (continuous is None and (root / names.FILES["continuous"]).is_file()):
        wanted.append("continuous")
    paths = {part: root / names.FILES[part] for part in wanted}
    absent = [names.FILES[part] for part, path in paths.items() if not path.is_file()]
    if absent:
        raise WeightsError(
            f"{root}: expected the files of a LaVIT release, these are missing: {', '.join(absent)}"
        )
    return paths


class _Shapes:
    """Shapes that say how large a model is; asked for all, then checked, so that one message lists all that miss."""

    def __init__(self, files: dict[str, PickledTensors]) -> None:
        self.files = {part: (file.label, file.shapes) for part, file in files.items()}
        self.problems: list[str] = []

    def of(self, part: str, name: str, ndim: int) -> Shape:
        label, shapes = self.files[part]
        shape = shapes.get(name)
        if shape is None or len(shape) != ndim or 0 in shape:
            got = "missing    " if shape is None else "mis-shaped "
            self.problems.append(
                f"{label}: {got} {name}: expected {ndim} dimensions, got {shape and list(shape)}"
            )
            return (1,) * ndim
        return shape

    def depth(self, part: str, prefix: str = "") -> int:
        """Number of blocks."""
        pattern = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
        return len({match[1] for name in self.files[part][1] if (match := pattern.match(name))})


def _read_config(
    files: dict[str, PickledTensors], num_heads: int | None, attention: Formula
) -> TokenizerConfig:
    """Every size that the tensors show."""
    shapes = _Shapes(files)
    width, _, patch, _ = shapes.of("encoder", "patch_embed.proj.weight", 4)
    patches = shapes.of("encoder", "pos_embed", 3)[1] - 1
    codes, code_dim = shapes.of("tokenizer", "quantize.embedding.weight", 2)
    encoder_mlp = shapes.of("encoder", "blocks.0.mlp.fc1.bias", 1)[0]
    mlp = shapes.of("tokenizer", "causal_encoder.blocks.0.mlp.fc1.bias", 1)[0]
    llm_width = shapes.of("continuous", "vit_proj.bias", 1)[0] if "continuous" in files else 0
    if shapes.problems:
        raise WeightsError(
            "tensors that say how large the model is are missing:\n" + "\n".join(shapes.problems)
        )
    side = math.isqrt(patches)
    if side * side != patches or side == 0:
        raise WeightsError(
            f"{files['encoder'].label}: pos_embed: expected 1 + a square number of rows, got 1 + {patches}"
        )
    if num_heads is None:
        num_heads = head_count(width)
        if width % 88:
            warnings.warn(
                f"the number of attention heads cannot be read off tensors; for width {width} it is taken to be "
                f"{num_heads}: if that is wrong, so is every code; load_released(num_heads=...) sets it",
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
        raise WeightsError(f"the tensors of this release make no model: {error}") from None


def _tokenizer_parts(
    files: dict[str, PickledTensors], config: TokenizerConfig
) -> list[FileMapping]:
    """What of the tokenizer each file fills."""
    merger, depth = "tokenizer.merger.", config.merger_depth
    layers = config.encoder["num_hidden_layers"]
    sources: dict[str, dict[str, TensorRecipe]] = {
        "encoder": expand(names.ENCODER, layers, "tokenizer.encoder.model."),
        "tokenizer": {
            **expand(names.SELECTOR, 0, "tokenizer.selector.", "token_predictor."),
            **expand(names.MERGER, depth, merger, "causal_encoder."),
            **expand(names.QUANTIZER, 0, "tokenizer.quantizer."),
        },
        "continuous": {
            **expand(
                names.MERGER,
                config.continuous_depth,
                "tokenizer.continuous.merger.",
                "causal_encoder.",
            ),
            **expand(names.CONTINUOUS, 0, "tokenizer.continuous."),
        },
    }
    for kind in ("lowres", "highres"):
        sources[kind] = expand(
            names.RECONSTRUCTOR, config.reconstructor_depth, "tokenizer.reconstructor."
        )
    return [
        FileMapping(file, sources[part], names.DROPPED.get(part, ()))
        for part, file in files.items()
        if part in sources
    ]


def _constants(ours: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The norm after the encoder's last block, which LaVIT does not apply but transformers has a place for."""
    norm = "tokenizer.encoder.model.post_layernorm."
    filled = {norm + "weight": torch.ones_like, norm + "bias": torch.zeros_like}
    return {name: make(ours[name], device=device) for name, make in filled.items()}

"""TokenizerConfig: every size and option of a visual tokenizer, as a frozen, validated record."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from lavit_tok.nn.ranges import is_number

FORMAT, FORMAT_VERSION = "lavit_tok.tokenizer", 1
Config = TypeVar("Config")


class ConfigError(ValueError):
    """A config entry that is unknown, of the wrong type or out of range."""


def _default_encoder() -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": 64,
        "patch_size": 8,
        "hidden_act": "gelu",
    }


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes and options of a tokenizer; the defaults are the shipped model's.

    `TokenizerConfig.lavit()` has the published sizes. Preprocessing is configured separately, by
    `VisualImageProcessor`.

    Raises:
        ConfigError: naming the entry, what was expected and what was received.
    """

    encoder: dict[str, Any] = field(default_factory=_default_encoder)
    """Config of a transformers vision model, with its model_type (see vision_encoder.ENCODERS)."""
    encoder_norm: bool = False
    """Apply the encoder's final norm; LaVIT uses the residual stream before it."""
    codebook_size: int = 2048
    """K, the number of codes."""
    code_dim: int = 16
    """Dimension of the codebook entries; of selected codes they are L2-normalized."""
    dither: bool = True
    """Spread kept patches by a fixed pattern (allocation.ordered_noise); False in LaVIT."""
    merger_depth: int = 2
    """Blocks of the merger; 0 quantizes the kept patches unchanged. Nested codes have no merger."""
    merger_position: bool = True
    """Add learned positions in the merger; False in LaVIT, whose features encode them."""
    reconstructor_depth: int = 3
    """Blocks of the reconstructor (codes -> features); 0 for an encode-only model."""
    num_heads: int = 3
    """Attention heads of merger and reconstructor."""
    mlp_ratio: float = 4.3637
    """The intermediate size of each MLP is int(width * mlp_ratio), as in EVA-CLIP."""
    attention: Literal["strict", "compat"] = "strict"
    """Masking of the merger: strict excludes keys exactly, compat is the released formula."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the LayerNorms of selector, merger and reconstructor."""
    continuous_width: int = 0
    """Dimension of the vectors that `VisualTokenizer.embed` returns; 0 for no continuous path."""
    continuous_depth: int = 0
    """Blocks of the merger of the continuous path."""
    sequence: Literal["selected", "nested"] = "selected"
    """Which patches have codes, and their order. "selected": those that the selector keeps, in
    raster order (LaVIT). "nested": one fixed order of all patches, of which every prefix covers the
    image, each code of the residual of those before it (encode/nested_quantizer.py)."""
    patch_dim: int = 0
    """Dimension of the vector of a patch that nested codes add up to; 0 for selected codes."""
    color_cells: int = 0
    """The reconstructor of nested codes also predicts the mean colors of this number of cells per
    patch side; 0 for none."""
    error_hidden: int = 0
    """Width of the heads that predict an image's error at every number of nested codes
    (encode/error_head.py); 0 for none."""
    price: float = 0.0
    """Smallest reduction of the predicted error by one more code, without a budget."""
    priced: str = "cosine"
    """That error: "cosine" for 1 - centered cosine of the features, "colors" for the mean squared
    error of the patches' colors in 0..1."""

    def __post_init__(self) -> None:
        is_model = isinstance(self.encoder, dict) and "model_type" in self.encoder
        self._require("encoder", is_model, "a dict with model_type")
        minimum = {"codebook_size": 2, "code_dim": 1, "merger_depth": 0, "reconstructor_depth": 0}
        for name, low in {**minimum, "continuous_width": 0, "continuous_depth": 0}.items():
            value = getattr(self, name)
            is_valid = type(value) is int and value >= low
            self._require(name, is_valid, f"an integer of at least {low}")
        expected = "a multiple of 4 (the selector halves it twice)"
        self._require("width", self.width % 4 == 0, expected)
        heads = self.num_heads
        divides = type(heads) is int and heads > 0 and self.width % heads == 0
        self._require("num_heads", divides, f"a divisor of {self.width}")
        for name in ("encoder_norm", "merger_position", "dither"):
            self._require(name, type(getattr(self, name)) is bool, "true or false")
        for name in ("mlp_ratio", "layer_norm_eps"):
            value = getattr(self, name)
            self._require(name, is_number(value) and value > 0, "a positive number")
        self._require("sequence", self.sequence in ("selected", "nested"), "'selected' or 'nested'")
        for name in ("patch_dim", "color_cells", "error_hidden"):
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= 0, "an integer of at least 0")
        self._require("price", is_number(self.price) and self.price >= 0, "a number from 0 on")
        self._require("priced", self.priced in ("cosine", "colors"), "'cosine' or 'colors'")
        self._require(
            "priced",
            self.priced == "cosine" or self.color_cells > 0,
            "'cosine' without color_cells",
        )
        if self.sequence == "nested":
            side = self.image_size // self.patch_size
            expected = "'nested' only with a power of two of patches per side"
            self._require("sequence", side & (side - 1) == 0, expected)
            patches = 1 if side == 1 else 4  # of the smallest area
            fits = 0 < self.code_dim <= patches * self.patch_dim
            self._require("patch_dim", fits, f"at least code_dim / {patches} for nested codes")
            most = self.width + 3 * self.color_cells**2  # what it is fitted to
            expected = f"at most {most}, the width and the numbers of the colors"
            self._require("patch_dim", self.patch_dim <= most, expected)
            self._require("attention", self.attention == "strict", "'strict' for nested codes")
            self._require("continuous_width", self.continuous_width == 0, "0 for nested codes")
        else:
            for name in ("color_cells", "patch_dim", "error_hidden"):
                self._require(name, getattr(self, name) == 0, "0, unless codes are nested")
        self._require("attention", self.attention in ("strict", "compat"), "'strict' or 'compat'")
        patch = self.patch_size
        self._require(
            "image_size", self.image_size % patch == 0, f"a multiple of patch_size {patch}"
        )

    def _require(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _encoder_int(self, name: str) -> int:
        value = self.encoder.get(name)
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]
        patches = self.encoder.get("num_patches")
        if name == "image_size" and value is None and type(patches) is int and patches > 0:
            value = math.isqrt(patches) * self.patch_size  # SigLIP2 has num_patches instead
        if type(value) is not int or value < 1:
            raise ConfigError(f"encoder.{name}: expected a positive integer, got {value!r}")
        return value

    @property
    def width(self) -> int:
        """d, the hidden size of encoder, selector, merger and reconstructor."""
        return self._encoder_int("hidden_size")

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self._encoder_int("image_size")

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return self._encoder_int("patch_size")

    @property
    def num_patches(self) -> int:
        """n, the number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def positions(self) -> int | None:
        """Number of the merger's learned positions: n, or None."""
        return self.num_patches if self.merger_position else None

    @property
    def mlp_width(self) -> int:
        """Intermediate size of the MLPs."""
        return int(self.width * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(self),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenizerConfig:
        """The inverse of to_dict. Raises ConfigError."""
        values = dict(values)
        kind = values.pop("format", FORMAT)
        version = values.pop("format_version", FORMAT_VERSION)
        if (kind, version) != (FORMAT, FORMAT_VERSION):
            expected = f"expected format {FORMAT} version {FORMAT_VERSION}"
            raise ConfigError(f"{expected}, got {kind} {version}")
        require_known(values, {f.name for f in dataclasses.fields(cls)})
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"not a tokenizer config: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> TokenizerConfig:
        """Read config.json. Raises ConfigError naming the file."""
        return read_config(path, cls.from_dict)

    @classmethod
    def lavit(cls, **changes: Any) -> TokenizerConfig:
        """The published sizes: EVA-CLIP ViT-g/14, 12 + 12 blocks, 16,384 codes of 32 numbers."""
        encoder = {
            "model_type": "blip_2_vision_model",
            "hidden_size": 1408,
            "intermediate_size": 6144,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        }
        published: dict[str, Any] = {
            "encoder": encoder,
            "codebook_size": 16384,
            "code_dim": 32,
            "merger_depth": 12,
            "merger_position": False,
            "dither": False,
            "reconstructor_depth": 12,
            "num_heads": 16,
        }
        return cls(**{**published, **changes})


def read_config(path: str | os.PathLike[str], build: Callable[[dict[str, Any]], Config]) -> Config:
    """Build a config from a file with a JSON object. Raises ConfigError naming the file."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    try:
        return build(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def require_known(values: dict[str, Any], known: set[str]) -> None:
    """Raise ConfigError for entries that are not among the known names."""
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"unknown entries {unknown}: ignoring them would change the model")

"""TokenizerConfig: every setting that shapes a visual tokenizer; one frozen record, JSON in and out, validated."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

FORMAT_VERSION = 1
Config = TypeVar("Config")


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or out of range."""


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
    """Shape of a tokenizer. The defaults are the shipped laptop model; `TokenizerConfig.lavit()` is the paper's.

    Raises:
        ConfigError: naming the setting, what was expected and what came.
    """

    encoder: dict[str, Any] = field(default_factory=_default_encoder)
    """A transformers vision config as JSON, with its model_type (see encoder.ENCODERS)."""
    encoder_norm: bool = False
    """Apply the encoder's final norm to the features; LaVIT reads the residual stream before it."""
    codebook_size: int = 2048
    """K, the number of codes."""
    code_dim: int = 16
    """Width of a codebook row; rows and queries are L2-normalised."""
    dither: bool = True
    """Spread the kept patches by a fixed pattern (selector.ordered_noise); False (LaVIT) keeps by the score alone."""
    merger_depth: int = 2
    """Blocks of the merger; 0 quantises the kept patches as they are."""
    merger_position: bool = True
    """Tell the merger where each patch stands (learned positions); False (LaVIT) where the features tell."""
    reconstructor_depth: int = 3
    """Blocks of the reconstructor (codes -> features of every patch); 0: none, codes can be made but not read back."""
    num_heads: int = 3
    """Attention heads of merger and reconstructor."""
    mlp_ratio: float = 4.3637
    """Hidden width of every MLP is int(width * mlp_ratio), as in EVA-CLIP."""
    attention: Literal["strict", "compat"] = "strict"
    """How the merger masks: strict gives forbidden keys exactly no weight, compat is the released formula."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the LayerNorms of selector, merger and reconstructor."""
    continuous_width: int = 0
    """Width of the vectors that `VisualTokenizer.embed` gives a language model (see continuous.py); 0 for none."""
    continuous_depth: int = 0
    """Blocks of the second merger behind them."""

    def __post_init__(self) -> None:
        named = isinstance(self.encoder, dict) and "model_type" in self.encoder
        self._require("encoder", named, "a dict with model_type")
        least_values = {
            "codebook_size": 2,
            "code_dim": 1,
            "merger_depth": 0,
            "reconstructor_depth": 0,
        }
        for name, least in {**least_values, "continuous_width": 0, "continuous_depth": 0}.items():
            value = getattr(self, name)
            self._require(
                name, type(value) is int and value >= least, f"an integer of at least {least}"
            )
        self._require(
            "width", self.width % 4 == 0, "a multiple of 4 (the selector halves it twice)"
        )
        heads = self.num_heads
        divides = type(heads) is int and heads > 0 and self.width % heads == 0
        self._require("num_heads", divides, f"a divisor of {self.width}")
        for name in ("encoder_norm", "merger_position", "dither"):
            self._require(name, type(getattr(self, name)) is bool, "true or false")
        for name in ("mlp_ratio", "layer_norm_eps"):
            value = getattr(self, name)
            self._require(name, is_number(value) and value > 0, "a positive number")
        self._require("attention", self.attention in ("strict", "compat"), "'strict' or 'compat'")
        patch = self.patch_size
        self._require(
            "image_size", self.image_size % patch == 0, f"a multiple of patch_size {patch}"
        )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _encoder_int(self, name: str) -> int:
        value = self.encoder.get(name)
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]
        patches = self.encoder.get("num_patches")
        if (
            name == "image_size" and value is None and type(patches) is int and patches > 0
        ):  # SigLIP2 counts patches
            value = math.isqrt(patches) * self.patch_size
        if type(value) is not int or value < 1:
            raise ConfigError(f"encoder.{name}: expected a positive integer, got {value!r}")
        return value

    @property
    def width(self) -> int:
        """d, the encoder's feature width; selector, merger and reconstructor share it."""
        return self._encoder_int("hidden_size")

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self._encoder_int("image_size")

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self._encoder_int("patch_size")

    @property
    def num_patches(self) -> int:
        """n, patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def positions(self) -> int | None:
        """n if the merger is told positions, else None."""
        return self.num_patches if self.merger_position else None

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "lavit_tok.tokenizer",
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(self),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenizerConfig:
        values = dict(values)
        kind, version = (
            values.pop("format", "lavit_tok.tokenizer"),
            values.pop("format_version", FORMAT_VERSION),
        )
        if kind != "lavit_tok.tokenizer" or version != FORMAT_VERSION:
            raise ConfigError(
                f"expected format lavit_tok.tokenizer version {FORMAT_VERSION}, got {kind} {version}"
            )
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(
                f"unknown settings {unknown}: ignoring them would build another model than was saved"
            )
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
        """The published sizes (spec: EVA-CLIP ViT-g/14, 12 + 12 blocks, 16,384 codes of 32 numbers)."""
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
    """What `build` makes of a JSON object. Raises ConfigError naming the file."""
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


def is_number(value: Any) -> bool:
    """Whether this is a finite int or float (a bool is neither)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

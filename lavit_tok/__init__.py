"""lavit_tok: pictures <-> a dynamic number of discrete codes. Public names, in the order of the data path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lavit_tok.config import ConfigError, TokenizerConfig
from lavit_tok.images import ImageError
from lavit_tok.records import CodeError, VisualCodes
from lavit_tok.tokenizer import VisualTokenizer
from lavit_tok.weights import WeightsError

if TYPE_CHECKING:
    from lavit_tok.decoder import PixelDecoder

__version__ = "0.1.0"
__all__ = [
    "CodeError",
    "ConfigError",
    "ImageError",
    "PixelDecoder",
    "TokenizerConfig",
    "VisualCodes",
    "VisualTokenizer",
    "WeightsError",
]


def __getattr__(name: str) -> Any:
    """PixelDecoder imports diffusers, so only whoever asks for it pays for it."""
    if name == "PixelDecoder":
        from lavit_tok.decoder import PixelDecoder

        return PixelDecoder
    raise AttributeError(f"module 'lavit_tok' has no attribute {name!r}")

"""lavit_tok: images <-> a dynamic number of discrete codes.

Public names in the order of the data path; each is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavit_tok.checkpoints.released.loader import load_released
    from lavit_tok.checkpoints.weights import WeightsError
    from lavit_tok.codes import CodeError, VisualCodes
    from lavit_tok.config import ConfigError, TokenizerConfig
    from lavit_tok.data.decode_batch import DecodeBatch, decode_batch
    from lavit_tok.data.shard_manifest import ShardError
    from lavit_tok.data.shard_reader import Shards
    from lavit_tok.data.tokenize_batch import TokenizeBatch, tokenize_batch
    from lavit_tok.decode.conditioner import Conditioning
    from lavit_tok.decode.pipeline import PixelDecoder
    from lavit_tok.encode.continuous import ContinuousPath
    from lavit_tok.encode.image_files import ImageError
    from lavit_tok.encode.image_processor import VisualImageProcessor
    from lavit_tok.tokenizer import VisualTokenizer
    from lavit_tok.training.data_module import ImageDataModule as ImageDataModule

__version__ = "0.1.0"
# Without ImageDataModule, which needs the extra "train".
__all__ = [
    "CodeError",
    "Conditioning",
    "ConfigError",
    "ContinuousPath",
    "DecodeBatch",
    "ImageError",
    "PixelDecoder",
    "ShardError",
    "Shards",
    "TokenizeBatch",
    "TokenizerConfig",
    "VisualCodes",
    "VisualImageProcessor",
    "VisualTokenizer",
    "WeightsError",
    "decode_batch",
    "load_released",
    "tokenize_batch",
]

_MODULES = {
    "ConfigError": "config",
    "TokenizerConfig": "config",
    "CodeError": "codes",
    "VisualCodes": "codes",
    "WeightsError": "checkpoints.weights",
    "ImageError": "encode.image_files",
    "VisualImageProcessor": "encode.image_processor",
    "ContinuousPath": "encode.continuous",
    "Conditioning": "decode.conditioner",
    "PixelDecoder": "decode.pipeline",
    "VisualTokenizer": "tokenizer",
    "load_released": "checkpoints.released.loader",
    "ShardError": "data.shard_manifest",
    "Shards": "data.shard_reader",
    "TokenizeBatch": "data.tokenize_batch",
    "tokenize_batch": "data.tokenize_batch",
    "DecodeBatch": "data.decode_batch",
    "decode_batch": "data.decode_batch",
    "ImageDataModule": "training.data_module",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use: `lavit-tok --help` needs no torch, encoding no diffusers."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lavit_tok' has no attribute {name!r}")
    value = getattr(import_module(f"lavit_tok.{_MODULES[name]}"), name)
    globals()[name] = value
    return value

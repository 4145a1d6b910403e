"""lavit_tok: pictures <-> a dynamic number of discrete codes. Public names, in the order of the data path."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavit_tok.attention import Block
    from lavit_tok.condition import Conditioning
    from lavit_tok.config import ConfigError, TokenizerConfig
    from lavit_tok.continuous import ContinuousPath
    from lavit_tok.decoder import PixelDecoder
    from lavit_tok.images import ImageError, to_uint8
    from lavit_tok.records import CodeError, VisualCodes
    from lavit_tok.shard_files import ShardError
    from lavit_tok.shards import Shards
    from lavit_tok.tokenizer import VisualTokenizer
    from lavit_tok.training.averaged import AveragedTraining
    from lavit_tok.training.common import logged_picture, logged_text, step_generator
    from lavit_tok.training.data import ImageDataModule
    from lavit_tok.training.denoising import Noised, denoising_loss, vae_latents
    from lavit_tok.training.shard_pictures import ShardPictures
    from lavit_tok.weights import WeightsError

__version__ = "0.1.0"
__all__ = [
    "AveragedTraining",
    "Block",
    "CodeError",
    "Conditioning",
    "ConfigError",
    "ContinuousPath",
    "ImageDataModule",
    "ImageError",
    "Noised",
    "PixelDecoder",
    "ShardError",
    "ShardPictures",
    "Shards",
    "TokenizerConfig",
    "VisualCodes",
    "VisualTokenizer",
    "WeightsError",
    "denoising_loss",
    "logged_picture",
    "logged_text",
    "step_generator",
    "to_uint8",
    "vae_latents",
]

_ROOMS = {
    "Block": "attention",
    "Conditioning": "condition",
    "ImageError": "images",
    "ConfigError": "config",
    "TokenizerConfig": "config",
    "CodeError": "records",
    "VisualCodes": "records",
    "WeightsError": "weights",
    "ContinuousPath": "continuous",
    "to_uint8": "images",
    "VisualTokenizer": "tokenizer",
    "PixelDecoder": "decoder",
    "ShardError": "shard_files",
    "Shards": "shards",
    "ShardPictures": "training.shard_pictures",
    "ImageDataModule": "training.data",
    "logged_picture": "training.common",
    "logged_text": "training.common",
    "step_generator": "training.common",
    "AveragedTraining": "training.averaged",
    "Noised": "training.denoising",
    "denoising_loss": "training.denoising",
    "vae_latents": "training.denoising",
}


def __getattr__(name: str) -> Any:
    """A name is imported when first asked for: `lavit-tok --help` pays for no torch, encoding for no diffusers."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'lavit_tok' has no attribute {name!r}")
    value = getattr(import_module(f"lavit_tok.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value

"""A tokenizer of nested codes at laptop size: 32 pixels, 16 patches."""

from __future__ import annotations

from typing import Any

import torch

from lavit_tok import PixelDecoder, TokenizerConfig, VisualTokenizer
from lavit_tok.decode.conditioner import Conditioner
from lavit_tok.decode.mean_decoder import MeanDecoder
from lavit_tok.decode.sample_decoder import SampleDecoder

SETTINGS: dict[str, Any] = {
    "encoder": {
        "model_type": "efficientnet_lite",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 24,
        "sources": [-1, 3],
    },
    "codebook_size": 16,
    "code_dim": 4,
    "patch_dim": 6,
    "reconstructor_depth": 1,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "sequence": "nested",
    "color_cells": 4,
}
"""Arguments of TokenizerConfig."""


def small_tokenizer() -> VisualTokenizer:
    """With the same random weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisualTokenizer(TokenizerConfig(**SETTINGS))


def small_decoder(tokenizer: VisualTokenizer, sample: bool = False) -> PixelDecoder:
    """With a mean decoder that adds something to the colors; also with a sample decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        conditioner = Conditioner.for_tokenizer(
            tokenizer.config, tokenizer.quantizer.codebook, tokenizer.reconstructor, cross_dims=()
        )
        mean = MeanDecoder(24, 16, 4, (16, 8, 8), groups=4)
        torch.nn.init.normal_(mean.blocks[-1][-1].weight, std=0.1)
        sampling = SampleDecoder.from_mean_decoder(mean) if sample else None
    return PixelDecoder(conditioner, mean_decoder=mean, sample_decoder=sampling)

"""Another tokenizer at laptop size, as factories that a command line can name."""

from __future__ import annotations

from typing import Any


def vqmodel(device: str) -> Any:
    return small()


def no_tokenizer(device: str) -> Any:
    return object()


def small() -> Any:
    from benchmarks.shared.tokenizers import VQModelTokenizer

    sizes = {"layers_per_block": 1, "latent_channels": 8, "num_vq_embeddings": 64}
    return VQModelTokenizer(32, block_out_channels=(32, 32, 32), **sizes)

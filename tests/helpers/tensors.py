"""Seeded random tensors, and a codebook of given entries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.encode.quantizer import Codebook


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Random vectors of length 1."""
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def codebook(entries: Tensor) -> Codebook:
    book = Codebook(*entries.shape)
    book.embeddings.copy_(entries)
    return book

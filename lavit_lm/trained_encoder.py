"""A copy of a visual tokenizer's encoder that is trained with a language model, as Emu and DaVinci train theirs."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lavit_tok import VisualTokenizer


def trained_encoder(tokenizer: VisualTokenizer) -> nn.Module:
    """The copy. Weights that no feature depends on (a final norm, a class token's head) stay frozen.

    They would never get a gradient, which processes that share gradients wait for.
    """
    encoder = copy.deepcopy(tokenizer.encoder).requires_grad_(True)
    weights = list(encoder.parameters())
    size = tokenizer.config.image_size
    pixels = torch.zeros(1, 3, size, size, device=weights[0].device, dtype=weights[0].dtype)
    with torch.enable_grad():
        gradients = torch.autograd.grad(encoder(pixels).sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)
    return encoder

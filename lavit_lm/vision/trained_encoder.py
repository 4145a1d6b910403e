"""Base of the connectors: the encoder of a visual tokenizer, frozen, or a copy that is trained."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lavit_tok import VisualTokenizer


class EncoderConnector(nn.Module):
    """A module that reads images through the encoder of a visual tokenizer.

    Args:
        tokenizer: the visual tokenizer; frozen, and neither a submodule nor in the state dict.
        train_encoder: train a copy of its encoder, the submodule "encoder", as Emu and DaVinci do.
    """

    def __init__(self, tokenizer: VisualTokenizer, train_encoder: bool = False) -> None:
        super().__init__()
        # In a list, so that nn.Module does not register it: neither trained, nor moved, nor saved.
        self._tokenizer = [tokenizer]
        if train_encoder:
            self.encoder = trained_encoder(tokenizer)
        tokenizer.requires_grad_(False).eval()

    def pixels(self, images: UInt8[Tensor, "k 3 h w"]) -> Float[Tensor, "k 3 h w"]:
        """Preprocessed images. Raises ValueError for another size than the tokenizer's."""
        return self._tokenizer[0].to(images.device).preprocess(images)

    def encoded(
        self, pixels: Float[Tensor, "k 3 h w"], dtype: torch.dtype
    ) -> Float[Tensor, "k p d"]:
        """Features of all patches, with gradients if the encoder is trained."""
        if hasattr(self, "encoder"):
            return self.encoder(pixels.to(dtype))
        with torch.no_grad():
            return self._tokenizer[0].features(pixels).to(dtype)


def trained_encoder(tokenizer: VisualTokenizer) -> nn.Module:
    """A copy of the encoder, in which weights that the features do not depend on stay frozen.

    Such weights (a final norm, the head of a class token) would never get a gradient, and DDP waits
    for the gradient of every trained weight.
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

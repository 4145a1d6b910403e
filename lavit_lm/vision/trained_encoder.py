"""A visual tokenizer's encoder under a bridge: as it is, or a copy that is trained, as Emu and DaVinci train theirs."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lavit_tok import VisualTokenizer


class EncoderReader(nn.Module):
    """A module that reads pictures through a visual tokenizer's encoder.

    Args:
        tokenizer: whose encoder makes the features; itself frozen and no part of this module.
        train_encoder: train a copy of the encoder, the submodule "encoder"; else the tokenizer's own is used, frozen.
    """

    def __init__(self, tokenizer: VisualTokenizer, train_encoder: bool) -> None:
        super().__init__()
        self._tokenizer = [tokenizer]  # in a list, out of sight of parameters() and state_dict()
        if train_encoder:
            self.encoder = trained_encoder(tokenizer)
        tokenizer.requires_grad_(False).eval()

    def pixels(self, images: UInt8[Tensor, "k 3 h w"]) -> Float[Tensor, "k 3 h w"]:
        """As the encoder takes them. Raises ValueError for pictures of another size than the tokenizer's."""
        return self._tokenizer[0].to(images.device).preprocess(images)

    def encoded(
        self, pixels: Float[Tensor, "k 3 h w"], dtype: torch.dtype
    ) -> Float[Tensor, "k p d"]:
        """Features of every patch; with a gradient where the encoder is trained."""
        if hasattr(self, "encoder"):
            return self.encoder(pixels.to(dtype))
        with torch.no_grad():
            return self._tokenizer[0].features(pixels).to(dtype)


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

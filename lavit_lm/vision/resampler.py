"""Images -> a fixed number of causal vectors of a language model's width (Emu, VL-GPT).

images [k 3 s s] -> encoder -> features [k p d] -> blocks over queries [k n d] -> vectors [k n
width]

        q1 q2 q3      features
q1      x  .  .       x x x x        a query attends to itself, the queries before it and all
q2      x  x  .       x x x x        features: the LM can predict the vectors one after another,
q3      x  x  x       x x x x        since a later vector never changes an earlier one
"""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from lavit_lm.vision.trained_encoder import EncoderConnector
from lavit_tok import VisualTokenizer
from lavit_tok.nn.attention import Block


class CausalResampler(EncoderConnector):
    """A transformer decoder over learned queries, the "causal transformer" of Emu and VL-GPT.

    Args:
        tokenizer: the visual tokenizer, frozen, whose encoder computes the features.
        width: of the vectors.
        queries: vectors per image; 32 in Emu and VL-GPT.
        depth: blocks of the transformer; 12 in Emu and VL-GPT.
        heads: attention heads of the transformer.
        train_encoder: train a copy of the encoder, the submodule "encoder".
        hidden_size: of the transformer; None for the encoder's.
        patch_positions: add a learned embedding of its patch to each feature, sines and cosines of
            its line and column at first: for an encoder that adds none, such as a convolutional
            network. False as published.

    Raises:
        ValueError: a number below 1, heads that do not divide the hidden size, or patch positions
            of a hidden size that 4 does not divide.
    """

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        width: int,
        queries: int = 32,
        depth: int = 12,
        heads: int = 12,
        train_encoder: bool = False,
        hidden_size: int | None = None,
        patch_positions: bool = False,
    ) -> None:
        c = tokenizer.config
        hidden_size = c.width if hidden_size is None else hidden_size
        if min(queries, depth, heads, hidden_size) < 1 or hidden_size % heads:
            raise ValueError(
                "expected at least one query and block, and heads that divide the hidden size, got "
                f"{queries} queries, {depth} blocks, {heads} heads, hidden size {hidden_size}"
            )
        super().__init__(tokenizer, train_encoder)
        self.features_norm = nn.LayerNorm(c.width, c.layer_norm_eps)
        self.narrow = nn.Identity() if hidden_size == c.width else nn.Linear(c.width, hidden_size)
        self.queries = nn.Parameter(torch.randn(queries, hidden_size) * 0.02)
        # Of the features' size: an embedding near 0 stays too small beside them to be used
        self.patch_positions = positions(c.num_patches, hidden_size) if patch_positions else None
        self.blocks = nn.ModuleList(
            Block(hidden_size, heads, 4 * hidden_size, c.layer_norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(hidden_size, c.layer_norm_eps)
        self.projection = nn.Linear(hidden_size, width)

    def forward(
        self, images: UInt8[Tensor, "k 3 h w"], keep: Bool[Tensor, "j patches"]
    ) -> Float[Tensor, "m width"]:
        """Vectors of all images, one image after another; the keep mask is ignored.

        Raises:
            ValueError: images of another size than the tokenizer's.
        """
        return self.vectors(self.features(images)).flatten(0, 1)

    def features(self, images: UInt8[Tensor, "k 3 h w"]) -> Float[Tensor, "k p d"]:
        """Features of all patches, with gradients if the encoder is trained."""
        return self.encoded(self.pixels(images), self.queries.dtype)

    def vectors(self, features: Float[Tensor, "k p d"]) -> Float[Tensor, "k n width"]:
        """Vectors of each image, in the order of the queries."""
        n = len(self.queries)
        x = self.queries.expand(len(features), -1, -1)
        causal = torch.ones(1, 1, n, n, dtype=torch.bool, device=x.device).tril()
        context = self.narrow(self.features_norm(features))
        if self.patch_positions is not None:
            context = context + self.patch_positions
        for block in self.blocks:
            x = block(x, context, causal, None)
        return self.projection(self.norm(x))


def positions(patches: int, size: int) -> nn.Parameter:
    """[patches size], sines and cosines of line and column. Raises ValueError."""
    if size % 4:
        raise ValueError(
            f"patch_positions: expected a hidden size that 4 divides, for sines and cosines of two "
            f"coordinates, got {size}"
        )
    return nn.Parameter(get_2d_sincos_pos_embed(size, math.isqrt(patches)).float())

"""Images -> a fixed number of causal vectors of a language model's width (Emu, VL-GPT).

images [k 3 s s] -> encoder -> features [k p d] -> blocks over queries [k n d] -> vectors [k n
width]

        q1 q2 q3      features
q1      x  .  .       x x x x        a query attends to itself, the queries before it and all
q2      x  x  .       x x x x        features: the LM can predict the vectors one after another,
q3      x  x  x       x x x x        since a later vector never changes an earlier one
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from lavit_lm.vision.patch_vectors import mean_of_squares, require_squares
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
        pooled_queries: add to each query the mean feature of its square of patches (the drawing of
            patch_vectors.py), so that each vector is of a position before anything is learned.
            False as published.

    Raises:
        ValueError: a number below 1, heads that do not divide the hidden size, or pooled queries
            whose number is not that of squares of patches.
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
        pooled_queries: bool = False,
    ) -> None:
        c = tokenizer.config
        hidden_size = c.width if hidden_size is None else hidden_size
        if min(queries, depth, heads, hidden_size) < 1 or hidden_size % heads:
            raise ValueError(
                "expected at least one query and block, and heads that divide the hidden size, got "
                f"{queries} queries, {depth} blocks, {heads} heads, hidden size {hidden_size}"
            )
        if pooled_queries:
            require_squares(queries, c.num_patches)
        super().__init__(tokenizer, train_encoder)
        self.pooled_queries = pooled_queries
        self.features_norm = nn.LayerNorm(c.width, c.layer_norm_eps)
        self.narrow = nn.Identity() if hidden_size == c.width else nn.Linear(c.width, hidden_size)
        self.queries = nn.Parameter(torch.randn(queries, hidden_size) * 0.02)
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
        context = self.narrow(self.features_norm(features))
        x = self.queries.expand(len(features), -1, -1)
        if self.pooled_queries:
            x = x + mean_of_squares(context, n)
        causal = torch.ones(1, 1, n, n, dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            x = block(x, context, causal, None)
        return self.projection(self.norm(x))

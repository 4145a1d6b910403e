"""Pictures -> a fixed number of causal vectors at a language model's width: what Emu and VL-GPT read, and say.

pictures [k 3 s s] -> encoder -> features [k p d] -> queries [k n d], blocks -> LayerNorm, linear -> [k n width]

            q1 q2 q3      features
    q1      x  .  .       x x x x        a query sees those before it and itself, and all of the picture: a later
    q2      x  x  .       x x x x        vector can add to an earlier one, never change it, so that they can be said
    q3      x  x  x       x x x x        one after another
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from lavit_lm.vision.trained_encoder import EncoderReader
from lavit_tok import VisualTokenizer
from lavit_tok.nn.attention import Block


class CausalResampler(EncoderReader):
    """A transformer decoder over learned queries (Emu, "Causal Transformer"; VL-GPT, "causal transformer").

    Args:
        tokenizer: the visual tokenizer, whose encoder makes the features; itself frozen and no part of this module.
        width: of the vectors.
        queries: vectors a picture; Emu and VL-GPT use 32.
        depth, heads: of the transformer; Emu and VL-GPT use 12 blocks.
        train_encoder: train a copy of the encoder, the submodule "encoder"; else the tokenizer's own is used, frozen.
        hidden_size: width of the transformer, where it is not to be the encoder's.

    Raises:
        ValueError: a number below 1, or heads that do not divide the transformer's width.
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
    ) -> None:
        c = tokenizer.config
        hidden_size = c.width if hidden_size is None else hidden_size
        if min(queries, depth, heads, hidden_size) < 1 or hidden_size % heads:
            raise ValueError(
                f"expected at least one query and block, and heads that divide the transformer's width, got {queries} "
                f"queries, {depth} blocks, {heads} heads, width {hidden_size}"
            )
        super().__init__(tokenizer, train_encoder)
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
        """Vectors of all pictures, one picture after another; `kept` is not asked, every patch is read.

        Raises:
            ValueError: pictures of another size than the tokenizer's.
        """
        return self.vectors(self.features(images)).flatten(0, 1)

    def features(self, images: UInt8[Tensor, "k 3 h w"]) -> Float[Tensor, "k p d"]:
        """Of every patch; with a gradient where the encoder is trained."""
        return self.encoded(self.pixels(images), self.queries.dtype)

    def vectors(self, features: Float[Tensor, "k p d"]) -> Float[Tensor, "k n width"]:
        """Of each picture, in the queries' order."""
        n = len(self.queries)
        x = self.queries.expand(len(features), -1, -1)
        causal = torch.ones(1, 1, n, n, dtype=torch.bool, device=x.device).tril()
        context = self.narrow(self.features_norm(features))
        for block in self.blocks:
            x = block(x, context, causal, None)
        return self.projection(self.norm(x))

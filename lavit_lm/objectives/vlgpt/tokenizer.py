"""VL-GPT's stage 1: images -> vectors -> condition embeddings that generate the images again.

images -CausalResampler-> x_v [b k width] -Detokenizer-> z_v [b n c], z_t [b m e] -diffusion model->
images

attention in the detokenizer, for 2 tokens of the image condition and 2 of the text condition:

        v1 v2 t1 t2     x_v
v1      x  x  .  .      x x x x x     not causal; the two conditions are estimated independently,
v2      x  x  .  .      x x x x x     so that either can be left out, of the loss or of an image
t1      .  .  x  x      x x x x x
t2      .  .  x  x      x x x x x
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from lavit_lm.objectives.vlgpt.diffusion import ConditionEmbeddings, Shape
from lavit_lm.vision.resampler import CausalResampler
from lavit_tok import VisualTokenizer
from lavit_tok.nn.attention import Block


@dataclass(frozen=True)
class VLGPTTokenizerConfig:
    """Sizes of the tokenizer's transformer, and of the detokenizer's, which has the same.

    Args:
        width: of the vectors; the LM's hidden size.
        queries: N, vectors per image; 32 as published.
        depth, heads: 12 blocks as published.
        hidden_size: width of the transformers.
        pooled_queries: each also has the mean feature of a square of patches, see CausalResampler.
    """

    width: int
    queries: int = 32
    depth: int = 12
    heads: int = 12
    hidden_size: int = 768
    pooled_queries: bool = False

    def resampler(self, visual: VisualTokenizer) -> CausalResampler:
        """The tokenizer, with new weights. Raises ValueError for impossible sizes."""
        return CausalResampler(
            visual,
            self.width,
            self.queries,
            self.depth,
            self.heads,
            hidden_size=self.hidden_size,
            pooled_queries=self.pooled_queries,
        )


class Detokenizer(nn.Module):
    """A transformer decoder with one query per token of the conditions (VL-GPT, section 3.1).

    Args:
        config: see VLGPTTokenizerConfig.
        image, text: (tokens, width) of the conditions; None for one that the diffusion model does
            not have.

    Raises:
        ValueError: neither condition.
    """

    def __init__(
        self, config: VLGPTTokenizerConfig, image: Shape | None, text: Shape | None
    ) -> None:
        super().__init__()
        shapes = {n: s for n, s in (("image", image), ("text", text)) if s is not None}
        if not shapes:
            raise ValueError(
                "a diffusion model without any condition: there is nothing to estimate"
            )
        size, eps = config.hidden_size, 1e-5
        self.vectors_norm = nn.LayerNorm(config.width, eps)
        self.read = nn.Linear(config.width, size)
        queries = {n: torch.randn(tokens, size) * 0.02 for n, (tokens, _) in shapes.items()}
        self.queries = nn.ParameterDict({n: nn.Parameter(q) for n, q in queries.items()})
        self.heads = nn.ModuleDict({n: nn.Linear(size, width) for n, (_, width) in shapes.items()})
        self.blocks = nn.ModuleList(
            Block(size, config.heads, 4 * size, eps) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(size, eps)

    def forward(self, vectors: Float[Tensor, "b k width"]) -> ConditionEmbeddings:
        """z_v and z_t."""
        context = self.read(self.vectors_norm(vectors))
        x = torch.cat(list(self.queries.values())).expand(len(vectors), -1, -1)
        mask = self.mask()
        for block in self.blocks:
            x = block(x, context, mask[None, None], None)
        parts = self.norm(x).split([len(queries) for queries in self.queries.values()], 1)
        embeddings = {n: self.heads[n](part) for n, part in zip(self.queries, parts, strict=True)}
        return ConditionEmbeddings(embeddings.get("image"), embeddings.get("text"))

    def mask(self) -> Bool[Tensor, "q q"]:
        """The drawing above: True where the query of the line attends to that of the column."""
        queries = self.queries.values()
        ones = [torch.ones(len(q), len(q), dtype=torch.bool, device=q.device) for q in queries]
        return torch.block_diag(*ones).bool()


class VLGPTTokenizer(nn.Module):
    """Tokenizer and detokenizer: the two transformers that stage 1 trains.

    Args:
        visual: the visual tokenizer, whose frozen encoder computes the features.
        config: see VLGPTTokenizerConfig.
        image, text: see Detokenizer.
    """

    def __init__(
        self,
        visual: VisualTokenizer,
        config: VLGPTTokenizerConfig,
        image: Shape | None,
        text: Shape | None,
    ) -> None:
        super().__init__()
        self.config, self.fingerprint = config, visual.fingerprint()
        self.shapes: tuple[Shape | None, Shape | None] = (image, text)
        self.tokenizer = config.resampler(visual)
        self.detokenizer = Detokenizer(config, image, text)

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> ConditionEmbeddings:
        """z_v and z_t of images."""
        return self.detokenizer(self.vectors(images))

    def vectors(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b k width"]:
        """x_v of images."""
        return self.tokenizer.vectors(self.tokenizer.features(images))

"""A transformer that reads the vectors of an image for whatever decodes them.

vectors [b n d], normalized  -read by one query for each feature->  features [b p w]
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lavit_tok.nn.attention import Block


@dataclass(frozen=True)
class VectorReaderConfig:
    """Sizes of a VectorReader.

    Args:
        width: d, of the vectors; the LM's hidden size.
        vectors: n, per image.
        features: w, width of the features.
        patches: p, number of features.
        depth, heads, hidden_size: blocks, heads and width of the transformer.

    Raises:
        ValueError: a number below 1, or heads that do not divide the width.
    """

    width: int
    vectors: int
    features: int
    patches: int
    depth: int = 2
    heads: int = 4
    hidden_size: int = 192

    def __post_init__(self) -> None:
        positive = all(isinstance(n, int) and n > 0 for n in asdict(self).values())
        if not positive or self.hidden_size % self.heads:
            raise ValueError(
                "expected integers above 0, and a hidden_size that is a multiple of heads, got "
                f"{self}"
            )


class VectorReader(nn.Module):
    """[b n d] -> [b p w]: one query per patch attends to the other queries and to all vectors.

    Vectors of different prompts differ little compared with their mean, so they are normalized by a
    mean and a standard deviation that `measure` computes once and the weights contain.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: VectorReaderConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, 1e-5
        self.config = config
        self.register_buffer("mean", torch.zeros(config.vectors, config.width))
        self.register_buffer("deviation", torch.ones(config.vectors, 1))
        self.read = nn.Linear(config.width, size)
        self.positions = nn.Parameter(torch.randn(config.vectors, size) * 0.02)
        self.queries = nn.Parameter(torch.randn(config.patches, size) * 0.02)
        self.blocks = nn.ModuleList(
            Block(size, config.heads, 4 * size, eps) for _ in range(config.depth)
        )
        self.out = nn.Sequential(nn.LayerNorm(size, eps), nn.Linear(size, config.features))

    def forward(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b p w"]:
        """Raises ValueError for vectors of another number or width."""
        self._require(vectors)
        context = self.read((vectors - self.mean) / self.deviation) + self.positions
        x = self.queries.expand(len(vectors), -1, -1)
        for block in self.blocks:
            x = block(x, context, None, None)
        return self.out(x)

    @torch.no_grad()
    def measure(self, vectors: Float[Tensor, "b n d"]) -> None:
        """Set mean [n d] and deviation [n 1] from vectors generated after different prompts.

        Raises:
            ValueError: vectors of another number or width.
        """
        self._require(vectors)
        self.mean.copy_(vectors.mean(0))
        deviation = (vectors - self.mean).square().mean((0, 2)).sqrt()
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0)[:, None])

    def _require(self, vectors: Float[Tensor, "b n d"]) -> None:
        config = self.config
        if tuple(vectors.shape[1:]) != (config.vectors, config.width):
            raise ValueError(
                f"expected {config.vectors} vectors of width {config.width} per image, got shape "
                f"{list(vectors.shape)}: this decoder was trained for another language model"
            )

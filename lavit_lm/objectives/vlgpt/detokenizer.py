"""VL-GPT's stage 1: pictures -> vectors that a language model can read and say -> conditions that draw them again.

pictures -CausalResampler-> x_v [b k width] -Detokenizer-> z_v [b n c], z_t [b m e] -diffusion model-> pictures

who sees whom in the detokenizer, of 2 tokens of the image condition and 2 of the text condition:

        v1 v2 t1 t2     x_v
v1      x  x  .  .      x x x x x     not causal; the conditions are estimated side by side, each as if the
v2      x  x  .  .      x x x x x     other were not there, so that either can be left out, in a picture or
t1      .  .  x  x      x x x x x     in the loss
t2      .  .  x  x      x x x x x
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from lavit_lm.objectives.vlgpt.conditions import DiffusionConditions, Shape
from lavit_lm.vision.resampler import CausalResampler
from lavit_tok import VisualTokenizer
from lavit_tok.nn.attention import Block


@dataclass(frozen=True)
class VLGPTTokenizerConfig:
    """Sizes of the tokenizer's transformer, and of the detokenizer's, which has the same.

    Args:
        width: of the vectors; the language model's.
        queries: N, vectors a picture; 32 as published.
        depth, heads: 12 blocks as published.
        hidden_size: width of the transformers.
    """

    width: int
    queries: int = 32
    depth: int = 12
    heads: int = 12
    hidden_size: int = 768

    def resampler(self, visual: VisualTokenizer) -> CausalResampler:
        """The tokenizer, with new weights. Raises ValueError for impossible sizes."""
        return CausalResampler(
            visual, self.width, self.queries, self.depth, self.heads, hidden_size=self.hidden_size
        )


class Detokenizer(nn.Module):
    """A transformer decoder with a learned query for each token of the conditions (VL-GPT, section 3.1).

    Args:
        shape: see VLGPTTokenizerConfig.
        image, text: (tokens, width) of the conditions; None for one that the diffusion model has not.

    Raises:
        ValueError: neither condition.
    """

    def __init__(
        self, shape: VLGPTTokenizerConfig, image: Shape | None, text: Shape | None
    ) -> None:
        super().__init__()
        if image is None and text is None:
            raise ValueError(
                "a diffusion model without any condition: there is nothing to estimate"
            )
        hidden_size, eps = shape.hidden_size, 1e-5
        self.vectors_norm = nn.LayerNorm(shape.width, eps)
        self.read = nn.Linear(shape.width, hidden_size)
        conditions = {"image": image, "text": text}
        present = {
            name: condition for name, condition in conditions.items() if condition is not None
        }
        self.queries = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(tokens, hidden_size) * 0.02)
                for name, (tokens, _) in present.items()
            }
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(hidden_size, width) for name, (_, width) in present.items()}
        )
        self.blocks = nn.ModuleList(
            Block(hidden_size, shape.heads, 4 * hidden_size, eps) for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(hidden_size, eps)

    def forward(self, vectors: Float[Tensor, "b k width"]) -> DiffusionConditions:
        """z_v and z_t."""
        context = self.read(self.vectors_norm(vectors))
        x = torch.cat(list(self.queries.values())).expand(len(vectors), -1, -1)
        mask = self.mask()
        for block in self.blocks:
            x = block(x, context, mask[None, None], None)
        parts = self.norm(x).split([len(queries) for queries in self.queries.values()], 1)
        said = {
            name: self.heads[name](part) for name, part in zip(self.queries, parts, strict=True)
        }
        return DiffusionConditions(said.get("image"), said.get("text"))

    def mask(self) -> Bool[Tensor, "q q"]:
        """The drawing above: True where the row's query sees the column's."""
        ones = [
            torch.ones(len(q), len(q), dtype=torch.bool, device=q.device)
            for q in self.queries.values()
        ]
        return torch.block_diag(*ones).bool()


class ContinuousTokenizer(nn.Module):
    """Tokenizer and detokenizer: the two transformers that stage 1 trains.

    Args:
        visual: the visual tokenizer, whose frozen encoder makes the features.
        shape: see VLGPTTokenizerConfig.
        image, text: see Detokenizer.
    """

    def __init__(
        self,
        visual: VisualTokenizer,
        shape: VLGPTTokenizerConfig,
        image: Shape | None,
        text: Shape | None,
    ) -> None:
        super().__init__()
        self.shape, self.fingerprint = shape, visual.fingerprint()
        self.conditions: tuple[Shape | None, Shape | None] = (image, text)
        self.tokenizer = shape.resampler(visual)
        self.detokenizer = Detokenizer(shape, image, text)

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> DiffusionConditions:
        """z_v and z_t of pictures."""
        return self.detokenizer(self.vectors(images))

    def vectors(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b k width"]:
        """x_v of pictures."""
        return self.tokenizer.vectors(self.tokenizer.features(images))

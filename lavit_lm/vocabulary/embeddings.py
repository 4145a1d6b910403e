"""Embeddings of a causal LM for new tokens, drawn from the distribution of its trained embeddings.

    embedding    0 ......... first-1   first ......... stop-1   stop .........
                 text tokens           new, drawn here          padding, if any is left

A padded LM has more embeddings than its tokenizer has ids; new tokens use those first. Embeddings
that are equal or zero would get equal gradients and stay equal; embeddings from another
distribution would give the new tokens larger logits than any text token.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_lm.vocabulary.text_tokenizer import VocabularyError


def check_embeddings(model: Any, num_ids: int) -> None:
    """Raise VocabularyError unless this is a causal LM with at least `num_ids` embeddings."""
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(inputs, nn.Embedding) or not isinstance(outputs, nn.Linear):
        raise VocabularyError(
            "expected a causal LM of transformers with an nn.Embedding and an nn.Linear output "
            f"layer, got {type(model).__name__} with {type(inputs).__name__} and "
            f"{type(outputs).__name__}"
        )
    if inputs.weight.shape[0] < num_ids or num_ids == 0:
        raise VocabularyError(
            f"the tokenizer has ids up to {num_ids - 1}, the LM only {inputs.weight.shape[0]} "
            "embeddings: it is the tokenizer of another LM, and text would get random embeddings"
        )


@torch.no_grad()
def extend_embeddings(model: Any, first: int, stop: int, generator: torch.Generator | None) -> None:
    """Draw the embeddings of ids first..stop-1, and their output layer if it is not tied, in place.

    A bias of the output layer is set to the mean bias of ids 0..first-1. The LM is enlarged to
    `stop` embeddings if it has fewer. For a size that GPUs prefer, call
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False) afterwards.
    """
    device = model.get_input_embeddings().weight.device
    if model.get_input_embeddings().weight.shape[0] < stop:
        # mean_resizing=True (the default) samples from a full covariance matrix: that takes
        # minutes, and the new embeddings are all equal in bfloat16. With False, random embeddings
        # are drawn that are replaced below: fork, so that the global generator does not advance.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.resize_token_embeddings(stop, mean_resizing=False)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    _draw(inputs.weight, first, stop, generator)
    if outputs.weight is not inputs.weight:
        _draw(outputs.weight, first, stop, generator)
    if outputs.bias is not None:
        outputs.bias[first:stop] = outputs.bias[:first].float().mean().to(outputs.bias.dtype)


class CodeMap(nn.Module):
    """Embeddings of codes, computed from their codebook entries by a small learned network.

        entry, scaled to deviation 1 -> a linear map of its table, + a network with a hidden layer
        -> [codes, width]

    What is learned from one code then holds for codes of similar entries as well; of tens of
    thousands of embeddings of their own each would be trained by a few images only. After training
    the computed embeddings are written into the LM, which is any LM of `transformers` again.

    Args:
        codebook: entries of every table.
        first: id of code 0; the ids of the tables follow each other.
        width: of the embeddings.
        deviation: of the embeddings in the beginning.
        hidden: size of the hidden layer.
        generator: of the weights; None for torch's own.
    """

    entries: Tensor

    def __init__(
        self,
        codebook: Float[Tensor, "tables size dim"],
        first: int,
        width: int,
        deviation: float,
        hidden: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.first = first
        self.register_buffer("entries", _scaled(codebook.float()), persistent=False)
        tables, _, dim = codebook.shape

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * scale)

        self.linear = normal(tables, dim, width, scale=deviation * (2 * dim) ** -0.5)
        self.bias = normal(tables, 1, width, scale=deviation * 2**-0.5)
        self.inner = normal(tables, dim, hidden, scale=dim**-0.5)
        self.inner_bias = nn.Parameter(torch.zeros(tables, 1, hidden))
        self.outer = nn.Parameter(torch.zeros(tables, hidden, width))

    def forward(
        self, weight: Float[Tensor, "vocabulary width"]
    ) -> Float[Tensor, "vocabulary width"]:
        """All embeddings: those of codes as computed, all others from `weight`."""
        hidden = F.gelu(torch.baddbmm(self.inner_bias, self.entries, self.inner))
        codes = torch.baddbmm(self.bias, self.entries, self.linear) + hidden @ self.outer
        stop = self.first + codes.shape[0] * codes.shape[1]
        return torch.cat([weight[: self.first], codes.flatten(0, 1).to(weight), weight[stop:]])


@torch.no_grad()
def embed_codebook(
    model: Any,
    text_ids: int,
    first: int,
    codebook: Float[Tensor, "tables size dim"],
    generator: torch.Generator | None,
) -> None:
    """Replace the embeddings of codes by their codebook entries, in place.

        entry, scaled to deviation 1 -> random orthonormal map -> + a random vector of the table
        -> scaled to the mean and deviation of the text embeddings

    Codes of similar entries then begin with similar embeddings and, with tied weights, similar
    logits. Tables of a level of nested codes are of the same space, and have the same map.

    Args:
        model: a causal LM that has the embeddings already.
        text_ids: number of text tokens, whose ids are the first.
        first: id of code 0; the ids of the tables follow each other.
        codebook: entries of every table.
        generator: of the maps and vectors; None for torch's own.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [inputs.weight]
    weights += [] if outputs.weight is inputs.weight else [outputs.weight]
    width, size, dim = inputs.weight.shape[1], codebook.shape[1], codebook.shape[2]
    device = generator.device if generator else "cpu"

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    entries = _scaled(codebook.to(device=device, dtype=torch.float32))
    levels = (len(entries) + 1) // 3 + 1
    maps = [torch.linalg.qr(normal(max(dim, width), min(dim, width))).Q for _ in range(levels)]
    maps = [m.T if width >= dim else m for m in maps]
    for table, values in enumerate(entries):
        mapped = values @ maps[(table + 2) // 3] * (max(dim, width) / dim) ** 0.5
        found = (mapped + normal(width)) / 2**0.5
        at = slice(first + table * size, first + (table + 1) * size)
        for weight in weights:
            deviation, mean = torch.std_mean(weight[:text_ids].float(), dim=0, correction=0)
            made = mean + deviation * found.to(weight.device)
            weight[at] = made.to(weight.dtype)


def _scaled(codebook: Float[Tensor, "tables size dim"]) -> Float[Tensor, "tables size dim"]:
    """The entries of each table around their mean, scaled to a deviation of 1."""
    entries = codebook - codebook.mean(1, keepdim=True)
    return entries / entries.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)


def _draw(weight: Tensor, first: int, stop: int, generator: torch.Generator | None) -> None:
    """Fill weight[first:stop] from normals with the mean and deviation of each column before."""
    deviation, mean = torch.std_mean(weight[:first].float(), dim=0, correction=0)
    device = generator.device if generator else "cpu"
    noise = torch.randn((stop - first, weight.shape[1]), generator=generator, device=device)
    weight[first:stop] = (mean + deviation * noise.to(weight.device)).to(weight.dtype)

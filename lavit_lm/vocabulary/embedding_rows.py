"""Rows of a causal LM for new tokens, distributed like the rows that it has learned for its own.

    rows of the embedding    0 .......... own-1   own ............ stop-1   ......
                             the LM's own text    drawn here                padding that is left, if any

A padded LM has more rows than its tokenizer has ids; new tokens take those rows first. Equal or zero rows would get
equal gradients and never part; rows from another distribution would be likelier, or larger, than any word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lavit_lm.vocabulary.text_tokenizer import VocabularyError


def check_model(model: Any, own: int) -> None:
    """Raise VocabularyError unless this is a causal LM with a row for each of the tokenizer's own ids."""
    read = getattr(model, "get_input_embeddings", lambda: None)()
    write = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(read, nn.Embedding) or not isinstance(write, nn.Linear):
        raise VocabularyError(
            "expected a causal LM of transformers with an nn.Embedding and an nn.Linear output layer, got "
            f"{type(model).__name__} with {type(read).__name__} and {type(write).__name__}"
        )
    if read.weight.shape[0] < own or own == 0:
        raise VocabularyError(
            f"the tokenizer has ids up to {own - 1}, the LM only {read.weight.shape[0]} rows: another LM's tokenizer? "
            "The missing text rows would be made up at random"
        )


@torch.no_grad()
def extend_model(model: Any, own: int, stop: int, generator: torch.Generator | None) -> None:
    """Give an LM, in place, rows own .. stop-1 of its embedding, and of its output layer if that is not tied.

    A bias of the output layer gets the mean of its own. Where rows must be added, there are then `stop` of them; call
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False) after it for a size that GPUs prefer.
    """
    device = model.get_input_embeddings().weight.device
    if model.get_input_embeddings().weight.shape[0] < stop:
        devices = [device] if device.type == "cuda" else []
        # The default draws from a full covariance, which takes minutes, and its rows are all equal in bf16. Without it
        # rows are drawn that are replaced below: whoever passes a generator does not expect torch's own to move.
        with torch.random.fork_rng(devices=devices):
            model.resize_token_embeddings(stop, mean_resizing=False)
    read, write = model.get_input_embeddings(), model.get_output_embeddings()
    new = slice(own, stop)
    _draw(read.weight, own, new, generator)
    if write.weight is not read.weight:
        _draw(write.weight, own, new, generator)
    if write.bias is not None:
        write.bias[new] = write.bias[:own].float().mean().to(write.bias.dtype)


def _draw(weight: Tensor, own: int, new: slice, generator: torch.Generator | None) -> None:
    """Fill weight[new] with normals of the mean and deviation that each column has over rows 0 .. own-1."""
    deviation, mean = torch.std_mean(weight[:own].float(), dim=0, correction=0)
    shape = (new.stop - new.start, weight.shape[1])
    noise = torch.randn(shape, generator=generator, device=generator.device if generator else "cpu")
    weight[new] = (mean + deviation * noise.to(weight.device)).to(weight.dtype)

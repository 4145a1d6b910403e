"""The keys and values of sequences that are continued by a causal LM, one position per step.

    sequences of 3 and 1 tokens, left-padded, after two steps

    documents  0  0  0  0  0      positions  0  1  2  3  4
               .  .  0  0  0                 0  0  0  1  2

A new position may be an id or a vector, so that one loop generates text and images. Padding is
never attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from lavit_lm.sequences.masks import model_mask
from lavit_lm.sequences.packing import PADDING, embedded_images
from lavit_lm.sequences.token_sequence import TokenSequence


class DecodingState:
    """The state of a batch of sequences.

    Args:
        model: a SequenceModel.
        sequences: the prompts; their prefixes attend in both directions.
        pad_id: the id at padding.
        max_new_tokens: positions that may be appended; checked against the model's context.
        use_cache: keep keys and values; False recomputes everything at every step (slow, for
            tests).

    Raises:
        ValueError: an empty sequence, or one that leaves no space in the model's context.
    """

    def __init__(
        self,
        model: Any,
        sequences: Sequence[TokenSequence],
        pad_id: int,
        max_new_tokens: int,
        use_cache: bool = True,
    ) -> None:
        if min(map(len, sequences)) == 0:
            raise ValueError("an empty prompt: there is no position from which to predict the next")
        longest = max(map(len, sequences))
        check_context(model.causal.config.get_text_config(), longest, max_new_tokens)
        self.model, self.use_cache = model, use_cache
        self.device = model.causal.get_input_embeddings().weight.device
        ids, is_embedding, prefix, documents = left_padded(sequences, pad_id)
        self.prefix, self.documents = prefix.to(self.device), documents.to(self.device)
        tensors = (ids, is_embedding, *embedded_images(sequences))
        self.inputs_embeds: Tensor = model.embed(*(tensor.to(self.device) for tensor in tensors))
        self.cache = DynamicCache(config=model.causal.config) if use_cache else None

    def prefill(self) -> Float[Tensor, "b d"]:
        """Compute the prompts; the hidden state at each one's last position."""
        return self._forward(self.inputs_embeds)

    def append_ids(self, ids: Int64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Append an id to each sequence; the hidden state there."""
        return self.append_embeddings(self.embed_ids(ids))

    def embed_ids(self, ids: Int64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """The input embeddings of ids."""
        return self.model.causal.get_input_embeddings()(ids)

    def append_embeddings(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Append a vector to each sequence; the hidden state there."""
        self.documents, self.prefix = F.pad(self.documents, (0, 1)), F.pad(self.prefix, (0, 1))
        return self._append(vectors)

    @property
    def num_logits(self) -> int:
        """The width of the logits of all ids."""
        return int(self.model.causal.config.get_text_config().vocab_size)

    def logits(
        self, hidden: Float[Tensor, "b d"], ids: Int64[Tensor, " n"]
    ) -> Float[Tensor, "b n"]:
        """Logits of some ids only."""
        return self.model.head(hidden)[:, ids]

    def reorder(self, index: Int64[Tensor, " b"]) -> None:
        """Continue with these of the sequences, some more than once, as beam search does."""
        self.documents, self.prefix = self.documents[index], self.prefix[index]
        self._reorder(index)

    def _append(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        if self.cache is not None:
            return self._forward(vectors[:, None])
        self.inputs_embeds = torch.cat([self.inputs_embeds, vectors[:, None]], 1)
        return self._forward(self.inputs_embeds)

    def _reorder(self, index: Int64[Tensor, " b"]) -> None:
        self.inputs_embeds = self.inputs_embeds[index]
        if self.cache is not None:
            self.cache.reorder_cache(index)

    def _forward(self, inputs_embeds: Float[Tensor, "b l d"]) -> Float[Tensor, "b d"]:
        is_token = self.documents != PADDING
        mask: Any = is_token.long()
        if bool(self.prefix.any()) and inputs_embeds.shape[1] == is_token.shape[1]:
            # Only the prompt needs a mask of pairs: an appended position attends to every token
            # before it.
            mask = model_mask(self.model.causal, self.documents, self.prefix, inputs_embeds.dtype)
        return self.model.causal.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=(is_token.cumsum(1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :],
            use_cache=self.use_cache,
            **cache_argument(self.model.causal.base_model, self.cache),
        ).last_hidden_state[:, -1]


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The argument of a model's forward pass for a cache: "cache" from transformers 5.24 on."""
    kind: Any = type(model)
    return {_cache_name(kind): cache}


@lru_cache(maxsize=32)  # needed at every step
def _cache_name(kind: Any) -> str:
    names = signature(kind.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class ContextError(ValueError):
    """A prompt and an output that exceed the context of an LM."""


def check_context(config: Any, length: int, max_new_tokens: int) -> None:
    """Raise ContextError for a prompt and an output that exceed the context of an LM's config."""
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and length + max_new_tokens > context:
        raise ContextError(
            f"a prompt of {length} tokens and an output of up to {max_new_tokens} exceed the "
            f"model's context of {context}: shorten the prompt or generate less"
        )


def left_padded(
    sequences: Sequence[TokenSequence], pad_id: int
) -> tuple[Int64[Tensor, "b l"], Bool[Tensor, "b l"], Bool[Tensor, "b l"], Int64[Tensor, "b l"]]:
    """(ids, is_embedding, prefix, documents) of left-padded sequences; documents are 0, or -1."""
    size = len(sequences), max(map(len, sequences))
    ids, documents = torch.full(size, pad_id), torch.full(size, PADDING)
    is_embedding, prefix = torch.zeros(2, *size, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        at = slice(size[1] - len(sequence), size[1])
        ids[i, at], documents[i, at] = sequence.ids, 0
        is_embedding[i, at], prefix[i, at] = sequence.is_embedding, sequence.prefix
    return ids, is_embedding, prefix, documents

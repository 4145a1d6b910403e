"""Left-padded rows in a causal LM, read once and then gone on with, a place a row and step.

    rows of 3 and 1 places, then two steps        documents  0  0  0  0  0      positions  0  1  2  3  4
                                                             .  .  0  0  0                 0  0  0  1  2

What is gone on with may be an id or a vector, so that one loop says words and pictures. Padding is seen by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from lavit_lm.sequences.masks import model_mask
from lavit_lm.sequences.packing import FREE, embedded_images
from lavit_lm.sequences.segments import TokenSequence


class Decoding:
    """The state of a batch of rows.

    Args:
        model: a SequenceModel.
        rows: what has been said; their prefixes are seen by all of their row.
        pad: the id at free places.
        most: places that may come; only to check that they fit.
        cached: keep keys and values; False computes everything anew at every step (slow, for checks).

    Raises:
        ValueError: an empty row, or one that leaves no room in the model's context.
    """

    def __init__(
        self, model: Any, rows: Sequence[TokenSequence], pad: int, most: int, cached: bool = True
    ) -> None:
        if min(map(len, rows)) == 0:
            raise ValueError("a prompt of no places: nothing stands there from which to go on")
        room = getattr(model.causal.config.get_text_config(), "max_position_embeddings", None)
        length = max(map(len, rows))
        if room is not None and length + most > room:
            raise ValueError(
                f"a prompt of {length} places and an answer of up to {most} exceed the model's context of {room}: "
                "shorten the prompt or ask for less"
            )
        self.model, self.cached = model, cached
        self.device = model.causal.get_input_embeddings().weight.device
        ids, is_embedding, self.prefix, self.documents = left_padded(rows, pad)
        images, keep = embedded_images(rows)
        tensors = (ids, is_embedding, images, keep)
        self.inputs: Tensor = model.embed(*(tensor.to(self.device) for tensor in tensors))
        self.prefix, self.documents = self.prefix.to(self.device), self.documents.to(self.device)
        self.cache = DynamicCache(config=model.causal.config) if cached else None

    def prefill(self) -> Float[Tensor, "b d"]:
        """Read the rows; the state after each one's last place."""
        return self._forward(self.inputs)

    def append_ids(self, ids: Int64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """One more id in each row; the state after it."""
        return self.append_embeddings(self.embed_ids(ids))

    def embed_ids(self, ids: Int64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """What the LM is fed for ids."""
        return self.model.causal.get_input_embeddings()(ids)

    def append_embeddings(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """One more vector in each row; the state after it."""
        self.documents, self.prefix = F.pad(self.documents, (0, 1)), F.pad(self.prefix, (0, 1))
        if self.cache is not None:
            return self._forward(vectors[:, None])
        self.inputs = torch.cat([self.inputs, vectors[:, None]], 1)
        return self._forward(self.inputs)

    def reorder(self, rows: Int64[Tensor, " b"]) -> None:
        """Go on with these of the rows, some more than once, as beam search does."""
        self.inputs, self.documents, self.prefix = (
            self.inputs[rows],
            self.documents[rows],
            self.prefix[rows],
        )
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    def _forward(self, inputs: Float[Tensor, "b l d"]) -> Float[Tensor, "b d"]:
        there = self.documents != FREE
        mask: Any = there.long()
        if (
            bool(self.prefix.any()) and inputs.shape[1] == there.shape[1]
        ):  # a later place sees all: no mask of pairs
            mask = model_mask(self.model.causal, self.documents, self.prefix, inputs.dtype)
        return self.model.causal.base_model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=(there.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :],
            past_key_values=self.cache,
            use_cache=self.cached,
        ).last_hidden_state[:, -1]


def left_padded(
    rows: Sequence[TokenSequence], pad: int
) -> tuple[Int64[Tensor, "b l"], Bool[Tensor, "b l"], Bool[Tensor, "b l"], Int64[Tensor, "b l"]]:
    """(ids, fed, prefix, documents) of rows that end together; documents are 0, and -1 before a row begins."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    is_embedding, prefix = torch.zeros(2, len(rows), length, dtype=torch.bool)
    documents = torch.full((len(rows), length), FREE)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length)
        ids[i, place], is_embedding[i, place], prefix[i, place], documents[i, place] = (
            row.ids,
            row.is_embedding,
            row.prefix,
            0,
        )
    return ids, is_embedding, prefix, documents

"""PrefixSeq2Seq: an encoder-decoder of `transformers` in the place of a causal LM, for objectives with prefixes.

    a block          document 0          document 1        row    encoder      decoder
    prefix           P  P  P  .  .       P  .  .  .        0      a0 a1 a2     a3 a4 .
    place            a0 a1 a2 a3 a4      b0 b1 b2 b3       1      b0 .  .      b1 b2 b3

The encoder reads a document's prefix in both directions, the decoder its suffix from left to right with all of the
prefix in view: what masks.py lets a causal LM see in one stack. Documents become rows of their own, so that no family
needs a mask of its own, and positions start anew in either half. States go back to their places in the block, where the
objectives' losses read them; nothing is read at a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from lavit_lm.models.kv_state import Decoding
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.sequences.packing import FREE, Packed, pad
from lavit_lm.sequences.segments import TokenSequence

FAMILIES = ("t5", "bart")


class PrefixSeq2Seq(SequenceModel):
    """SequenceModel over an encoder-decoder.

    Args:
        lm: AutoModelForSeq2SeqLM of the family t5 or bart; in both, encoder, decoder and head share one matrix.
        bridge, regressor: see SequenceModel.

    Raises:
        ValueError: another family, whose head may do more than multiply, or embeddings that are scaled on their way.
    """

    def __init__(
        self, lm: Any, bridge: nn.Module | None = None, regressor: nn.Module | None = None
    ) -> None:
        super().__init__(lm, bridge, regressor)
        config = self.causal.config
        if config.model_type not in FAMILIES or getattr(config, "scale_embedding", False):
            raise ValueError(
                f"lm: expected an encoder-decoder of the families {', '.join(FAMILIES)} with embeddings as they are, "
                f"got {config.model_type!r}: its head or embeddings would be computed in another way than its own"
            )

    def read(self, inputs: Float[Tensor, "b l d"], batch: Packed) -> Float[Tensor, "b l d"]:
        """States of the decoder at the places of suffixes, 0 elsewhere.

        Raises:
            ValueError: a document without a prefix or without a suffix, a prefix that goes on behind its suffix's
                beginning, or a suffix whose first place is predicted: it needs a start that is not.
        """
        there = batch.documents != FREE
        _check(batch, there)
        states = torch.zeros_like(inputs)
        if not bool(there.any()):
            return states
        context, known, _ = _rows(inputs, batch.documents, batch.prefix & there)
        said, taken, slots = _rows(inputs, batch.documents, ~batch.prefix & there)
        memory = self.encode(context, known)
        self.require_room(said.shape[1])
        found = self.causal.get_decoder()(
            inputs_embeds=said,
            attention_mask=taken.long(),
            encoder_hidden_states=memory,
            encoder_attention_mask=known.long(),
            use_cache=False,
        ).last_hidden_state
        return states.masked_scatter(
            (~batch.prefix & there)[..., None], found[slots].to(states.dtype)
        )

    def encode(
        self, context: Float[Tensor, "n s d"], known: Bool[Tensor, "n s"]
    ) -> Float[Tensor, "n s d"]:
        """Read prefixes, each a row."""
        self.require_room(context.shape[1])
        return self.causal.get_encoder()(
            inputs_embeds=context, attention_mask=known.long()
        ).last_hidden_state

    def require_room(self, places: int) -> None:
        """Raise ValueError for more places than either half has positions."""
        room = getattr(
            self.causal.config, "max_position_embeddings", None
        )  # of bart; t5 has no last one
        if room is not None and places > room:
            raise ValueError(
                f"a prefix or suffix of {places} places exceeds the model's context of {room}"
            )

    def decoding(
        self, rows: Sequence[TokenSequence], pad: int, most: int, cached: bool = True
    ) -> Any:
        """Rows to go on with; see PrefixDecoding."""
        return PrefixDecoding(self, rows, pad, most, cached)

    def head(self, states: Float[Tensor, "t d"]) -> Float[Tensor, "t vocabulary"]:
        """Logits as the LM's own forward makes them."""
        config = self.causal.config
        if getattr(config, "scale_decoder_outputs", False):
            states = states * config.d_model**-0.5
        bias = getattr(self.causal, "final_logits_bias", None)
        logits = self.causal.get_output_embeddings()(states)
        return logits if bias is None else logits + bias


class PrefixDecoding(Decoding):
    """As Decoding, over an encoder-decoder: prefixes are read once, suffixes gone on with.

    Args:
        model: a PrefixSeq2Seq.
        rows, pad, most, cached: see Decoding.

    Raises:
        ValueError: rows without a prefix, suffixes that are empty or of several lengths (which absolute positions could
            not be left-padded for), or no room in the model's context.
    """

    def __init__(
        self,
        model: PrefixSeq2Seq,
        rows: Sequence[TokenSequence],
        pad_id: int,
        most: int,
        cached: bool = True,
    ) -> None:
        lengths = {int((~row.prefix).sum()) for row in rows}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"expected prompts whose suffixes have begun alike, got suffixes of {sorted(lengths)} places: give "
                "them one at a time"
            )
        model.require_room(max(lengths) + most)
        self.model, self.cached = model, cached
        self.device = model.causal.get_input_embeddings().weight.device
        batch = pad(rows, pad_id).to(self.device)
        _check(batch, batch.documents != FREE)
        inputs = model.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
        there = batch.documents != FREE
        context, self.known, _ = _rows(inputs, batch.documents, batch.prefix & there)
        self.inputs: Tensor = _rows(inputs, batch.documents, ~batch.prefix & there)[0]
        self.memory = model.encode(context, self.known)
        config = model.causal.config
        self.cache = (
            EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
            if cached
            else None
        )

    def append_embeddings(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """One more vector in each row; the state after it."""
        if self.cache is not None:
            return self._forward(vectors[:, None])
        self.inputs = torch.cat([self.inputs, vectors[:, None]], 1)
        return self._forward(self.inputs)

    def reorder(self, rows: Int64[Tensor, " b"]) -> None:
        """Go on with these of the rows, some more than once, as beam search does."""
        self.inputs, self.memory, self.known = (
            self.inputs[rows],
            self.memory[rows],
            self.known[rows],
        )
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    def _forward(self, inputs: Float[Tensor, "b l d"]) -> Float[Tensor, "b d"]:
        return self.model.causal.get_decoder()(
            inputs_embeds=inputs,
            encoder_hidden_states=self.memory,
            encoder_attention_mask=self.known.long(),
            past_key_values=self.cache,
            use_cache=self.cached,
        ).last_hidden_state[:, -1]


def _rows(
    inputs: Float[Tensor, "b l d"], documents: Int64[Tensor, "b l"], wanted: Bool[Tensor, "b l"]
) -> tuple[
    Float[Tensor, "n s d"], Bool[Tensor, "n s"], tuple[Int64[Tensor, " t"], Int64[Tensor, " t"]]
]:
    """(each document's wanted places as a row, where there is one, row and column of each wanted place)."""
    length = documents.shape[1]
    number = documents + length * torch.arange(len(documents), device=documents.device)[:, None]
    rows = torch.unique_consecutive(number[wanted], return_inverse=True)[1]
    counts = torch.bincount(rows)
    columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    taken = torch.arange(int(counts.max()), device=rows.device) < counts[:, None]
    made = inputs.new_zeros(*taken.shape, inputs.shape[2])
    return made.masked_scatter(taken[..., None], inputs[wanted]), taken, (rows, columns)


def _check(batch: Packed, there: Bool[Tensor, "b l"]) -> None:
    """Raise ValueError for documents that are not a prefix and then a suffix with a start."""
    same = batch.documents[:, 1:] == batch.documents[:, :-1]
    first = there & ~torch.cat([torch.zeros_like(there[:, :1]), same], 1)
    last = there & ~torch.cat([same, torch.zeros_like(there[:, :1])], 1)
    back = (batch.prefix[:, 1:] & ~batch.prefix[:, :-1] & same).any()
    if bool((first & ~batch.prefix).any() | (last & batch.prefix).any() | back):
        raise ValueError(
            "an encoder-decoder reads prefixes and says suffixes: expected rows that begin with the one and end with "
            "the other, which objectives without prefixes do not lay out"
        )
    if bool((batch.predict[:, 1:] & batch.prefix[:, :-1] & same).any()):
        raise ValueError(
            "a suffix's first place is predicted, and the decoder has nothing before it: lay out a start"
        )

"""PrefixSeq2Seq: an encoder-decoder of `transformers` instead of a causal LM.

    a block          document 0          document 1        document   encoder      decoder
    prefix           P  P  P  .  .       P  .  .  .        0          a0 a1 a2     a3 a4 .
    position         a0 a1 a2 a3 a4      b0 b1 b2 b3       1          b0 .  .      b1 b2 b3

The encoder attends within a document's prefix in both directions, the decoder causally within its
suffix and to all of the prefix: the same attention that masks.py gives a causal LM. Each document
becomes a batch element, so that no family needs a custom mask, and positions start anew in encoder
and decoder. Hidden states are scattered back to their positions in the block, where the objectives'
losses expect them; at prefixes they are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from lavit_lm.models.kv_state import DecodingState, cache_argument
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.sequences.packing import PADDING, PackedBatch, pad
from lavit_lm.sequences.token_sequence import TokenSequence

FAMILIES = ("t5", "bart")


class PrefixSeq2Seq(SequenceModel):
    """SequenceModel over an encoder-decoder.

    Args:
        lm: AutoModelForSeq2SeqLM of the family t5 or bart; in both, encoder, decoder and head share
            one matrix.
        bridge, regressor: see SequenceModel.

    Raises:
        ValueError: another family, whose head may be more than a matrix, or embeddings that are
            scaled.
    """

    def __init__(
        self, lm: Any, bridge: nn.Module | None = None, regressor: nn.Module | None = None
    ) -> None:
        super().__init__(lm, bridge, regressor)
        config = self.causal.config
        if config.model_type not in FAMILIES or getattr(config, "scale_embedding", False):
            raise ValueError(
                f"lm: expected an encoder-decoder of the families {', '.join(FAMILIES)} with "
                "unscaled embeddings, got "
                f"{config.model_type!r}: its head or embeddings would be computed differently "
                "from its own forward"
            )

    def hidden_states(
        self, inputs_embeds: Float[Tensor, "b l d"], batch: PackedBatch
    ) -> Float[Tensor, "b l d"]:
        """Hidden states of the decoder at the positions of suffixes, 0 elsewhere.

        Raises:
            ValueError: a document without a prefix or without a suffix, a prefix position after a
                suffix position, or a suffix whose first position is predicted.
        """
        is_token = batch.documents != PADDING
        check_prefixes(batch)
        states = torch.zeros_like(inputs_embeds)
        if not bool(is_token.any()):
            return states
        is_suffix = ~batch.prefix & is_token
        context, context_mask, _ = _by_document(inputs_embeds, batch, batch.prefix & is_token)
        suffix, suffix_mask, origin = _by_document(inputs_embeds, batch, is_suffix)
        memory = self.encode(context, context_mask)
        self.require_context(suffix.shape[1])
        output = self.causal.get_decoder()(
            inputs_embeds=suffix,
            attention_mask=suffix_mask.long(),
            encoder_hidden_states=memory,
            encoder_attention_mask=context_mask.long(),
            use_cache=False,
        ).last_hidden_state
        return states.masked_scatter(is_suffix[..., None], output[origin].to(states.dtype))

    def encode(
        self, context: Float[Tensor, "n s d"], mask: Bool[Tensor, "n s"]
    ) -> Float[Tensor, "n s d"]:
        """The encoder's hidden states of prefixes."""
        self.require_context(context.shape[1])
        encoder = self.causal.get_encoder()
        return encoder(inputs_embeds=context, attention_mask=mask.long()).last_hidden_state

    def require_context(self, length: int) -> None:
        """Raise ValueError for more positions than encoder or decoder have."""
        # BART has learned positions; T5's are relative, without a largest one.
        context = getattr(self.causal.config, "max_position_embeddings", None)
        if context is not None and length > context:
            raise ValueError(
                f"a prefix or suffix of {length} positions exceeds the model's context of {context}"
            )

    def start_decoding(
        self,
        sequences: Sequence[TokenSequence],
        pad_id: int,
        max_new_tokens: int,
        use_cache: bool = True,
    ) -> DecodingState:
        """The state from which sequences are continued; see PrefixDecodingState."""
        return PrefixDecodingState(self, sequences, pad_id, max_new_tokens, use_cache)

    def head(self, hidden_states: Float[Tensor, "t d"]) -> Float[Tensor, "t vocabulary"]:
        """Logits as the LM's own forward computes them."""
        config = self.causal.config
        if getattr(config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            hidden_states = hidden_states * config.d_model**-0.5
        bias = getattr(self.causal, "final_logits_bias", None)  # BART
        logits = self.causal.get_output_embeddings()(hidden_states)
        return logits if bias is None else logits + bias


class PrefixDecodingState(DecodingState):
    """DecodingState over an encoder-decoder: prefixes are encoded once, suffixes continued.

    Args:
        model: a PrefixSeq2Seq.
        sequences, pad_id, max_new_tokens, use_cache: see DecodingState.

    Raises:
        ValueError: sequences without a prefix, suffixes that are empty or of several lengths
            (absolute positions cannot be left-padded), or no space in the model's context.
    """

    def __init__(
        self,
        model: PrefixSeq2Seq,
        sequences: Sequence[TokenSequence],
        pad_id: int,
        max_new_tokens: int,
        use_cache: bool = True,
    ) -> None:
        lengths = {int((~sequence.prefix).sum()) for sequence in sequences}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"expected prompts with suffixes of one length, got lengths {sorted(lengths)}: "
                "continue them one at a "
                "time"
            )
        model.require_context(max(lengths) + max_new_tokens)
        self.model, self.use_cache = model, use_cache
        self.device = model.causal.get_input_embeddings().weight.device
        batch = pad(sequences, pad_id).to(self.device)
        check_prefixes(batch)
        inputs_embeds = model.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
        is_token = batch.documents != PADDING
        context, self.context_mask, _ = _by_document(inputs_embeds, batch, batch.prefix & is_token)
        self.inputs_embeds: Tensor = _by_document(inputs_embeds, batch, ~batch.prefix & is_token)[0]
        self.memory = model.encode(context, self.context_mask)
        config = model.causal.config
        self.cache: Any = None
        if use_cache:
            self.cache = EncoderDecoderCache(
                DynamicCache(config=config), DynamicCache(config=config)
            )

    def append_embeddings(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Append a vector to each sequence; the hidden state there."""
        return self._append(vectors)

    def reorder(self, index: Int64[Tensor, " b"]) -> None:
        """Continue with these of the sequences, some more than once, as beam search does."""
        self.memory, self.context_mask = self.memory[index], self.context_mask[index]
        self._reorder(index)

    def _forward(self, inputs_embeds: Float[Tensor, "b l d"]) -> Float[Tensor, "b d"]:
        decoder = self.model.causal.get_decoder()
        return decoder(
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=self.memory,
            encoder_attention_mask=self.context_mask.long(),
            use_cache=self.use_cache,
            **cache_argument(decoder, self.cache),
        ).last_hidden_state[:, -1]


def _by_document(
    inputs_embeds: Float[Tensor, "b l d"], batch: PackedBatch, selected: Bool[Tensor, "b l"]
) -> tuple[
    Float[Tensor, "n s d"], Bool[Tensor, "n s"], tuple[Int64[Tensor, " t"], Int64[Tensor, " t"]]
]:
    """(selected positions, one document per batch element; their mask; where each one is)."""
    length, device = batch.documents.shape[1], batch.documents.device
    block = torch.arange(len(batch.documents), device=device)[:, None]
    number = (batch.documents + length * block)[selected]
    element = torch.unique_consecutive(number, return_inverse=True)[1]
    counts = torch.bincount(element)
    position = torch.arange(len(element), device=device) - (counts.cumsum(0) - counts)[element]
    mask = torch.arange(int(counts.max()), device=device) < counts[:, None]
    elements = inputs_embeds.new_zeros(*mask.shape, inputs_embeds.shape[2])
    elements = elements.masked_scatter(mask[..., None], inputs_embeds[selected])
    return elements, mask, (element, position)


def check_prefixes(batch: PackedBatch) -> None:
    """Raise ValueError unless documents are a prefix and a suffix that begins with a given id."""
    is_token = batch.documents != PADDING
    same = batch.documents[:, 1:] == batch.documents[:, :-1]
    border = torch.zeros_like(is_token[:, :1])
    first = is_token & ~torch.cat([border, same], 1)
    last = is_token & ~torch.cat([same, border], 1)
    resumes = (batch.prefix[:, 1:] & ~batch.prefix[:, :-1] & same).any()
    if bool((first & ~batch.prefix).any() | (last & batch.prefix).any() | resumes):
        raise ValueError(
            "an encoder-decoder needs sequences of a prefix and a suffix, which objectives "
            "without prefixes do not "
            "lay out"
        )
    if bool((batch.predict[:, 1:] & batch.prefix[:, :-1] & same).any()):
        raise ValueError(
            "the first position of a suffix is predicted, but the decoder has no position before "
            "it: lay out a start id"
        )

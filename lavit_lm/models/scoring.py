"""log p of several answers to one prompt, which is computed once.

    prompt     <s> <img> v v </img>            one pass; its keys and values are repeated
    answers                         a cat </s>     one pass of the batch after them
                                    rain </s> .

Images of the prompt are encoded once, too. Answers to different prompts, a single one, and an
encoder-decoder take one pass over whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from lavit_lm.models.kv_state import cache_argument
from lavit_lm.models.losses import log_likelihood
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.sequences.masks import model_mask
from lavit_lm.sequences.packing import PADDING, PackedBatch, embedded_images, pad
from lavit_lm.sequences.token_sequence import TokenSequence


@torch.no_grad()
def log_likelihoods(
    model: SequenceModel, sequences: Sequence[TokenSequence], pad_id: int
) -> Float[Tensor, " n"]:
    """Log p in nats of the predicted ids of each sequence, given the positions before them."""
    device = model.causal.get_input_embeddings().weight.device
    batch = pad(sequences, pad_id).to(device)
    shared = shared_length(batch, sequences)
    if shared == 0 or len(sequences) == 1 or model.causal.config.is_encoder_decoder:
        return log_likelihood(model(batch), batch)
    lm = model.causal.base_model
    cache = DynamicCache(config=model.causal.config)
    cached = {"use_cache": True, **cache_argument(lm, cache)}
    one = slice(0, 1), slice(0, shared)
    images, keep = (tensor.to(device) for tensor in embedded_images(sequences[:1]))
    embedded = model.embed(batch.ids[one], batch.is_embedding[one], images, keep)
    before = lm(
        inputs_embeds=embedded,
        attention_mask=model_mask(
            model.causal, batch.documents[one], batch.prefix[one], embedded.dtype
        ),
        position_ids=batch.positions[one],
        **cached,
    ).last_hidden_state
    cache.batch_repeat_interleave(len(sequences))
    after = lm(
        inputs_embeds=model.causal.get_input_embeddings()(batch.ids[:, shared:]),
        attention_mask=(batch.documents != PADDING).long(),
        position_ids=batch.positions[:, shared:],
        **cached,
    ).last_hidden_state
    hidden_states = torch.cat([before.expand(len(sequences), -1, -1), after], 1)
    return log_likelihood(model.output(hidden_states, hidden_states), batch)


def shared_length(batch: PackedBatch, sequences: Sequence[TokenSequence]) -> int:
    """Positions before the first target of any sequence, if all begin with the same ones, else 0.

    Also 0 if vectors of images, or a prefix, are at later positions.
    """
    n = int(batch.predict.int().argmax(1).min())
    first, *others = ([segment.image for segment in s.image_segments] for s in sequences)
    same = all(
        len(other) == len(first) and all(a is b for a, b in zip(first, other, strict=True))
        for other in others
    )
    for values in (batch.ids, batch.is_embedding, batch.prefix):
        same = same and bool((values[:, :n] == values[:1, :n]).all())
    later = batch.is_embedding[:, n:] | batch.prefix[:, n:]
    return n if same and not bool(later.any()) else 0

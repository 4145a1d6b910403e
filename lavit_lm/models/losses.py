"""Named losses, and the one shift of the package: position i - 1 predicts position i.

    position       0    1      2      3    4    5       6
    id             <s>  a      <img>  7    3    </img>  </s>
    hidden state   h0   h1     h2     h3   h4   h5      .
    predicts       a    <img>  7      3    </img> </s>

Losses are averaged over their own targets, cross-entropy and regression apart, so that their
balance does not depend on the ratio of images in a batch. Regression targets are always detached:
otherwise the model lowers the loss by moving its targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.sequences.token_sequence import Role
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary

Head = Callable[[Tensor], Tensor]
"""Hidden states -> logits."""


@dataclass(frozen=True)
class LossSum:
    """A sum over targets and their number, so that means over many batches or devices can be exact.

    Over several processes the count is their mean, which need not be an integer.
    """

    total: Float[Tensor, ""]
    count: Int64[Tensor, ""] | Float[Tensor, ""]

    @property
    def mean(self) -> Float[Tensor, ""]:
        """0 without targets."""
        return self.total / self.count.clamp(min=1e-9)


@dataclass(frozen=True)
class ModelOutput:
    """What a model computes for a batch, and its two heads.

    The heads are functions, since logits are needed at the positions before targets only.

    Args:
        hidden_states: after the LM's last norm.
        inputs_embeds: the LM's inputs: embeddings of ids, or the bridge's vectors.
        head: hidden states -> logits over the vocabulary.
        regressor: hidden states -> vectors of the LM's hidden size; None for a model that predicts
            ids only.
        vocabulary: predict every id among those that can be at its position (restricted_nats); None
            for all ids.
        every: with a vocabulary, one target in so many is predicted among all ids; 0 for none.
        split_head: groups of ids -> a head for each, see SequenceModel.split_head.
    """

    hidden_states: Float[Tensor, "b l d"]
    inputs_embeds: Float[Tensor, "b l d"]
    head: Head
    regressor: Callable[[Tensor], Tensor] | None = None
    vocabulary: VisualVocabulary | None = None
    split_head: Callable[[Sequence[Sequence[range]]], list[Head]] | None = None
    every: int = 0


def shift_targets(
    batch: PackedBatch, is_target: Bool[Tensor, "b l"]
) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " t"]]:
    """(source, target) positions as indices into the flattened batch, source = target - 1.

    Raises:
        ValueError: a target at the first position of a document.
    """
    target = is_target.flatten().nonzero().flatten()
    source, documents = target - 1, batch.documents.flatten()
    has_source = target % batch.ids.shape[1] > 0
    if not bool((has_source & (documents[source] == documents[target])).all()):
        raise ValueError(
            "the first position of a document is marked as a target: no position precedes it to "
            "predict it from"
        )
    return source, target


def cross_entropy(output: ModelOutput, batch: PackedBatch) -> dict[str, LossSum]:
    """Sums of -log p(id) in nats: "text", and "image" (codes and delimiters)."""
    nats, target = target_nats(output, batch)
    is_text = batch.roles.flatten()[target] == Role.TEXT
    return {
        name: LossSum(nats[where].sum(), where.sum())
        for name, where in (("text", is_text), ("image", ~is_text))
    }


def has_images(batch: PackedBatch) -> Bool[Tensor, "b l"]:
    """True at the positions of documents with image vectors among their inputs."""
    blocks, length = batch.documents.shape
    block = torch.arange(blocks, device=batch.documents.device)[:, None]
    document = batch.documents + (length + 1) * block  # numbered over the whole batch
    return torch.isin(document, document[batch.is_embedding])


def regression(output: ModelOutput, batch: PackedBatch) -> dict[str, LossSum]:
    """Sums of squared errors of "vectors", each a mean over d, and the "spread" of the targets.

    The target of position i - 1 is the input embedding of position i, detached: a vector of the
    bridge, or the embedding of the id that ends an image. If the bridge learns vectors that are
    easy to predict, they become equal and "spread", the standard deviation of a dimension over the
    batch's targets, goes to 0; it is logged, not minimized.

    Raises:
        ValueError: a model without a regression head.
    """
    if output.regressor is None:
        raise ValueError("the batch has vectors to predict, but the model has no regression head")
    source, target = shift_targets(batch, batch.regress)
    predicted = output.regressor(output.hidden_states.flatten(0, 1)[source]).float()
    targets = output.inputs_embeds.flatten(0, 1)[target].detach().float()
    count = torch.tensor(len(target), device=targets.device)
    spread = targets.std(0).mean() if len(target) > 1 else targets.sum() * 0
    return {
        "vectors": LossSum((predicted - targets).square().mean(1).sum(), count),
        "spread": LossSum(spread * count, count),
    }


def log_likelihood(output: ModelOutput, batch: PackedBatch) -> Float[Tensor, " b"]:
    """The log p in nats of each block's predicted ids, given the positions before them."""
    nats, target = target_nats(output, batch)
    block = torch.div(target, batch.ids.shape[1], rounding_mode="floor")
    return -torch.zeros(len(batch.ids), device=nats.device).index_add(0, block, nats)


def target_nats(
    output: ModelOutput, batch: PackedBatch
) -> tuple[Float[Tensor, " t"], Int64[Tensor, " t"]]:
    """(-log p in nats of every predicted id, its position in the flattened batch)."""
    source, target = shift_targets(batch, batch.predict)
    hidden, ids = output.hidden_states.flatten(0, 1)[source], batch.ids.flatten()[target]
    if output.vocabulary is not None:
        return _restricted_nats(output, batch, hidden, ids, target), target
    # In float32: sums over a large vocabulary lose their last digits in 16 bits.
    return F.cross_entropy(output.head(hidden).float(), ids, reduction="none"), target


def _restricted_nats(
    output: ModelOutput,
    batch: PackedBatch,
    hidden: Float[Tensor, "t d"],
    ids: Int64[Tensor, " t"],
    target: Int64[Tensor, " t"],
) -> Float[Tensor, " t"]:
    """-log p of every id among those that can be at its position, as generation is constrained.

        position    rank 0, 1, ... of an image             after the last rank    elsewhere
        ids         codes of the rank's stage, </img>      </img>                 text, <img>

    Targets are grouped by these ids, so that only logits of these ids are computed.

    Of one target in `every` the -log p among all ids replaces it, weighted so that the expected sum
    is that of a softmax over all ids: otherwise nothing would keep the logits of other ids small,
    and generation without constraints, as servers do it, would choose ids that cannot be there.
    """
    v, is_image = output.vocabulary, batch.roles.flatten()[target] > Role.BEGIN
    assert v is not None and output.split_head is not None
    index = torch.arange(batch.ids.shape[1], device=ids.device)
    begins = torch.where(batch.roles == Role.BEGIN, index, -1).cummax(1).values
    rank = (index - begins - 1).flatten()[target]
    stage = torch.zeros_like(rank)
    if v.stages:  # one more for </img> after the last rank, which is the only id there
        stages = torch.cat([v.rank_stages, torch.tensor([v.stages])]).to(ids.device)
        stage = stages[rank.clamp(0, len(stages) - 1)]
    stage = stage.masked_fill(~is_image, -1)
    end, tables = range(v.end, v.end + 1), range(max(1, v.stages))
    groups = {-1: [range(v.begin + 1)], **{s: [end, v.stage_ids(s)] for s in tables}}
    nats = torch.zeros(len(ids), device=ids.device)
    for group, head in zip(groups, output.split_head(list(groups.values())), strict=True):
        at = (stage == group).nonzero().flatten()
        if len(at):
            found = ids[at]
            if group >= 0:
                found = torch.where(found == v.end, 0, found - v.stage_ids(group).start + 1)
            losses = F.cross_entropy(head(hidden[at]).float(), found, reduction="none")
            nats = nats.index_add(0, at, losses)
    if output.every:
        at = _chosen(batch, output.every).flatten()[target].nonzero().flatten()
        logits = output.head(hidden[at])[:, : v.stop].float()
        among_all = F.cross_entropy(logits, ids[at], reduction="none")
        nats = nats.index_add(0, at, output.every * (among_all - nats[at]))
    return nats


def _chosen(batch: PackedBatch, every: int) -> Bool[Tensor, "b l"]:
    """One position in `every`, others in each block, whatever blocks are in the batch.

    A batch that is divided among processes then has the same targets in all of them.
    """
    position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    # A multiplicative hash (Knuth, 6.4); the product wraps around
    mixed = (batch.ids.sum(1, keepdim=True) * 65599 + position) * -7046029254386353131
    return (mixed >> 33) % every == 0

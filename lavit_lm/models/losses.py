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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.sequences.token_sequence import Role


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
    """

    hidden_states: Float[Tensor, "b l d"]
    inputs_embeds: Float[Tensor, "b l d"]
    head: Callable[[Tensor], Tensor]
    regressor: Callable[[Tensor], Tensor] | None = None


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
    nats, target = _nats(output, batch)
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
    nats, target = _nats(output, batch)
    block = torch.div(target, batch.ids.shape[1], rounding_mode="floor")
    return -torch.zeros(len(batch.ids), device=nats.device).index_add(0, block, nats)


def _nats(
    output: ModelOutput, batch: PackedBatch
) -> tuple[Float[Tensor, " t"], Int64[Tensor, " t"]]:
    """(-log p of every predicted id, its position in the flattened batch)."""
    source, target = shift_targets(batch, batch.predict)
    # In float32: sums over a large vocabulary lose their last digits in 16 bits.
    logits = output.head(output.hidden_states.flatten(0, 1)[source]).float()
    return F.cross_entropy(logits, batch.ids.flatten()[target], reduction="none"), target

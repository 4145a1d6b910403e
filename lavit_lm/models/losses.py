"""The one shift of the package: hidden state at place i - 1 against what stands at place i, and named losses.

    place        0    1    2      3    4      5     6
    id           <s>  a    <|img| 7    3      |img> </s>
    state        h0   h1   h2     h3   h4     h5    .
    predicts     a    img  7      3    |img>  </s>

Losses are averaged over their own targets, cross-entropy and regression apart, so that their balance does not drift
with the share of pictures in a batch. Targets of regression are always detached: a model must not move what it
predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lavit_lm.sequences.packing import Packed
from lavit_lm.sequences.segments import Role


@dataclass(frozen=True)
class Sum:
    """A sum over targets and how many there were, so that means over many batches or devices can be exact.

    Over several processes the count is their mean, and so need not be whole.
    """

    total: Float[Tensor, ""]
    count: Int64[Tensor, ""] | Float[Tensor, ""]

    @property
    def mean(self) -> Float[Tensor, ""]:
        """0 without targets."""
        return self.total / self.count.clamp(min=1e-9)


@dataclass(frozen=True)
class ModelOutput:
    """What a model made of a batch, and the two heads that read it.

    Args:
        states: after the LM's last norm.
        inputs: what the LM was fed at each place: rows of its embedding, or the bridge's vectors.
        head: states -> logits over the vocabulary.
        regressor: states -> vectors of the LM's width; None for a model that says ids only.
    """

    states: Float[Tensor, "b l d"]
    inputs: Float[Tensor, "b l d"]
    head: Callable[[Tensor], Tensor]
    regressor: Callable[[Tensor], Tensor] | None = None


def sources(
    batch: Packed, targets: Bool[Tensor, "b l"]
) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " t"]]:
    """(places whose state is read, places they predict), as indices into the flattened batch: source = target - 1."""
    at = targets.flatten().nonzero().flatten()
    length = batch.ids.shape[1]
    before = at - 1
    inside = (at % length > 0) & (
        batch.documents.flatten()[before] == batch.documents.flatten()[at]
    )
    if not bool(inside.all()):
        raise ValueError(
            "a document's first place is marked as a target: nothing stands before it to predict it from"
        )
    return before, at


def cross_entropy(seen: ModelOutput, batch: Packed) -> dict[str, Sum]:
    """Sums of -log p(id) in nats, "text" and "image" (codes, begin, end) apart. Logits are made at sources only."""
    nats, at = _nats(seen, batch)
    is_text = batch.roles.flatten()[at] == Role.TEXT
    return {
        name: Sum(nats[where].sum(), where.sum())
        for name, where in (("text", is_text), ("image", ~is_text))
    }


def has_images(batch: Packed) -> Bool[Tensor, "b l"]:
    """True at the places of documents that are fed vectors."""
    blocks, length = batch.documents.shape
    document = (
        batch.documents
        + (length + 1) * torch.arange(blocks, device=batch.documents.device)[:, None]
    )
    return torch.isin(document, document[batch.is_embedding])


def regression(seen: ModelOutput, batch: Packed) -> dict[str, Sum]:
    """{"vectors": sums of squared errors, each a mean over d; "spread": what the targets' standard deviation is}.

    The target of place i - 1 is the very vector that place i was fed, detached: it is the bridge's, or the embedding of
    the id that closes an image. Where vectors learn to be easily predicted they become all the same, and "spread", the
    standard deviation of a dimension over the batch's targets, goes to 0; it is logged, not descended.

    Raises:
        ValueError: a model without a regression head.
    """
    if seen.regressor is None:
        raise ValueError(
            "the rows have vectors to predict, but the model has no regression head for them"
        )
    before, at = sources(batch, batch.regress)
    said = seen.regressor(seen.states.flatten(0, 1)[before]).float()
    targets = seen.inputs.flatten(0, 1)[at].detach().float()
    count = torch.tensor(len(at), device=targets.device)
    spread = targets.std(0).mean() if len(at) > 1 else targets.sum() * 0
    return {
        "vectors": Sum((said - targets).square().mean(1).sum(), count),
        "spread": Sum(spread * count, count),
    }


def log_likelihood(seen: ModelOutput, batch: Packed) -> Float[Tensor, " b"]:
    """log p of each block's predicted ids given what stands before them, in nats."""
    nats, at = _nats(seen, batch)
    rows = torch.div(at, batch.ids.shape[1], rounding_mode="floor")
    return -torch.zeros(len(batch.ids), device=nats.device).index_add(0, rows, nats)


def _nats(seen: ModelOutput, batch: Packed) -> tuple[Float[Tensor, " t"], Int64[Tensor, " t"]]:
    """(-log p of every predicted id, where it stands in the flattened batch)."""
    before, at = sources(batch, batch.predict)
    logits = seen.head(seen.states.flatten(0, 1)[before]).float()
    return F.cross_entropy(logits, batch.ids.flatten()[at], reduction="none"), at

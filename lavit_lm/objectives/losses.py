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

from lavit_lm.packing import Packed
from lavit_lm.segments import Role


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


def sources(batch: Packed, targets: Bool[Tensor, "b l"]) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " t"]]:
    """(places whose state is read, places they predict), as indices into the flattened batch: source = target - 1."""
    at = targets.flatten().nonzero().flatten()
    length = batch.ids.shape[1]
    before = at - 1
    inside = (at % length > 0) & (batch.documents.flatten()[before] == batch.documents.flatten()[at])
    if not bool(inside.all()):
        raise ValueError("a document's first place is marked as a target: nothing stands before it to predict it from")
    return before, at


def cross_entropy(states: Float[Tensor, "b l d"], head: Callable[[Tensor], Tensor], batch: Packed) -> dict[str, Sum]:
    """Sums of -log p(id) in nats, "text" and "image" (codes, begin, end) apart. Logits are made at sources only."""
    before, at = sources(batch, batch.predict)
    logits = head(states.flatten(0, 1)[before]).float()
    nats = F.cross_entropy(logits, batch.ids.flatten()[at], reduction="none")
    is_text = batch.roles.flatten()[at] == Role.TEXT
    return {name: Sum(nats[where].sum(), where.sum()) for name, where in (("text", is_text), ("image", ~is_text))}


def log_likelihood(
    states: Float[Tensor, "b l d"], head: Callable[[Tensor], Tensor], batch: Packed
) -> Float[Tensor, " b"]:
    """log p of each block's predicted ids given what stands before them, in nats."""
    before, at = sources(batch, batch.predict)
    logits = head(states.flatten(0, 1)[before]).float()
    nats = F.cross_entropy(logits, batch.ids.flatten()[at], reduction="none")
    rows = torch.div(at, batch.ids.shape[1], rounding_mode="floor")
    return -torch.zeros(len(batch.ids), device=nats.device).index_add(0, rows, nats)

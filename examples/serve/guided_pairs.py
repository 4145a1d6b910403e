"""Guidance where an engine computes every sequence by itself: two requests for an image.

    prompt, <|img|>    logits c  \
                                   id of u + s (c - u) for both, at every step
    <|img|>            logits u  /

The id is drawn here, so that both sequences get the same one whatever the engine's random numbers
depend on: vLLM's model runner V2 draws by seed and position, and the two sequences have different
positions. The engine itself decodes greedily: only the chosen id is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Pairs:
    """The requests that have the same `extra["guidance_pair"]`, by their slots in the engine.

    `extra` of a request: guidance_pair, any name; guidance_scale, positive for the conditional
    sequence and 0 for the other; and for the conditional one seed, temperature (0: the most likely
    id) and top_k.
    """

    def __init__(self) -> None:
        self.requests: dict[int, dict[str, Any]] = {}
        self.generators: dict[Any, torch.Generator] = {}

    def add(self, slot: int, extra: dict[str, Any] | None) -> bool:
        """Store a request, in place of an earlier one; returns whether it belongs to a pair."""
        self.requests.pop(slot, None)
        if not extra or "guidance_pair" not in extra:
            return False
        self.requests[slot] = extra
        if extra["guidance_scale"] > 0:
            generator = torch.Generator().manual_seed(extra.get("seed", 0))
            self.generators[extra["guidance_pair"]] = generator
        return True

    def move(self, first: int, second: int, swap: bool) -> None:
        """Move the request of one slot to another, or exchange both."""
        one, other = self.requests.pop(first, None), self.requests.pop(second, None)
        if one is not None:
            self.requests[second] = one
        if swap and other is not None:
            self.requests[first] = other

    def apply(self, logits: torch.Tensor, slots: Iterable[int]) -> torch.Tensor:
        """Leave one id to both sequences of each pair, in place.

        Args:
            logits: float [batch vocabulary]; forbidden ids are -inf.
            slots: of the batch. A sequence whose partner is not among them keeps its logits.
        """
        pairs: dict[Any, dict[bool, int]] = {}
        extras: dict[Any, dict[str, Any]] = {}
        for row, slot in enumerate(slots):
            extra = self.requests.get(slot)
            if extra is not None:
                pair, guided = extra["guidance_pair"], extra["guidance_scale"] > 0
                pairs.setdefault(pair, {})[guided] = row
                if guided:
                    extras[pair] = extra
        whole = {pair: rows for pair, rows in pairs.items() if len(rows) == 2}
        if not whole:
            return logits
        conditional = torch.tensor([rows[True] for rows in whole.values()], device=logits.device)
        free = torch.tensor([rows[False] for rows in whole.values()], device=logits.device)
        scales = [float(extras[pair]["guidance_scale"]) for pair in whole]
        scale = torch.tensor(scales, device=logits.device)[:, None]
        c, u = logits[conditional].float(), logits[free].float()
        # Forbidden ids are -inf in both: their difference would be nan.
        mixed = torch.where(u.isneginf() | c.isneginf(), -torch.inf, u + scale * (c - u))
        drawn = [
            self._draw(pair, extras[pair], row) for pair, row in zip(whole, mixed, strict=True)
        ]
        chosen = torch.tensor(drawn, device=logits.device)
        for rows in (conditional, free):
            logits[rows] = -torch.inf
            logits[rows, chosen] = 0.0
        return logits

    def _draw(self, pair: Any, extra: dict[str, Any], mixed: torch.Tensor) -> int:
        temperature = extra.get("temperature", 1.0)
        if temperature == 0:
            return int(mixed.argmax())
        likely, ids = mixed.topk(min(extra.get("top_k", len(mixed)), len(mixed)))
        probabilities = (likely / temperature).softmax(-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=self.generators[pair])
        return int(ids[int(drawn)])

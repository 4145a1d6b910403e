"""Beam search: of several continuations of a prompt kept side by side, the likeliest one. Nothing is drawn by chance.

    step      beam 0: a red      -.4  + log p(next)   -->   of all continuations the best, as many as there are beams
              beam 1: a green    -.9  + log p(next)         those that end are set aside with score / length ** penalty

Captions of published models are said by 2 to 5 beams (DaVinci: 2, of 5 to 20 tokens). Sampling and guidance:
generation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lavit_lm.generation.sampling import GenerationConstraint
from lavit_lm.sequences.segments import TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor


@dataclass
class Beams:
    """Continuations of one prompt: those that go on, and those that have ended with their scores."""

    said: list[list[int]]
    ended: list[tuple[float, list[int]]] = field(default_factory=list)

    def best(self) -> list[int]:
        return max(self.ended, key=lambda one: one[0])[1]


@torch.no_grad()
def beam_search(
    model: Any,
    processor: MultimodalProcessor,
    prompts: Sequence[TokenSequence],
    rule: GenerationConstraint,
    beams: int = 2,
    length_penalty: float = 1.0,
    cached: bool = True,
) -> list[list[int]]:
    """Continue each prompt by the rule.

    Args:
        model: a SequenceModel.
        beams: continuations of a prompt kept at a time.
        length_penalty: a continuation of n ids is worth log p / n ** penalty; 0 prefers short ones.
        cached: see Decoding.

    Returns: the ids said after each prompt, with the one that ended it, if any.

    Raises:
        ValueError: no prompts or no beams, or a prompt without room for an answer.
    """
    if not prompts or beams < 1:
        raise ValueError(
            f"expected at least one prompt and one beam, got {len(prompts)} and {beams}"
        )
    state = model.decoding(
        [row for row in prompts for _ in range(beams)], processor.pad, rule.most, cached
    )
    stops = torch.tensor(rule.stops(processor), device=state.device)
    found = [Beams([[] for _ in range(beams)]) for _ in prompts]
    scores = torch.full((len(prompts), beams), -torch.inf, device=state.device)
    scores[:, 0] = 0.0  # the beams of a prompt are still one and the same
    logits = model.head(state.prefill()).float()
    words = rule.words(processor, logits.shape[1], state.device)
    last = rule.most + (rule.kind == "image") - 1  # an image's end comes after its last code
    for step in range(last + 1):
        may = rule.allowed(words, stops, step)
        each = scores[..., None] + logits.masked_fill(~may, -torch.inf).log_softmax(1).unflatten(
            0, scores.shape
        )
        best = each.flatten(1).topk(min(2 * beams, each.shape[1] * each.shape[2]))
        taken = [
            _go_on(
                one,
                values,
                places,
                logits.shape[1],
                beams,
                stops.tolist(),
                length_penalty,
                step == last,
            )
            for one, values, places in zip(
                found, best.values.tolist(), best.indices.tolist(), strict=True
            )
        ]
        if step == last or all(len(one.ended) >= beams for one in found):
            break
        scores = torch.tensor(
            [[score for score, _, _ in rows] for rows in taken], device=state.device
        )
        sources = [
            number * beams + source for number, rows in enumerate(taken) for _, source, _ in rows
        ]
        state.reorder(torch.tensor(sources, device=state.device))
        ids = torch.tensor([token for rows in taken for _, _, token in rows], device=state.device)
        logits = model.head(state.append_ids(ids)).float()
    return [one.best() for one in found]


def _go_on(
    one: Beams,
    values: Sequence[float],
    places: Sequence[int],
    width: int,
    beams: int,
    stops: Sequence[int],
    penalty: float,
    over: bool,
) -> list[tuple[float, int, int]]:
    """(score, the beam it continues, id) of each beam's next id; what ends here is set aside."""
    keep: list[tuple[float, int, int]] = []
    if len(one.ended) >= beams:  # over: what prompts beside it still find is nothing to it
        values, places = (), ()
    for rank, (value, place) in enumerate(zip(values, places, strict=True)):
        source, token = divmod(place, width)
        said = [*one.said[source], token]
        if value == -torch.inf:
            continue
        if over or (token in stops and rank < beams):
            one.ended.append((value / len(said) ** penalty, said))
        elif token not in stops and len(keep) < beams:
            keep.append((value, source, token))
    keep += [(-torch.inf, 0, stops[0])] * (
        beams - len(keep)
    )  # fewer ids than beams may come: a beam that never wins
    one.said = [[*one.said[source], token] for _, source, token in keep]
    return keep

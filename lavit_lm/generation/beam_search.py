"""Beam search: keep several continuations of a prompt, return the most likely one. No sampling.

    beam 0: a red      -.4  + log p(next)   -->   the best continuations go on, one per beam;
    beam 1: a green    -.9  + log p(next)         of those that end, log p / length ** penalty
                                                  is compared

Published captioning models use 2 to 5 beams (DaVinci: 2, of 5 to 20 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lavit_lm.generation.sampling import GenerationConstraint
from lavit_lm.sequences.token_sequence import TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok.nn.ranges import require_number

MAX_BEAMS = 512  # each is one more sequence in the batch; more would not end in a day


@torch.no_grad()
def beam_search(
    model: Any,
    processor: MultimodalProcessor,
    prompts: Sequence[TokenSequence],
    constraint: GenerationConstraint,
    num_beams: int = 2,
    length_penalty: float = 1.0,
    use_cache: bool = True,
) -> list[list[int]]:
    """Generate ids after each prompt.

    Args:
        model: a SequenceModel.
        processor: its text tokenizer and visual vocabulary.
        prompts: sequences of any lengths.
        constraint: which ids may be generated, and how many.
        num_beams: continuations kept for each prompt.
        length_penalty: a continuation of n ids scores log p / n ** penalty; 0 prefers short ones.
        use_cache: see generate_ids.

    Returns:
        For each prompt the generated ids, including the one that ended it, if any.

    Raises:
        ValueError: no prompts, no beams, or a prompt that leaves too few positions in the context.
    """
    require_number("num_beams", num_beams, 1, MAX_BEAMS, integer=True)
    require_number("length_penalty", length_penalty, -100, 100)
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    sequences = [prompt for prompt in prompts for _ in range(num_beams)]
    state = model.start_decoding(sequences, processor.pad, constraint.max_new_tokens, use_cache)
    stops = constraint.stop_ids(processor)
    beams = [_Beams(num_beams, length_penalty, stops) for _ in prompts]
    scores = torch.full((len(prompts), num_beams), -torch.inf, device=state.device)
    scores[:, 0] = 0.0  # all beams of a prompt are equal at first: continue only one of them
    hidden = state.prefill()
    candidates = constraint.candidates(processor, state.num_logits, state.device)
    for step in range(constraint.max_steps):
        last = step == constraint.max_steps - 1
        options = candidates[min(step, len(candidates) - 1)]
        logits = state.logits(hidden, options.ids).float()
        allowed = constraint.allowed([options.content], options.stops, step)
        log_p = logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
        totals = (scores[..., None] + log_p.unflatten(0, scores.shape)).flatten(1)
        # Twice as many candidates as beams: if every beam can end, as many still go on.
        best = totals.topk(min(2 * num_beams, totals.shape[1]))
        sources = best.indices.div(logits.shape[1], rounding_mode="floor")
        found = best.values, sources, options.ids[best.indices % logits.shape[1]]
        chosen = [
            one.advance(list(zip(*columns, strict=True)), last)
            for one, *columns in zip(beams, *(c.tolist() for c in found), strict=True)
        ]
        if last or all(one.complete for one in beams):
            break
        scores = torch.tensor([[c[0] for c in one] for one in chosen], device=state.device)
        rows = [i * num_beams + c[1] for i, one in enumerate(chosen) for c in one]
        state.reorder(torch.tensor(rows, device=state.device))
        ids = torch.tensor([c[2] for one in chosen for c in one], device=state.device)
        hidden = state.append_ids(ids)
    return [max(one.ended, key=lambda pair: pair[0])[1] for one in beams]


class _Beams:
    """Continuations of one prompt: those that go on, and those that have ended with a score."""

    def __init__(self, num_beams: int, length_penalty: float, stops: list[int]) -> None:
        self.num_beams, self.length_penalty, self.stops = num_beams, length_penalty, stops
        self.ids: list[list[int]] = [[] for _ in range(num_beams)]
        self.ended: list[tuple[float, list[int]]] = []

    @property
    def complete(self) -> bool:
        return len(self.ended) >= self.num_beams

    def advance(
        self, candidates: list[tuple[float, int, int]], last: bool
    ) -> list[tuple[float, int, int]]:
        """Choose num_beams of the candidates, best first: (log p, the beam it continues, id)."""
        chosen: list[tuple[float, int, int]] = []
        # A complete prompt only waits for the rest of the batch: nothing is added to it.
        for rank, (score, source, token) in enumerate([] if self.complete else candidates):
            ids = [*self.ids[source], token]
            if score == -torch.inf:
                continue
            if last or (token in self.stops and rank < self.num_beams):
                self.ended.append((score / len(ids) ** self.length_penalty, ids))
            elif token not in self.stops and len(chosen) < self.num_beams:
                chosen.append((score, source, token))
        # With fewer allowed ids than beams, fill up with beams that never win.
        chosen += [(-torch.inf, 0, self.stops[0])] * (self.num_beams - len(chosen))
        self.ids = [[*self.ids[source], token] for _, source, token in chosen]
        return chosen

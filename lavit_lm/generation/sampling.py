"""One loop that continues sequences: batched, cached, guided, constrained, seeded.

    step   logits [2B v] = cond over uncond -> guided [B v] -> constrained -> temperature, top-k, top-p -> one id each

Guidance (classifier-free, LaVIT section 3.2): u + s (c - u), both halves in one batch that shares every drawn id.
Constraints come after guidance, so that it cannot favour what is forbidden, and before top-k, so that k counts allowed
ids only. A row's ids depend on its own prompt and generator, not on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.sequences.segments import TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for all rows, which then get seeds of their own, or one for each."""


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest id.
        top_k: only the k likeliest ids; None for all. LaVIT uses 200 (paper) or 50 (its API) for codes.
        top_p: only the likeliest ids whose probabilities reach p together; None for all.
        guidance_scale: s above; 1 for none.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability above 0, got {self.top_p}")

    def draw(
        self, logits: Float[Tensor, "b v"], generators: Sequence[torch.Generator | None]
    ) -> Int64[Tensor, " b"]:
        """One id for each row, from its own generator."""
        if self.temperature == 0:
            return logits.argmax(1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits, order = logits.topk(self.top_k)  # in descending order
        else:
            logits, order = logits.sort(1, descending=True)
        chances = logits.softmax(1)
        if self.top_p is not None:
            before = chances.cumsum(1) - chances
            chances = chances.masked_fill(before >= self.top_p, 0.0)
        edges = chances.double().cumsum(1)
        device = logits.device
        points = [
            torch.rand((), generator=g, device=g.device if g else device, dtype=torch.float64)
            for g in generators
        ]
        point = torch.stack([p.to(device) for p in points])[:, None] * edges[:, -1:]
        at = torch.searchsorted(edges, point, right=True).clamp(max=logits.shape[1] - 1)
        last = (chances > 0).sum(
            1, keepdim=True
        ) - 1  # rounding must not reach past the last possible id
        return order.gather(1, at.minimum(last))[:, 0]


@dataclass(frozen=True)
class GenerationConstraint:
    """What may be said next.

    kind "image": the prompts end inside an image; codes, and its end once there are `least`, until `most`.
    kind "text":  words only, until the end of text.
    kind "mixed": words, until the end of text or the beginning of an image.
    """

    kind: Literal["image", "text", "mixed"]
    least: int = 1
    most: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most or self.most < 1:
            raise ValueError(
                f"expected 0 <= least <= most and most >= 1, got least {self.least}, most {self.most}"
            )

    def stops(self, processor: MultimodalProcessor) -> list[int]:
        """Ids that end a row."""
        v = processor.vocabulary
        return {"image": [v.end], "text": [processor.stop], "mixed": [processor.stop, v.begin]}[
            self.kind
        ]

    def words(
        self, processor: MultimodalProcessor, size: int, device: torch.device
    ) -> Bool[Tensor, " v"]:
        """True at what an answer is made of: codes, or text that is no special token; for logits of width `size`."""
        if self.kind == "image":
            return processor.vocabulary.mask(size, device)
        ids = torch.arange(size, device=device)
        added = processor.text_tokenizer.added_tokens_decoder
        special = [
            i for i, token in added.items() if token.special
        ] + processor.text_tokenizer.all_special_ids
        never = torch.isin(
            ids, torch.tensor(special, device=device)
        ) | processor.vocabulary.is_visual(ids)
        return (ids < len(processor.text_tokenizer)) & ~never

    def allowed(
        self, words: Bool[Tensor, " v"], stops: Int64[Tensor, " s"], said: int
    ) -> Bool[Tensor, " v"]:
        """True at ids that may come after `said` ids."""
        full = self.kind == "image" and said >= self.most
        may = torch.zeros_like(words) if full else words.clone()
        may[stops] = said >= self.least
        return may


@torch.no_grad()
def generate_ids(
    model: SequenceModel,
    processor: MultimodalProcessor,
    prompts: Sequence[TokenSequence],
    rule: GenerationConstraint,
    sampling: Sampling = Sampling(),
    unconditional: Sequence[TokenSequence] | None = None,
    generator: Generators = None,
    cached: bool = True,
) -> list[list[int]]:
    """Continue each prompt by the rule.

    Args:
        prompts: rows of any lengths; what stands there stays as it is.
        unconditional: for each prompt, the row of the unconditional stream; needed for guidance only.
        generator: one for all rows, which then get seeds of their own, or one for each.
        cached: keep keys and values; False computes everything anew at every step (slow, for checks).

    Returns: the ids said after each prompt, with the one that ended it, if any.

    Raises:
        ValueError: no prompts, an empty one, one without room for an answer, or guidance without unconditional rows.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    guided = sampling.guidance_scale != 1
    if guided and (unconditional is None or len(unconditional) != len(prompts)):
        raise ValueError("guidance needs an unconditional row for each prompt")
    rows = [*prompts, *(unconditional or [])] if guided else list(prompts)
    state = model.decoding(rows, processor.pad, rule.most, cached)
    generators = per_row(generator, len(prompts))
    stops = torch.tensor(rule.stops(processor), device=state.device)
    said: list[list[int]] = [[] for _ in prompts]
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=state.device)
    logits = model.head(state.prefill()).float()
    words = rule.words(processor, logits.shape[1], state.device)
    for step in range(
        rule.most + (rule.kind == "image")
    ):  # an image's end comes after its last code
        if guided:
            conditional, free = logits.chunk(2)
            logits = free + sampling.guidance_scale * (conditional - free)
        may = rule.allowed(words, stops, step)
        drawn = sampling.draw(logits.masked_fill(~may, -torch.inf), generators)
        for i in open_rows.nonzero().flatten().tolist():
            said[i].append(int(drawn[i]))
        open_rows &= ~torch.isin(drawn, stops)
        if not bool(open_rows.any()):
            break
        logits = model.head(
            state.append_ids(torch.cat([drawn, drawn]) if guided else drawn)
        ).float()
    return said


def per_row(generator: Generators, rows: int) -> list[torch.Generator | None]:
    """A generator for each row. Raises ValueError for another number of them."""
    if generator is None:
        return [None] * rows
    if isinstance(generator, torch.Generator):
        seeds = torch.randint(2**62, (rows,), generator=generator, device=generator.device).tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(generator) != rows:
        raise ValueError(
            f"expected one generator, or one for each of {rows} rows, got {len(generator)}"
        )
    return list(generator)

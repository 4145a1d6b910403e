"""Generation of ids: batched, cached, guided, constrained, with a generator for each sequence.

    logits [2b v] -> guidance [b v] -> constraint -> temperature, top-k, top-p -> one id [b] a step

Classifier-free guidance (LaVIT, section 3.2) is u + s (c - u): conditional and unconditional
sequences are one batch, and both get every sampled id. The constraint is applied after guidance,
which could otherwise favor a forbidden id, and before top-k, so that k counts allowed ids only. The
ids of a sequence depend on its prompt and generator, not on the rest of the batch: equal prompts
share their prefill, finished sequences leave the batch, and so does the unconditional half once
guidance has ended. Logits are computed of ids that may follow only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.sequences.token_sequence import TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary
from lavit_tok import VisualCodes
from lavit_tok.nn.ranges import require_number

COMPACT = 4  # finished sequences leave the batch once they are a quarter of it: it is copied then

GUIDANCE_SCALE, TOP_K = 3.0, 50
"""Of images, by default; texts are generated greedily."""
GUIDANCE_RANGE = -1000, 1000

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator, from which each sequence gets a seed of its own, or one for each sequence."""


@dataclass(frozen=True)
class Sampling:
    """How ids are chosen from logits.

    Args:
        temperature: divides the logits; 0 takes the most likely id (greedy decoding).
        top_k: sample from the k most likely ids only; None for all. LaVIT uses 200 (paper) or 50
            (its API) for codes.
        top_p: sample from the most likely ids whose probabilities add up to p; None for all.
        guidance_scale: s above; 1 for no guidance.
        guidance_interval: (first, stop): guidance for ids first..stop-1 of a sequence only
            (arXiv:2404.07724); None for all. After `stop` a step costs what it does without
            guidance.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, 0, 1000)
        if 0 < self.temperature < 1e-6:  # the logits would overflow float32
            raise ValueError(f"temperature: expected 0 or 1e-6..1000, got {self.temperature}")
        if self.top_k is not None:
            require_number("top_k", self.top_k, 1, 2**31, integer=True)
        if self.top_p is not None:
            require_number("top_p", self.top_p, 1e-6, 1)
        require_number("guidance_scale", self.guidance_scale, *GUIDANCE_RANGE)
        if self.guidance_interval is not None:
            given: Any = self.guidance_interval
            whole = isinstance(given, list | tuple) and [type(n) for n in given] == [int, int]
            if not whole or not 0 <= given[0] <= given[1]:
                raise ValueError(
                    "guidance_interval: expected two integers 0 <= first <= stop, got "
                    f"{given!r:.60}"
                )

    def guided(self, step: int) -> bool:
        """Whether the id after `step` generated ones is chosen with guidance."""
        first, stop = self.guidance_interval or (0, step + 1)
        return self.guidance_scale != 1 and first <= step < stop

    def draw(
        self, logits: Float[Tensor, "b v"], generators: Sequence[torch.Generator | None]
    ) -> Int64[Tensor, " b"]:
        """Draw one id for each sequence from its own generator."""
        if self.temperature == 0:
            return logits.argmax(1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits, ids = logits.topk(self.top_k)  # in descending order
        else:
            logits, ids = logits.sort(1, descending=True)
        probabilities = logits.softmax(1)
        if self.top_p is not None:
            before = probabilities.cumsum(1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        # Inverse transform sampling, not torch.multinomial, which takes one generator for the
        # batch. In float64: float32 sums of 32,000 probabilities would change those of rare ids.
        cumulative = probabilities.double().cumsum(1)
        uniform = [
            torch.rand(
                (), generator=g, device=g.device if g else logits.device, dtype=torch.float64
            )
            for g in generators
        ]
        points = torch.stack([u.to(logits.device) for u in uniform])[:, None] * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, points, right=True)
        last = (probabilities > 0).sum(1, keepdim=True) - 1
        # Rounding must not select an id of probability 0 after the last possible one.
        return ids.gather(1, index.minimum(last))[:, 0]


@dataclass(frozen=True)
class Candidates:
    """The ids that may follow somewhere, in ascending order, and what they are.

    Args:
        ids: int64 [n].
        content: True at codes or text tokens.
        stops: indices in `ids` of those that end a sequence.
    """

    ids: Int64[Tensor, " n"]
    content: Bool[Tensor, " n"]
    stops: Int64[Tensor, " s"]


@dataclass(frozen=True)
class GenerationConstraint:
    """Which ids may be generated, and how many.

    Args:
        kind: "image": the prompts end inside an image; codes, then the id that ends the image.
            "text": text tokens until the end of text.
            "mixed": text tokens until the end of text or the beginning of an image.
        min_new_tokens, max_new_tokens: text tokens, or codes, of a sequence; the id that ends an
            image is not counted.

    Raises:
        ValueError: not 0 <= min_new_tokens <= max_new_tokens, or max_new_tokens 0.
    """

    kind: Literal["image", "text", "mixed"]
    min_new_tokens: int = 1
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        require_number("min_new_tokens", self.min_new_tokens, 0, 2**31, integer=True)
        require_number("max_new_tokens", self.max_new_tokens, 1, 2**31, integer=True)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                "expected 0 <= min_new_tokens <= max_new_tokens and max_new_tokens >= 1, got "
                f"{self.min_new_tokens} and {self.max_new_tokens}"
            )

    @property
    def max_steps(self) -> int:
        """The largest number of generated ids; an image ends with one more id than its codes."""
        return self.max_new_tokens + (self.kind == "image")

    def stop_ids(self, processor: MultimodalProcessor) -> list[int]:
        """Ids that end a sequence."""
        v = processor.vocabulary
        stops = {"image": [v.end], "text": [processor.stop], "mixed": [processor.stop, v.begin]}
        return stops[self.kind]

    def content_masks(
        self, processor: MultimodalProcessor, size: int, device: torch.device
    ) -> list[Bool[Tensor, " v"]]:
        """True at codes, or at text tokens that are not special, for logits of width `size`.

        Returns: a mask for each number of ids generated before, the last for all further ones:
            nested codes of different ranks have different ids.
        """
        if self.kind == "image":
            return processor.vocabulary.masks(size, device)
        ids = torch.arange(size, device=device)
        tokenizer = processor.text_tokenizer
        added = tokenizer.added_tokens_decoder.items()
        special = [i for i, token in added if token.special] + tokenizer.all_special_ids
        forbidden = torch.isin(ids, torch.tensor(special, device=device))
        forbidden |= processor.vocabulary.is_visual(ids)
        return [(ids < len(tokenizer)) & ~forbidden]

    def candidates(
        self, processor: MultimodalProcessor, size: int, device: torch.device
    ) -> list[Candidates]:
        """What may follow after each number of generated ids; arguments as of content_masks."""
        stops = torch.tensor(sorted(self.stop_ids(processor)), device=device)
        made: dict[int, Candidates] = {}
        masks = self.content_masks(processor, size, device)
        for mask in masks:
            if id(mask) not in made:  # ranks of a stage share theirs
                either = mask.clone()
                either[stops] = True
                ids = either.nonzero().flatten()
                made[id(mask)] = Candidates(ids, mask[ids], torch.searchsorted(ids, stops))
        return [made[id(mask)] for mask in masks]

    def allowed(
        self, contents: list[Bool[Tensor, " v"]], stops: Int64[Tensor, " s"], generated: int
    ) -> Bool[Tensor, " v"]:
        """True at ids that may follow after `generated` ids.

        Args:
            contents: see content_masks.
            stops: see stop_ids.
            generated: number of ids generated before.
        """
        complete = self.kind == "image" and generated >= self.max_new_tokens
        content = contents[min(generated, len(contents) - 1)]
        allowed = torch.zeros_like(content) if complete else content.clone()
        allowed[stops] = generated >= self.min_new_tokens
        return allowed


@torch.no_grad()
def generate_ids(
    model: SequenceModel,
    processor: MultimodalProcessor,
    prompts: Sequence[TokenSequence],
    constraint: GenerationConstraint,
    sampling: Sampling = Sampling(),
    unconditional: Sequence[TokenSequence] | None = None,
    generator: Generators = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Generate ids after each prompt.

    Args:
        model: any SequenceModel.
        processor: its text tokenizer and visual vocabulary.
        prompts: sequences of any lengths.
        constraint: which ids may be generated, and how many.
        sampling: how they are chosen.
        unconditional: for each prompt the unconditional sequence; needed for guidance only.
        generator: see Generators.
        use_cache: keep keys and values; False computes all positions at every step (for checks).

    Returns:
        For each prompt the generated ids, including the one that ended it, if any.

    Raises:
        ValueError: no prompts, an empty one, one that leaves too few positions in the context, or
            guidance without unconditional sequences.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    guided = sampling.guidance_scale != 1
    if guided and (unconditional is None or len(unconditional) != len(prompts)):
        raise ValueError("guidance needs an unconditional sequence for each prompt")
    last_guided = (sampling.guidance_interval or (0, constraint.max_steps))[1]
    guided = guided and last_guided > 0
    sequences = [*prompts, *(unconditional or [])] if guided else list(prompts)
    generators = sequence_generators(generator, len(prompts))
    # A sequence that is given several times, as for n images of one prompt, is computed once.
    distinct = {id(sequence): sequence for sequence in sequences}
    rows = {key: row for row, key in enumerate(distinct)}
    state = model.start_decoding(
        list(distinct.values()), processor.pad, constraint.max_new_tokens, use_cache
    )
    stops = set(constraint.stop_ids(processor))
    generated: list[list[int]] = [[] for _ in prompts]
    hidden = state.prefill()
    if len(distinct) < len(sequences):
        copies = torch.tensor([rows[id(sequence)] for sequence in sequences], device=state.device)
        state.reorder(copies)
        hidden = hidden[copies]
    candidates = constraint.candidates(processor, state.num_logits, state.device)
    left = list(range(len(prompts)))  # the sequence of each row
    finished = [False] * len(prompts)
    for step in range(constraint.max_steps):
        if constraint.kind == "image" and step == constraint.max_new_tokens:
            for row, ended in zip(left, finished, strict=True):  # nothing else may follow
                generated[row] += [] if ended else stops
            break
        options = candidates[min(step, len(candidates) - 1)]
        wanted = hidden if not guided or sampling.guided(step) else hidden[: len(left)]
        logits = state.logits(wanted, options.ids).float()
        if len(logits) > len(left):
            conditional, free = logits.chunk(2)
            logits = free + sampling.guidance_scale * (conditional - free)
        if step < constraint.min_new_tokens:
            logits = logits.index_fill(1, options.stops, -torch.inf)
        drawn = sampling.draw(logits, [generators[i] for i in left])
        ids = options.ids[drawn]
        for row, token in enumerate(ids.tolist()):
            if not finished[row]:
                generated[left[row]].append(token)
                finished[row] = token in stops
        if all(finished):
            break
        ends = guided and step + 1 >= last_guided
        if ends or sum(finished) * COMPACT >= len(left):
            going = [row for row, ended in enumerate(finished) if not ended]
            both = going if ends or not guided else [*going, *(row + len(left) for row in going)]
            state.reorder(torch.tensor(both, device=state.device))
            ids, left = ids[torch.tensor(going, device=state.device)], [left[row] for row in going]
            finished, guided = [False] * len(left), guided and not ends
        if step + 1 < constraint.max_new_tokens:
            hidden = state.append_ids(torch.cat([ids, ids]) if guided else ids)
    return generated


def as_codes(generated: Sequence[Sequence[int]], vocabulary: VisualVocabulary) -> VisualCodes:
    """The codes of images from their generated ids."""
    v = vocabulary
    codes = [v.to_codes(torch.tensor([i for i in ids if i != v.end])) for ids in generated]
    return VisualCodes.from_list([c.tolist() for c in codes], v.codebook_size, v.stages > 0)


def sequence_generators(generator: Generators, count: int) -> list[torch.Generator | None]:
    """A generator for each of `count` sequences. Raises ValueError for another number of them."""
    if generator is None:
        return [None] * count
    if isinstance(generator, torch.Generator):
        size, device = (count,), generator.device
        seeds = torch.randint(2**62, size, generator=generator, device=device).tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    given = list(generator) if isinstance(generator, Sequence) else []
    if len(given) != count or not all(isinstance(g, torch.Generator) for g in given):
        got = len(given) if given else repr(generator)[:60]
        raise ValueError(f"expected one generator, or one for each of {count} sequences, got {got}")
    return [*given]

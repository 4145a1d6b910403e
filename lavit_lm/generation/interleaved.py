"""Generation of text and images in turn, for models whose images are vectors.

    TEXT --<img> generated--> IMAGE, n steps --> CLOSE --> TEXT ...      --end of text--> DONE

    mode     input of the next position     comes from
    TEXT     embedding of a sampled id      the LM's head
    IMAGE    a vector                       the regression head
    CLOSE    embedding of </img>            nothing: it is forced

An image has exactly n vectors (Emu, VL-GPT: 32), so that its end need not be generated. Every
sequence of a batch has a mode of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lavit_lm.generation.sampling import (
    GenerationConstraint,
    Generators,
    Sampling,
    sequence_generators,
)
from lavit_lm.sequences.token_sequence import TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor

GREEDY = Sampling(temperature=0.0)
Output = list[int] | Tensor
"""Ids of one text, or vectors float [n d] of one image."""

Mode = Enum("Mode", ["TEXT", "IMAGE", "CLOSE", "DONE"])


@dataclass
class _Sequence:
    """What one sequence has generated, and what it may still generate."""

    mode: Mode
    max_new_tokens: int
    images_left: int
    num_vectors: int
    output: list[Output] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    tokens_left: int = 0

    def __post_init__(self) -> None:
        self.tokens_left = self.max_new_tokens
        if self.mode is Mode.TEXT and self.max_new_tokens == 0:
            self.mode = Mode.DONE

    def add_id(self, token: int, begin: int, stop: int) -> None:
        if token == stop:
            self.mode = Mode.DONE
        elif token == begin:
            self.mode, self.images_left = Mode.IMAGE, self.images_left - 1
        else:
            if not self.output or isinstance(self.output[-1], Tensor):
                self.output.append([])
            self.output[-1].append(token)  # type: ignore[union-attr]
            self.tokens_left -= 1
            if self.tokens_left == 0:
                self.mode = Mode.DONE

    def add_vector(self, vector: Tensor) -> None:
        self.vectors.append(vector)
        if len(self.vectors) == self.num_vectors:
            self.output.append(torch.stack(self.vectors))
            self.vectors, self.mode = [], Mode.CLOSE if self.max_new_tokens else Mode.DONE

    def close_image(self) -> None:
        self.mode, self.tokens_left = Mode.TEXT, self.max_new_tokens


@torch.no_grad()
def generate_interleaved(
    model: Any,
    processor: MultimodalProcessor,
    prompts: Sequence[TokenSequence],
    num_vectors: int,
    starts_with_image: bool = False,
    max_new_tokens: int = 0,
    max_images: int = 0,
    sampling: Sampling = GREEDY,
    generator: Generators = None,
    use_cache: bool = True,
) -> list[list[Output]]:
    """Generate texts and images after each prompt.

    Args:
        model: a SequenceModel with a regression head.
        processor: its text tokenizer and visual vocabulary.
        prompts: sequences of any lengths.
        num_vectors: n, vectors per image.
        starts_with_image: the prompts end with <img>; an image is generated first.
        max_new_tokens: text tokens of each text; 0 for one image and no text.
        max_images: images that may be generated after that.
        sampling: of text tokens; without guidance.
        generator: see Generators.
        use_cache: see generate_ids.

    Returns:
        For each prompt its texts, as ids, and images, as vectors, in order.

    Raises:
        ValueError: no prompts, one that leaves too few positions in the context, guidance, or a
            model without a regression head.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    if sampling.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale {sampling.guidance_scale}: text and vectors are generated without "
            "guidance; the pixel decoder has it"
        )
    if model.regressor is None:
        raise ValueError("the model has no regression head: it generates no vectors")
    v, images = processor.vocabulary, max_images + starts_with_image
    longest = max(1, images * (num_vectors + 2) + (max_images + 1) * max_new_tokens)
    state = model.start_decoding(prompts, processor.pad, longest, use_cache)
    generators = sequence_generators(generator, len(prompts))
    first = Mode.IMAGE if starts_with_image else Mode.TEXT
    sequences = [_Sequence(first, max_new_tokens, max_images, num_vectors) for _ in prompts]
    hidden = state.prefill()
    constraint = GenerationConstraint("mixed")
    (options,) = constraint.candidates(processor, state.num_logits, hidden.device)
    begins = options.ids == v.begin
    pad, end = state.embed_ids(torch.tensor([processor.pad, v.end], device=hidden.device))
    while any(one.mode is not Mode.DONE for one in sequences):
        inputs = pad.expand(len(prompts), -1).clone()  # what finished sequences get
        at = {m: [i for i, one in enumerate(sequences) if one.mode is m] for m in Mode}
        if texts := at[Mode.TEXT]:
            logits = state.logits(hidden[texts], options.ids).float()
            may_not = torch.tensor([sequences[i].images_left == 0 for i in texts])
            forbidden = may_not.to(begins.device)[:, None] & begins
            logits = logits.masked_fill(forbidden, -torch.inf)
            ids = options.ids[sampling.draw(logits, [generators[i] for i in texts])]
            inputs[texts] = state.embed_ids(ids)
            for i, token in zip(texts, ids.tolist(), strict=True):
                sequences[i].add_id(token, v.begin, processor.stop)
        if at[Mode.IMAGE]:
            vectors = model.regressor(hidden[at[Mode.IMAGE]])
            inputs[at[Mode.IMAGE]] = vectors.to(inputs.dtype)
            for i, vector in zip(at[Mode.IMAGE], vectors, strict=True):
                sequences[i].add_vector(vector)
        for i in at[Mode.CLOSE]:
            inputs[i] = end
            sequences[i].close_image()
        if any(one.mode is not Mode.DONE for one in sequences):
            hidden = state.append_embeddings(inputs)
    return [one.output for one in sequences]

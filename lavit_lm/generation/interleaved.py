"""One loop that says words and vectors in turn: for models that say vectors for pictures; ids alone: generation.py.

    a row     TEXT --begin said--> PAINT, n times --> CLOSE --> TEXT ...     --end of text said--> over
    is fed    the id drawn         the vector said    end
    by        the LM's head        the regressor      nobody: it is forced

A picture is exactly n vectors long (Emu, VL-GPT: 32); no stop has to be said. Rows of a batch are each in a state of
their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lavit_lm.generation.sampling import GenerationConstraint, Generators, Sampling, per_row
from lavit_lm.sequences.segments import TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor

GREEDY = Sampling(temperature=0.0)
Said = list[int] | Tensor
"""Ids of a stretch of words, or float [n d] of a picture."""


class State(Enum):
    """What a row does next."""

    TEXT = "says a word"
    PAINT = "says a vector"
    CLOSE = "is fed the id that closes a picture"
    OVER = "nothing"


@dataclass
class SequenceState:
    """One row: its state, what it has said, and how much it may still say.

    Args:
        state: TEXT, or PAINT for a row whose prompt has opened a picture.
        words: ids of each stretch of text at most.
        images: pictures that it may open.
        n: vectors a picture.
    """

    state: State
    words: int
    images: int
    n: int
    said: list[Said] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    left: int = 0

    def __post_init__(self) -> None:
        self.left = self.words
        if self.state is State.TEXT and self.words == 0:
            self.state = State.OVER

    def word(self, drawn: int, begin: int, stop: int) -> None:
        """A word was drawn."""
        if drawn == stop:
            self.state = State.OVER
        elif drawn == begin:
            self.state, self.images = State.PAINT, self.images - 1
        else:
            if not self.said or isinstance(self.said[-1], Tensor):
                self.said.append([])
            self.said[-1].append(drawn)  # type: ignore[union-attr]
            self.left -= 1
            if self.left == 0:
                self.state = State.OVER

    def vector(self, said: Float[Tensor, " d"]) -> None:
        """A vector was said."""
        self.vectors.append(said)
        if len(self.vectors) == self.n:
            self.said.append(torch.stack(self.vectors))
            self.vectors, self.state = [], State.CLOSE if self.words else State.OVER

    def close(self) -> None:
        """The picture was closed: words again."""
        self.state, self.left = State.TEXT, self.words


@torch.no_grad()
def emit(
    model: Any,
    processor: MultimodalProcessor,
    prompts: Sequence[TokenSequence],
    n: int,
    opened: bool = False,
    max_words: int = 0,
    max_images: int = 0,
    sampling: Sampling = GREEDY,
    generator: Generators = None,
    cached: bool = True,
) -> list[list[Said]]:
    """Continue each prompt with words and pictures.

    Args:
        model: a SequenceModel with a regressor.
        n: vectors a picture.
        opened: the prompts end with the id that opens a picture, which is painted first.
        max_words: ids of each stretch of text; 0 for one picture and no word.
        max_images: pictures that may be opened beside that.
        sampling: of words; there is no guidance here, the pixel decoder has it.
        generator: one for all rows, which then get seeds of their own, or one for each.
        cached: see Decoding.

    Returns: for each prompt its stretches of ids and pictures, in the order said.

    Raises:
        ValueError: no prompts, one without room, guidance, or a model that says no vectors.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    if sampling.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale {sampling.guidance_scale}: words and vectors in turn are said without guidance"
        )
    if model.regressor is None:
        raise ValueError("the model has no regression head: it says no vectors")
    v, images = processor.vocabulary, max_images + opened
    most = max(1, images * (n + 2) + (max_images + 1) * max_words)
    state = model.decoding(prompts, processor.pad, most, cached)
    generators = per_row(generator, len(prompts))
    first = State.PAINT if opened else State.TEXT
    speakers = [SequenceState(first, max_words, max_images, n) for _ in prompts]
    hidden = state.prefill()
    words: Tensor | None = None
    edges = torch.tensor([processor.pad, v.end], device=hidden.device)
    while any(speaker.state is not State.OVER for speaker in speakers):
        pad, end = state.embed_ids(edges)
        is_embedding = pad.expand(len(prompts), -1).clone()
        if texts := _in(speakers, State.TEXT):
            logits = model.head(hidden[texts]).float()
            if words is None:  # the same at every step
                words = GenerationConstraint("text").words(
                    processor, logits.shape[1], logits.device
                )
            may = _allowed(processor, [speakers[i].images > 0 for i in texts], words)
            drawn = sampling.draw(
                logits.masked_fill(~may, -torch.inf), [generators[i] for i in texts]
            )
            is_embedding[texts] = state.embed_ids(drawn)
            for i, word in zip(texts, drawn.tolist(), strict=True):
                speakers[i].word(word, v.begin, processor.stop)
        closing = _in(speakers, State.CLOSE, fed_now=texts)
        painting = _in(speakers, State.PAINT, fed_now=texts)
        if painting:
            vectors = model.regressor(hidden[painting])
            is_embedding[painting] = vectors.to(is_embedding.dtype)
            for i, vector in zip(painting, vectors, strict=True):
                speakers[i].vector(vector)
        for i in closing:
            is_embedding[i] = end
            speakers[i].close()
        if any(speaker.state is not State.OVER for speaker in speakers):
            hidden = state.append_embeddings(is_embedding)
    return [speaker.said for speaker in speakers]


def _in(speakers: Sequence[SequenceState], state: State, fed_now: Sequence[int] = ()) -> list[int]:
    """Rows in this state that have not been fed in this step."""
    return [i for i, speaker in enumerate(speakers) if speaker.state is state and i not in fed_now]


def _allowed(
    processor: MultimodalProcessor, may_open: Sequence[bool], words: Bool[Tensor, " v"]
) -> Bool[Tensor, "t v"]:
    """True at words and the end of text, and at the opening of a picture in the rows that may open one."""
    may = words.expand(len(may_open), -1).clone()
    may[:, processor.stop] = True
    may[:, processor.vocabulary.begin] = torch.tensor(may_open, device=words.device)
    return may

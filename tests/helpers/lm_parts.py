"""Small processors, models and sequences for the tests of lavit_lm."""

from __future__ import annotations

import torch

from helpers.small_lms import small_lm, small_tokenizer
from lavit_lm.models.losses import LossSum
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.base import Objective
from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_lm.sequences.token_sequence import Role, SequenceBuilder, TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary

CODES = 16


def processor_and_model(
    family: str = "llama",
    kernel: str = "sdpa",
    tied: bool = False,
    seed: int = 0,
    stages: int = 0,
) -> tuple[MultimodalProcessor, SequenceModel]:
    tokenizer = small_tokenizer(family)
    lm = small_lm(family, len(tokenizer), tied, seed)
    VisualVocabulary.extend(tokenizer, lm, CODES, torch.Generator().manual_seed(seed), stages)
    lm.set_attn_implementation(kernel)
    return MultimodalProcessor.from_tokenizer(tokenizer), SequenceModel(lm).eval()


def image(seed: int, length: int | None = None, **more: object) -> ImageSegment:
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 9, (), generator=generator)) if length is None else length
    return ImageSegment(torch.randint(CODES, (length,), generator=generator), **more)  # type: ignore[arg-type]


def pairs(count: int) -> list[list[Segment]]:
    words = [
        "a red apple",
        "two dogs run along the beach",
        "an apple and a table in the old town",
        "rain",
    ]
    return [[image(i), TextSegment(words[i % len(words)])] for i in range(count)]


def losses(model: SequenceModel, objective: Objective, batch: PackedBatch) -> dict[str, LossSum]:
    """An objective's losses of a batch."""
    return objective.losses(model(batch), batch)


def plain_sequence(ids: list[int], prefix: int = 0, key: str = "") -> TokenSequence:
    """Text ids, all but the first predicted; the first `prefix` of them form a prefix."""
    builder = SequenceBuilder()
    for i, one in enumerate(ids):
        builder.add([one], Role.TEXT, predict=True, prefix=i < prefix)
    return builder.build(key)

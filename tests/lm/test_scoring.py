"""Answers to one prompt are scored as whole sequences are, and the prompt is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.lm_parts import image, processor_and_model

from lavit_lm.models.losses import log_likelihood
from lavit_lm.models.scoring import log_likelihoods, shared_length
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.davinci import DaVinci
from lavit_lm.objectives.emu import Emu
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.packing import pad
from lavit_lm.sequences.segments import ImageSegment, TextSegment
from lavit_tok import VisualTokenizer

ANSWERS = [TextSegment(text) for text in ("a red apple", "rain", "", "a red table and rain")]


@pytest.mark.parametrize("family", ["llama", "phi", "gemma"])
@pytest.mark.parametrize("objective", [LaVIT(), DaVinci(), Emu(queries=3, depth=1, heads=2)])
def test_the_prompt_is_computed_once(
    family: str, objective: Any, tiny_tokenizer: VisualTokenizer, monkeypatch: Any
) -> None:
    processor, plain = processor_and_model(family, tied=family == "gemma")
    width = plain.causal.config.get_text_config().hidden_size
    bridge, regressor = objective.connectors.build(tiny_tokenizer, width)
    model = SequenceModel(plain.lm, bridge, regressor).eval()
    patches = tiny_tokenizer.config.num_patches
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    keep = None if objective.name == "lavit" else torch.ones(patches, dtype=torch.bool)
    shown = [
        ImageSegment(torch.arange(patches) % 16, one if keep is not None else None, keep)
        for one in pixels
    ]
    for context in ([*shown, TextSegment("a table")], [shown[0]], [TextSegment("two dogs")], []):
        sequences = [objective.scoring_sequence(context, a, processor) for a in ANSWERS]
        batch = pad(sequences, processor.pad)
        seen: list[int] = []
        hook = model.causal.base_model.register_forward_pre_hook(
            lambda _, __, given, seen=seen: seen.append(given["inputs_embeds"].shape[:2].numel()),
            with_kwargs=True,
        )
        found = log_likelihoods(model, sequences, processor.pad)
        hook.remove()
        shared = int(batch.predict.int().argmax(1).min())
        assert seen == [shared, len(ANSWERS) * (batch.ids.shape[1] - shared)]
        torch.testing.assert_close(found, log_likelihood(model(batch), batch), atol=1e-4, rtol=1e-4)
        alone = log_likelihoods(model, sequences[:1], processor.pad)
        torch.testing.assert_close(found[:1], alone, atol=1e-4, rtol=1e-4)


def test_sequences_that_begin_differently_are_scored_as_a_whole() -> None:
    processor, model = processor_and_model()
    contexts = [[image(i), TextSegment("a table")] for i in range(2)]
    sequences = [LaVIT().scoring_sequence(c, ANSWERS[0], processor) for c in contexts]
    batch = pad(sequences, processor.pad)
    assert shared_length(batch, sequences) == 0
    found = log_likelihoods(model, sequences, processor.pad)
    torch.testing.assert_close(found, log_likelihood(model(batch), batch))

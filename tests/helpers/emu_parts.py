"""A small Emu for the tests of its objective and of its image decoder."""

from __future__ import annotations

import torch

from helpers.lm_parts import processor_and_model
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.emu import Emu
from lavit_lm.sequences.segments import ImageSegment
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualTokenizer

N = 3
EMU = Emu("given", queries=N, depth=2, heads=2)


def image(seed: int) -> ImageSegment:
    """Noise around a color, so that features of different seeds differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.randint(256, (3, 1, 1), generator=generator)
    noise = torch.randint(-60, 60, (3, 32, 32), generator=generator)
    return ImageSegment(image=(ground + noise).clamp(0, 255).to(torch.uint8))


def built(
    visual: VisualTokenizer, family: str = "llama", objective: Emu = EMU
) -> tuple[MultimodalProcessor, SequenceModel]:
    processor, plain = processor_and_model(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = SequenceModel(
            plain.lm,
            *objective.connectors.build(visual, plain.lm.config.get_text_config().hidden_size),
        )
    return processor, model.eval()

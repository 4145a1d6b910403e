"""lavit_lm: language models of text and images. Names are imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lavit_lm.auto.registration import register

if TYPE_CHECKING:
    from lavit_lm.auto.configuration_lavit import LavitConfig
    from lavit_lm.auto.modeling_lavit import LavitForConditionalGeneration
    from lavit_lm.auto.processing_lavit import LavitProcessor
    from lavit_lm.models.losses import LossSum, ModelOutput, cross_entropy, regression
    from lavit_lm.multimodal import MultimodalLM
    from lavit_lm.objectives.base import Objective
    from lavit_lm.objectives.records import Connectors, ImageOutput, PromptTemplates
    from lavit_lm.sequences.packing import PackedBatch
    from lavit_lm.sequences.segments import ImageSegment, SegmentLength, TextSegment
    from lavit_lm.sequences.token_sequence import Flags, Role, SequenceBuilder, TokenSequence
    from lavit_lm.vocabulary.processor import MultimodalProcessor
    from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary, VocabularyError

_MODULES = {
    "MultimodalLM": "multimodal",
    "LavitConfig": "auto.configuration_lavit",
    "LavitProcessor": "auto.processing_lavit",
    "LavitForConditionalGeneration": "auto.modeling_lavit",
    "VisualVocabulary": "vocabulary.visual_vocabulary",
    "VocabularyError": "vocabulary.visual_vocabulary",
    "MultimodalProcessor": "vocabulary.processor",
    # what a new objective needs: docs/objectives.md
    "Objective": "objectives.base",
    "PromptTemplates": "objectives.records",
    "Connectors": "objectives.records",
    "ImageOutput": "objectives.records",
    "TextSegment": "sequences.segments",
    "ImageSegment": "sequences.segments",
    "SegmentLength": "sequences.segments",
    "Role": "sequences.token_sequence",
    "Flags": "sequences.token_sequence",
    "SequenceBuilder": "sequences.token_sequence",
    "TokenSequence": "sequences.token_sequence",
    "PackedBatch": "sequences.packing",
    "ModelOutput": "models.losses",
    "LossSum": "models.losses",
    "cross_entropy": "models.losses",
    "regression": "models.losses",
}
__all__ = [
    "Connectors",
    "Flags",
    "ImageOutput",
    "ImageSegment",
    "LavitConfig",
    "LavitForConditionalGeneration",
    "LavitProcessor",
    "LossSum",
    "ModelOutput",
    "MultimodalLM",
    "MultimodalProcessor",
    "Objective",
    "PackedBatch",
    "PromptTemplates",
    "Role",
    "SegmentLength",
    "SequenceBuilder",
    "TextSegment",
    "TokenSequence",
    "VisualVocabulary",
    "VocabularyError",
    "cross_entropy",
    "regression",
]


def __getattr__(name: str) -> Any:
    """Import lazily: `lavit-lm --help` needs no torch, generation no Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lavit_lm' has no attribute {name!r}")
    value = getattr(import_module(f"lavit_lm.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


register()

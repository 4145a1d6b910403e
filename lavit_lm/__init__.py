"""lavit_lm: language models over token sequences of text and images. Public names, in the order of the data path."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavit_lm.multimodal import MultimodalLM
    from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary, VocabularyError

__all__ = [
    "MultimodalLM",
    "VisualVocabulary",
    "VocabularyError",
]

_MODULES = {
    "MultimodalLM": "multimodal",
    "VisualVocabulary": "vocabulary.visual_vocabulary",
    "VocabularyError": "vocabulary.visual_vocabulary",
}


def __getattr__(name: str) -> Any:
    """A name is imported when first asked for: `lavit-lm --help` pays for no torch, generation for no Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lavit_lm' has no attribute {name!r}")
    value = getattr(import_module(f"lavit_lm.{_MODULES[name]}"), name)
    globals()[name] = value
    return value

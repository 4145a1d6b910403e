"""Training objectives of a language model over text and images, one folder per paper.

vector_codes.py is that of an image decoder.
"""

from __future__ import annotations

from importlib import import_module

from lavit_lm.objectives.base import Objective

_CLASSES = {
    "lavit": "lavit:LaVIT",
    "emu": "emu:Emu",
    "vlgpt": "vlgpt:VLGPT",
    "davinci": "davinci:DaVinci",
    "vector_codes": "vector_codes:VectorCodes",
}


def by_name(name: str) -> type[Objective]:
    """The objective that a saved model names: one of these, never a class path from a file.

    Raises:
        KeyError: another name.
    """
    module, _, class_name = _CLASSES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), class_name)

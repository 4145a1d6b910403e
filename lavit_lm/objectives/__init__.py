"""What a language model of text and pictures is trained to do, one page each; see objective.py for what they share."""

from __future__ import annotations

from importlib import import_module

from lavit_lm.objectives.base import Objective

_PAGES = {
    "lavit": "lavit:LaVIT",
    "emu": "emu:Emu",
    "vlgpt": "vlgpt:VLGPT",
    "davinci": "davinci:DaVinci",
}


def by_name(name: str) -> type[Objective]:
    """The objective that a model's directory names: one of these four, never a class of a file's choosing.

    Raises:
        KeyError: another name.
    """
    module, _, found = _PAGES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), found)

"""Trainers from flat arguments: tests change single fields of the config records."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any


def trainer_of(kind: Any, **arguments: Any) -> Any:
    """An instance of a trainer class; the fields of its config records may be given by name.

    Where two records have a field of one name, the last record of the signature takes it.
    """
    parameters = inspect.signature(kind).parameters
    for name, parameter in reversed(parameters.items()):
        if dataclasses.is_dataclass(parameter.default) and name not in arguments:
            default: Any = parameter.default
            names = {field.name for field in dataclasses.fields(default)} - parameters.keys()
            values = {key: arguments.pop(key) for key in names & arguments.keys()}
            arguments[name] = dataclasses.replace(default, **values)
    return kind(**arguments)

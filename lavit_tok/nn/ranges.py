"""Numbers that are finite and in a range."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any


def is_number(value: Any) -> bool:
    """Whether this is a finite int or float (a bool is neither)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_number(
    name: str, value: Any, low: float | int, high: float | int, integer: bool = False
) -> None:
    """Raise ValueError unless this is a finite number in low..high, and integral if demanded."""
    kind = "an integer" if integer else "a number"
    is_kind = type(value) is int if integer else is_number(value)
    if not is_kind or not low <= value <= high:
        raise ValueError(f"{name}: expected {kind} in {low:g}..{high:g}, got {value!r:.60}")


def require_integers(init: Callable[..., None], config: Mapping[str, Any], low: int) -> None:
    """Raise ValueError unless all entries whose default is an integer are integers from low on.

    Args:
        init: a constructor, from which the defaults are.
        config: its arguments by name, as a file may give them: a bool would count as 1.
        low: the smallest value.
    """
    for name, parameter in inspect.signature(init).parameters.items():
        if type(parameter.default) is int:
            require_number(name, config[name], low, 2**31, integer=True)

"""Numbers that are finite and in a range."""

from __future__ import annotations

import math
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

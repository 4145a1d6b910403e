"""KeepFloat32: the parts of a model whose answers are decisions, not numbers.

A keep mask and a code are the outcome of a comparison: rounded to bfloat16, nearly equal scores swap places and the
same picture gets other codes. Such modules stay in float32 when the model around them is moved to another dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepFloat32(nn.Module):
    """A module that follows a move to another device, but not to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(
            lambda t: fn(t).to(t.dtype) if t.is_meta else t.to(fn(t).device), recurse
        )

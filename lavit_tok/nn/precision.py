"""KeepFloat32: modules that stay in float32 because their output is a decision.

A keep mask and a code result from a comparison: rounded to bfloat16, nearly equal scores change
order and the same image gets other codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepFloat32(nn.Module):
    """A module that `to()` moves to another device, but not to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(t: Tensor) -> Tensor:
            # On the meta device fn may materialize the tensor (to_empty), so its result is used.
            return fn(t).to(t.dtype) if t.is_meta else t.to(fn(t).device)

        return super()._apply(keep_dtype, recurse)

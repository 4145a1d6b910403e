"""Precision that does not depend on the caller.

A keep mask and a code result from a comparison: rounded to bfloat16, nearly equal scores change
order and the same image gets other codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Method = TypeVar("Method", bound=Callable[..., Any])


class KeepFloat32(nn.Module):
    """A module that `to()` moves to another device, but not to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(t: Tensor) -> Tensor:
            # On the meta device fn may materialize the tensor (to_empty), so its result is used.
            return fn(t).to(t.dtype) if t.is_meta else t.to(fn(t).device)

        return super()._apply(keep_dtype, recurse)


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity, in half the time of isfinite().all()."""
    return bool((x * 0).sum() == 0)


@contextmanager
def float32_default() -> Iterator[None]:
    """Build modules in float32, whatever torch.set_default_dtype was called with."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def without_autocast(method: Method) -> Method:
    """Decorate a method of an object with a `device`: it computes in the dtype of its weights.

    Under autocast to bfloat16 about one image in eight would get other codes.
    """

    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]

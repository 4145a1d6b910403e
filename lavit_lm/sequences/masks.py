"""Attention masks of packed sequences, built in this file only.

    documents 0 0 0 0 1 1, prefix P P . . P .      x: the line's position attends to the column's

            P P . . P .
      0 P   x x . . . .      a prefix position attends to the whole prefix of its document,
      0 P   x x . . . .      any position to itself and to those before it in its document,
      0 .   x x x . . .      and none to another document
      0 .   x x x x . .
      1 P   . . . . x .
      1 .   . . . . x x

Without prefixes this is the causal mask of each document.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def attention_mask(
    documents: Int64[Tensor, "b l"], prefix: Bool[Tensor, "b l"] | None = None
) -> Bool[Tensor, "b l l"]:
    """True where the position of the line attends to that of the column."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    mask = causal.expand(len(documents), -1, -1)
    if prefix is not None:
        mask = mask | (prefix[:, :, None] & prefix[:, None, :])
    return mask & (documents[:, :, None] == documents[:, None, :])


def model_mask(
    model: Any, documents: Int64[Tensor, "b l"], prefix: Bool[Tensor, "b l"], dtype: torch.dtype
) -> Bool[Tensor, "b 1 l l"] | Float[Tensor, "b 1 l l"] | None:
    """The mask in the form that a `transformers` model expects.

    Returns: booleans for sdpa; 0 and the least number of `dtype` for eager, which would add
    booleans to the scores and
        so silently mask nothing; None for flash attention, which infers documents from restarted
        positions.

    Raises:
        ValueError: a kernel that does not support the mask, or a sliding window shorter than the
            block, which an explicit mask would switch off.
    """
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    window = getattr(config, "sliding_window", None)
    window = window if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < documents.shape[1]:
        raise ValueError(
            f"blocks of {documents.shape[1]} tokens exceed the model's sliding window of "
            f"{window}, which a mask for "
            "packed sequences would switch off; use blocks no longer than the window"
        )
    kernel = config._attn_implementation
    if "flash" in kernel:
        if bool(prefix.any()):
            raise ValueError(
                f"attention kernel {kernel!r} is causal only: a prefix mask needs 'sdpa' or 'eager'"
            )
        return None
    if kernel not in ("sdpa", "eager"):
        raise ValueError(
            f"attention kernel: expected 'sdpa', 'eager' or a flash kernel, got {kernel!r}"
        )
    mask = attention_mask(documents, prefix if bool(prefix.any()) else None)[:, None]
    if kernel == "sdpa":
        return mask
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)

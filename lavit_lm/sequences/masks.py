"""Who sees whom: the one place where attention masks are built.

    documents 0 0 0 0 1 1, prefix P P . . P .        x: row sees column

            P P . . P .
      0 P   x x . . . .      a prefix place sees the whole prefix of its document, also what comes after it,
      0 P   x x . . . .      any place sees what stands before it in its document, and itself,
      0 .   x x x . . .      and nobody sees another document
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


def visible(
    documents: Int64[Tensor, "b l"], prefix: Bool[Tensor, "b l"] | None = None
) -> Bool[Tensor, "b l l"]:
    """True where the row's place may see the column's."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    seen = causal.expand(len(documents), -1, -1)
    if prefix is not None:
        seen = seen | (prefix[:, :, None] & prefix[:, None, :])
    return seen & (documents[:, :, None] == documents[:, None, :])


def model_mask(
    model: Any, documents: Int64[Tensor, "b l"], prefix: Bool[Tensor, "b l"], dtype: torch.dtype
) -> Bool[Tensor, "b 1 l l"] | Float[Tensor, "b 1 l l"] | None:
    """The mask as a `transformers` model takes it.

    sdpa takes booleans; eager would add a boolean mask to the scores, silently hiding nothing, so it gets 0 and the
    least number; flash attention takes none and reads the documents off the positions, which start anew with each.

    Raises:
        ValueError: a kernel that cannot hold the mask, or a sliding window shorter than the block, which a mask handed
            over whole would switch off.
    """
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    window = (
        getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True)
        else None
    )
    if window is not None and window < documents.shape[1]:
        raise ValueError(
            f"blocks of {documents.shape[1]} places exceed the model's sliding window of {window}: a mask for packed "
            "rows would switch the window off; use blocks no longer than it"
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
    seen = visible(documents, prefix if bool(prefix.any()) else None)[:, None]
    if kernel == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )

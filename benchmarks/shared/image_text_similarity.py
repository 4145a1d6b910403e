"""How near images and captions are, in the space of recipes/default/scorer.py."""

from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.shared.provenance import recipe

TIE = 1e-9  # products of equal vectors may differ by rounding


def load_scorer(directory: Path, device: str = "cpu") -> Any:
    """With describe(uint8 [n 3 h w]) and embed(captions) -> unit vectors [n d].

    Raises:
        ValueError: a folder of something else.
    """
    return recipe("default/scorer.py").load_scorer(directory, device)


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """How many other candidates are at least as near to query i as candidate i: int64 [n].

    A tie counts against it: an answer that fits everything identifies nothing.
    """
    near = queries.double() @ candidates.double().T
    return (near >= near.diagonal()[:, None] - TIE).sum(1) - 1


def top(found: Tensor) -> dict[str, float]:
    """{"top1", "top5"}: ratios of ranks below 1 and below 5; empty without ranks."""
    return {f"top{k}": float((found < k).double().mean()) for k in (1, 5)} if len(found) else {}

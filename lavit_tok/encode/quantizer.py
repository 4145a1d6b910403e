"""Merged features <-> codes.

    [total d] -> Linear, Tanh, Linear, L2 norm -> [total c] -> nearest entry -> int64 [total]

A code is the exact nearest codebook entry by squared distance, computed in float32: under bfloat16
about 3 % of the codes would change. How the codebook is trained: training/codebook.py.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.nn.precision import KeepFloat32

CHUNK = 1 << 22  # entries of the distance matrix computed at a time (16 MiB in float32)


@torch.no_grad()
def nearest(
    z: Float[Tensor, "total dim"], entries: Float[Tensor, "size dim"]
) -> Int64[Tensor, " total"]:
    """argmin_k |z - e_k|^2, the first among equally near entries.

    Raises:
        ValueError: NaN or infinity in z.
    """
    with torch.autocast(z.device.type, enabled=False):
        # Under set_float32_matmul_precision("high") or "medium" products have 10 bits or fewer,
        # which would change codes.
        full = torch.get_float32_matmul_precision() == "highest"
        exact = torch.float32 if full else torch.float64
        z, entries = z.float().to(exact), entries.to(exact)
        if not bool(z.isfinite().all()):
            raise ValueError(
                "features to quantize contain NaN or infinity: any code would be arbitrary"
            )
        # |z - e|^2 / 2 without |z|^2 / 2, which is the same for all entries.
        half_norms = entries.square().sum(1) / 2
        parts = z.split(max(1, CHUNK // len(entries)))
        chunks = [(half_norms - part @ entries.T).argmin(1) for part in parts]
        return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64).to(z.device)


def fingerprint(embeddings: Float[Tensor, "*entries dim"]) -> str:
    """16 hexadecimal digits that identify a codebook.

    Computed from float16 values, so that a copy saved in half precision has the same one.
    """
    entries = embeddings.detach().to("cpu", torch.float16)
    return hashlib.sha256(entries.numpy().tobytes()).hexdigest()[:16]


class Codebook(KeepFloat32):
    """K entries of dimension c, stored and searched in float32 whatever the model's dtype."""

    embeddings: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer(
            "embeddings", F.normalize(torch.randn(size, dim, dtype=torch.float32), dim=-1)
        )

    def nearest(self, z: Float[Tensor, "total dim"]) -> Int64[Tensor, " total"]:
        """See the function `nearest`."""
        return nearest(z, self.embeddings)

    def lookup(self, codes: Int64[Tensor, " total"]) -> Float[Tensor, "total dim"]:
        """The codebook entries of the codes."""
        return self.embeddings[codes]


class Quantizer(nn.Module):
    """The projection to the code space and the codebook.

    Args:
        width: d, dimension of the merged features.
        size: K, number of codes.
        dim: c, dimension of the codebook entries.
    """

    def __init__(self, width: int, size: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim))
        self.codebook = Codebook(size, dim)

    def project(self, merged: Float[Tensor, "*items width"]) -> Float[Tensor, "*items dim"]:
        """Merged features -> unit-norm queries of the codebook, in float32."""
        return F.normalize(self.projection(merged).float(), dim=-1)

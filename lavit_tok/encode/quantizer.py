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

from lavit_tok.nn.precision import KeepFloat32, all_finite

CHUNK = 1 << 22  # entries of the distance matrix computed at a time (16 MiB in float32)
NUMPY_THREADS = 8  # below so many threads of torch, argmin is faster by NumPy on one


@torch.no_grad()
def nearest(
    z: Float[Tensor, "total dim"], entries: Float[Tensor, "size dim"]
) -> Int64[Tensor, " total"]:
    """argmin_k |z - e_k|^2, the first among equally near entries.

    Raises:
        ValueError: NaN or infinity in z.
    """
    require_finite(z)
    with torch.autocast(z.device.type, enabled=False):
        return nearest_to_finite(z, entries)


def nearest_to_finite(
    z: Float[Tensor, "total dim"],
    entries: Float[Tensor, "size dim"],
    norms: Float[Tensor, " size"] | None = None,
) -> Int64[Tensor, " total"]:
    """nearest, of a z that is known to be finite, without gradient and autocast.

    Args:
        z: vectors.
        entries: of the codebook.
        norms: half_norms of the entries, if they are float32 and known.
    """
    # Under set_float32_matmul_precision("high") or "medium" products have 10 bits or fewer,
    # which would change codes.
    full = torch.get_float32_matmul_precision() == "highest"
    exact = torch.float32 if full else torch.float64
    z, entries = z.to(exact), entries.to(exact)
    if norms is None or norms.dtype != exact:
        norms = half_norms(entries)
    most = max(1, CHUNK // len(entries))
    if len(z) <= most:
        return _nearest(z, entries, norms)
    return torch.cat([_nearest(part, entries, norms) for part in z.split(most)])


def half_norms(entries: Float[Tensor, "*entries dim"]) -> Float[Tensor, "*entries"]:
    """|e|^2 / 2 of every entry."""
    return entries.square().sum(-1) / 2


def require_finite(z: Tensor) -> None:
    """Raise ValueError if z holds NaN or infinity."""
    if not all_finite(z):
        raise ValueError(
            "features to quantize contain NaN or infinity: any code would be arbitrary"
        )


def _nearest(
    z: Float[Tensor, "total dim"], entries: Float[Tensor, "size dim"], norms: Float[Tensor, " size"]
) -> Int64[Tensor, " total"]:
    """Index of the first nearest entry: |z - e|^2 / 2 less |z|^2 / 2, the same for all entries."""
    products = z @ entries.T
    distances = torch.sub(norms, products, out=products)
    if distances.device.type == "cpu" and torch.get_num_threads() < NUMPY_THREADS:
        return torch.from_numpy(distances.numpy().argmin(1))
    return distances.argmin(1)


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

"""Room 5: merged features <-> codes.

    [total d] -> Linear, Tanh, Linear, L2 norm -> [total c] -> nearest codebook row -> int64 [total] -> row [total c]

Codes are always the exact nearest row by squared distance, computed in float32: under bf16 some 3 % of the codes would
change. In training the rows move by exponential moving averages, through `vector-quantize-pytorch`; `TrainingCodebook`
is the only place that knows that package.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.nn.precision import KeepFloat32

CHUNK = 1 << 26  # entries of the distance matrix computed at a time (256 MiB in float32)


class Codebook(KeepFloat32):
    """K rows of width c, held and searched in float32 whatever the dtype of the rest of the model."""

    embeddings: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", F.normalize(torch.randn(size, dim), dim=-1))

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "total dim"]) -> Int64[Tensor, " total"]:
        """argmin_k |z - row_k|^2; of equally near rows the first."""
        with torch.autocast(z.device.type, enabled=False):
            # Under set_float32_matmul_precision("high") products are rounded to 10 bits or fewer, which changes codes.
            exact = (
                torch.float32
                if torch.get_float32_matmul_precision() == "highest"
                else torch.float64
            )
            z, rows = z.float().to(exact), self.embeddings.to(exact)
            if not bool(z.isfinite().all()):
                raise ValueError(
                    "features to quantize hold NaN or infinity: any code would be arbitrary"
                )
            half_norms = rows.square().sum(1) / 2
            step = max(1, CHUNK // len(rows))
            chunks = [(half_norms - part @ rows.T).argmin(1) for part in z.split(step)]
            return (
                torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64, device=z.device)
            )

    def lookup(self, codes: Int64[Tensor, " total"]) -> Float[Tensor, "total dim"]:
        return self.embeddings[codes]


class Quantizer(nn.Module):
    """The projection to code space and the codebook."""

    def __init__(self, width: int, size: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim))
        self.codebook = Codebook(size, dim)

    def project(self, merged: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows dim"]:
        """Merged features -> unit-norm queries of the codebook, float32."""
        return F.normalize(self.projection(merged).float(), dim=-1)

"""How the codebook learns: k-means at the start, then exponential moving averages; and how much of it is used.

`TrainingCodebook` is the only place that knows the package `vector-quantize-pytorch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.encode.quantizer import CHUNK, Codebook


@dataclass(frozen=True)
class Usage:
    """How a set of codes uses the codebook."""

    used: float
    """Share of the K rows that occur, 0..1."""
    perplexity: float
    """exp(entropy) of the code frequencies, 1..K."""
    entropy_bits: float
    """Unigram entropy in bits a code."""


def usage(codes: Int64[Tensor, " total"], size: int) -> Usage:
    """Usage of a codebook of `size` rows by these codes; all zeros for no codes. Raises ValueError for other codes."""
    counts = torch.bincount(codes.flatten(), minlength=size).double()
    if len(counts) > size:
        raise ValueError(
            f"expected codes in 0..{size - 1}, got {len(counts) - 1}: shares would be wrong"
        )
    share = counts / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-30).log()).sum()
    used = float((counts > 0).double().mean())
    return Usage(
        used,
        float(entropy.exp()) if len(codes) else 0.0,
        float(entropy / torch.log(torch.tensor(2.0))),
    )


class TrainingCodebook(nn.Module):
    """A codebook that learns: EMA k-means of vector-quantize-pytorch on unit-norm rows (van den Oord 2017, appendix A).

    Build it after the process group exists (Lightning: configure_model), since the package decides then whether to
    synchronise its statistics.

    Args:
        codebook: where the rows come from and are written back to.
        decay: EMA decay of counts and sums.
        dead_ratio: a row is replaced by a random input when its moving count falls below this share of the mean
            count n / K of a step; 0 never replaces. An absolute threshold would replace all rows of a small batch.
        gradient: how the decoder's gradient passes the rounding: straight-through or the rotation trick (2024).
    """

    def __init__(
        self,
        codebook: Codebook,
        decay: float = 0.99,
        dead_ratio: float = 0.05,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
    ) -> None:
        super().__init__()
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            need = (
                "training a codebook needs vector-quantize-pytorch: pip install 'lavit-tok[train]'"
            )
            raise ImportError(need) from error
        size, dim = codebook.embeddings.shape
        self.vq: Any = VectorQuantize(
            dim=dim,
            codebook_size=size,
            use_cosine_sim=True,
            decay=decay,
            kmeans_init=False,
            threshold_ema_dead_code=1e-9,  # above 0, else the package leaves replacement out; set by set_vectors_per_step
            rotation_trick=gradient == "rotation",
            commitment_weight=1.0,
        )
        self.dead_ratio = dead_ratio
        self.load_embeddings(codebook.embeddings)

    def set_vectors_per_step(self, rows_per_step: int | float) -> None:
        """Tell how many vectors a step brings, n: a row is dead when its moving count is below dead_ratio * n / K."""
        inner = self.vq._codebook
        inner.threshold_ema_dead_code = self.dead_ratio * rows_per_step / len(self.embeddings)
        # The count a replaced row starts from; the package fixes it at construction, where it would be next to 0 here,
        # and the row would count as dead again at the next step although inputs chose it.
        inner.reset_cluster_size = inner.threshold_ema_dead_code

    @torch.no_grad()
    def load_embeddings(
        self, rows: Float[Tensor, "size dim"], counts: Tensor | None = None
    ) -> None:
        """Set every buffer the package keeps; setting the rows alone would be undone by the first training step."""
        inner = self.vq._codebook
        counts = torch.ones(len(rows), device=rows.device) if counts is None else counts.float()
        inner.initted.fill_(True)
        inner.embed.copy_(rows[None])
        inner.cluster_size.copy_(counts[None])
        inner.embed_avg.copy_((rows * counts[:, None])[None])

    @property
    def embeddings(self) -> Float[Tensor, "size dim"]:
        return self.vq._codebook.embed[0]

    def forward(
        self, z: Float[Tensor, "total dim"], seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised rows (with gradient to z), codes, commitment loss. In train mode the rows move after the look-up.

        The package replaces dead rows by global chance; the seed makes that chance an argument.
        """
        devices = [z.device] if z.is_cuda else []
        with (
            torch.autocast(z.device.type, enabled=False),
            torch.random.fork_rng(devices, enabled=self.training),
        ):
            if self.training:
                torch.manual_seed(seed)
            quantized, codes, loss = self.vq(z.float()[None])
        return quantized[0], codes[0], loss.sum()


@torch.no_grad()
def spherical_kmeans(
    samples: Float[Tensor, "n dim"], size: int, iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "size dim"], Float[Tensor, " size"]]:
    """k-means by cosine over unit-norm samples of many batches; an empty cluster restarts at a random sample.

    vector-quantize-pytorch's own initialisation sees one batch only, and repeats rows when that has fewer than K.

    Returns: unit-norm rows and their counts. Raises ValueError for fewer samples than rows.
    """
    if len(samples) < size:
        raise ValueError(
            f"k-means of {size} codes needs at least {size} samples, got {len(samples)}"
        )
    pick = torch.randperm(len(samples), generator=generator)[:size].to(samples.device)
    rows = samples[pick].clone()
    counts = torch.zeros(size, device=samples.device)
    for _ in range(iterations):
        nearest = torch.cat(
            [(part @ rows.T).argmax(1) for part in samples.split(max(1, CHUNK // size))]
        )
        counts = torch.bincount(nearest, minlength=size).float()
        sums = torch.zeros_like(rows).index_add_(0, nearest, samples)
        empty = counts == 0
        if bool(empty.any()):
            restart = torch.randint(len(samples), (int(empty.sum()),), generator=generator).to(
                samples.device
            )
            sums[empty] = samples[restart]
        rows = F.normalize(sums, dim=-1)
    return rows, counts.clamp(min=1)

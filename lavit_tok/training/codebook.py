"""Training of the codebook: k-means, then exponential moving averages; and usage statistics.

`TrainingCodebook` is the only class that uses the package `vector-quantize-pytorch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.encode.quantizer import CHUNK, Codebook


@dataclass(frozen=True)
class Usage:
    """Usage of the codebook by a set of codes."""

    used: float
    """Ratio of the K codes that occur, 0..1."""
    perplexity: float
    """exp(entropy) of the code frequencies, 1..K."""
    entropy_bits: float
    """Unigram entropy in bits per code."""


def usage(codes: Int64[Tensor, " total"], size: int) -> Usage:
    """Usage of a codebook of `size` entries by these codes; all zeros for no codes.

    Raises:
        ValueError: codes outside 0..size-1.
    """
    counts = torch.bincount(codes.flatten(), minlength=size).double()
    if len(counts) > size:
        raise ValueError(f"expected codes in 0..{size - 1}, got {len(counts) - 1}")
    p = counts / counts.sum().clamp(min=1)
    entropy = float(-(p * p.clamp(min=1e-30).log()).sum())
    perplexity = math.exp(entropy) if len(codes) else 0.0
    return Usage(float((counts > 0).double().mean()), perplexity, entropy / math.log(2))


class TrainingCodebook(nn.Module):
    """A codebook trained by EMA k-means on unit-norm entries (van den Oord 2017, appendix A).

    Construct it after the process group exists (Lightning: configure_model): the package decides at
    construction whether to synchronize its statistics.

    Args:
        codebook: the initial entries.
        decay: EMA decay of counts and sums.
        dead_ratio: an entry is replaced by a random input when its moving count falls below this
            ratio of the mean count n / K of a step; 0 never replaces. An absolute threshold would
            replace all entries when batches are small.
        gradient: how the decoder's gradient passes quantization: straight-through or the rotation
            trick (2024).
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
            raise ImportError(
                "training a codebook needs vector-quantize-pytorch: pip install 'lavit-tok[train]'"
            ) from error
        size, dim = codebook.embeddings.shape
        self.vq: Any = VectorQuantize(
            dim=dim,
            codebook_size=size,
            use_cosine_sim=True,
            decay=decay,
            kmeans_init=False,
            # Above 0, or the package never replaces; set_vectors_per_step sets the value.
            threshold_ema_dead_code=1e-9,
            rotation_trick=gradient == "rotation",
            commitment_weight=1.0,
        )
        self.dead_ratio = dead_ratio
        self.load_embeddings(codebook.embeddings)

    def set_vectors_per_step(self, count: int | float) -> None:
        """Set n, the vectors per step: entries with a count below dead_ratio * n / K are dead."""
        inner = self.vq._codebook
        inner.threshold_ema_dead_code = self.dead_ratio * count / len(self.embeddings)
        # Initial count of a replaced entry. The package sets it at construction, where it would be
        # nearly 0 here, and the entry would be dead again at the next step although it was used.
        inner.reset_cluster_size = inner.threshold_ema_dead_code

    @torch.no_grad()
    def load_embeddings(
        self, entries: Float[Tensor, "size dim"], counts: Tensor | None = None
    ) -> None:
        """Set the entries and their counts, by default 1.

        All four buffers of the package are set: `embed` alone is undone by the next training step.
        """
        inner = self.vq._codebook
        counts = (
            torch.ones(len(entries), device=entries.device) if counts is None else counts.float()
        )
        inner.initted.fill_(True)
        inner.embed.copy_(entries[None])
        inner.cluster_size.copy_(counts[None])
        inner.embed_avg.copy_((entries * counts[:, None])[None])

    @property
    def embeddings(self) -> Float[Tensor, "size dim"]:
        """The entries of the codebook."""
        return self.vq._codebook.embed[0]

    def forward(
        self, z: Float[Tensor, "total dim"], seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize; in train mode the entries are updated afterwards.

        Args:
            z: vectors to quantize.
            seed: of the random replacement of dead entries, for which the package uses the global
                generator.

        Returns:
            Entries [total dim] with gradient to z, codes [total], commitment loss.
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
    """k-means by cosine on unit-norm samples; an empty cluster restarts at a random sample.

    vector-quantize-pytorch's own initialization uses one batch only, and duplicates entries if that
    has fewer than K vectors.

    Args:
        samples: vectors of many batches.
        size: K.
        iterations: of k-means.
        generator: source of the initial entries and of restarts.

    Returns:
        Unit-norm entries and their counts.

    Raises:
        ValueError: fewer samples than entries.
    """
    if len(samples) < size:
        raise ValueError(
            f"k-means of {size} codes needs at least {size} samples, got {len(samples)}"
        )
    pick = torch.randperm(len(samples), generator=generator)[:size].to(samples.device)
    entries = samples[pick].clone()
    counts = torch.zeros(size, device=samples.device)
    for _ in range(iterations):
        nearest = torch.cat(
            [(part @ entries.T).argmax(1) for part in samples.split(max(1, CHUNK // size))]
        )
        counts = torch.bincount(nearest, minlength=size).float()
        sums = torch.zeros_like(entries).index_add_(0, nearest, samples)
        empty = counts == 0
        if bool(empty.any()):
            restart = torch.randint(len(samples), (int(empty.sum()),), generator=generator).to(
                samples.device
            )
            sums[empty] = samples[restart]
        entries = F.normalize(sums, dim=-1)
    return entries, counts.clamp(min=1)


class RecentValues(nn.Module):
    """The latest values of a stream, in a buffer, so that a checkpoint holds them.

        size 4, after adding 1 2 3 and then 4 5:    5 2 3 4    (the oldest are overwritten first)

    Args:
        size: how many values are held.
        shape: shape of one value; () for numbers.
    """

    values: Tensor
    total: Tensor

    def __init__(self, size: int, *shape: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(size, *shape))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, values: Shaped[Tensor, "n *shape"]) -> None:
        """Overwrite the oldest values by these."""
        size = len(self.values)
        values = values[-size:].to(self.values.dtype)
        self.values[(self.total + torch.arange(len(values), device=self.values.device)) % size] = (
            values
        )
        self.total += len(values)

    def latest(self) -> Shaped[Tensor, "n *shape"]:
        """The values held, in no particular order."""
        return self.values[: min(len(self.values), int(self.total))]

    def clear(self) -> None:
        """Forget all values."""
        self.total.zero_()

"""CodebookTraining: a codebook that is trained on the features of a frozen encoder.

Before `start_step` nothing is quantized and the latest vectors are collected; then k-means makes
the codebook of them, and each vector z is blended into its codebook entry over `blend_steps`:

    step  0 ........... start_step .................. start_step + blend_steps ......
          z             z + ratio * (entry - z), ratio from 0 to 1              entry
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from lavit_tok.training.codebook import (
    QuantizationConfig,
    TrainingCodebook,
    Usage,
    spherical_kmeans,
)
from lavit_tok.training.frozen_encoder_training import FrozenEncoderTraining


class CodebookTraining(FrozenEncoderTraining):
    """A trainer of a tokenizer; a subclass calls `build_tokenizer` in its `__init__`."""

    codebook: TrainingCodebook | None
    quantization: QuantizationConfig
    mean_feature: Tensor
    seed: int

    def build_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        """Create the tokenizer, see FrozenEncoderTraining, and the buffers of the codebook."""
        super().build_tokenizer(*args, **kwargs)
        config, self.codebook = self.tokenizer.config, None
        self.register_buffer("mean_feature", torch.zeros(config.width))
        self.recent_z = RecentValues(self.quantization.kmeans_samples, config.code_dim)

    @property
    def quantizes(self) -> bool:
        """Whether `start_step` is past and the codebook has been initialized."""
        raise NotImplementedError

    def vectors_per_step(self) -> float:
        """Vectors of a batch that are quantized, in expectation."""
        raise NotImplementedError

    # Lightning hooks

    def configure_model(self) -> None:
        # Here and not in __init__: whether the codebook synchronizes between processes is decided
        # at its construction, which has to follow the start of the process group.
        if self.codebook is None:
            q = self.quantization
            self.codebook = TrainingCodebook(
                self.tokenizer.quantizer.codebook, q.decay, q.dead_ratio, q.gradient
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        assert self.codebook is not None
        self.codebook.set_vectors_per_step(self._vectors_of_all())

    def on_fit_end(self) -> None:
        if self.out and self.trainer.is_global_zero and self.quantizes:
            self.export(self.out)

    def not_saved(self) -> str | None:
        """The run ended before the codebook was initialized, or `out` is not set."""
        if self.quantizes:
            return super().not_saved()
        start = self.quantization.start_step
        return (
            f"the run ended at step {self.global_step:,}, before the codebook is initialized; "
            f"raise trainer.max_steps above {start:,} (codebook.start_step)"
        )

    # The steps of a training step

    @torch.no_grad()
    def update_mean_feature(self, features: Float[Tensor, "batch patches width"]) -> None:
        """The running mean feature, which starts at the mean of the first batch."""
        mean = features.mean((0, 1))
        if self.num_processes > 1:
            mean = self.all_gather(mean).mean(0)
        self.mean_feature.lerp_(mean, 1.0 if self.global_step == 0 else 0.02)

    def quantize(self, z: Float[Tensor, "total c"]) -> tuple[Tensor, Tensor | None, Tensor]:
        """(vectors, codes, commitment loss).

        Before `start_step` the vectors are z, and codes are None; after it, z blended into its
        codebook entry, or the entry itself in eval mode.
        """
        zero = torch.zeros((), device=z.device)
        if not self.quantizes or self.codebook is None:
            if self.training:
                self.recent_z.add(z)
            return z, None, zero
        quantized, codes, commitment = self.codebook(z, seed=self.seed + self.global_step)
        if not self.training:
            return quantized, codes, zero
        q = self.quantization
        ratio = min(1.0, (self.global_step - q.start_step + 1) / max(1, q.blend_steps))
        return z + ratio * (quantized - z), codes, commitment

    def start_codebook(self) -> None:
        """Initialize by k-means over the recent vectors; all ranks take those of rank 0.

        With `start_from`, the codebook is that of the tokenizer.
        """
        assert self.codebook is not None
        if self.start_from is not None:
            entries = self.tokenizer.quantizer.codebook.embeddings
            counts = torch.full((len(entries),), self._vectors_of_all() / len(entries))
            self.codebook.load_embeddings(entries, counts.to(entries.device))
            return
        generator = torch.Generator().manual_seed(self.seed)
        entries, counts = spherical_kmeans(
            self.recent_z.latest(),
            self.tokenizer.config.codebook_size,
            self.quantization.kmeans_iterations,
            generator,
        )
        entries, counts = self.trainer.strategy.broadcast((entries, counts))
        self.codebook.load_embeddings(entries, counts * self._vectors_of_all() / counts.sum())

    def _vectors_of_all(self) -> float:
        """Vectors that all processes together quantize in a step: the codebook counts those."""
        return self.vectors_per_step() * self.num_processes

    def copy_codebook(self) -> None:
        """Put the trained entries into the tokenizer."""
        assert self.codebook is not None
        self.tokenizer.quantizer.codebook.embeddings.copy_(self.codebook.embeddings)

    def export(self, directory: str | Path) -> None:
        """Save the tokenizer with the trained codebook, for VisualTokenizer.from_pretrained."""
        self.copy_codebook()
        super().export(directory)

    def log_usage(self, split: str, used: Usage) -> None:
        """Log the codebook usage of the codes of a split."""
        self.log_dict(
            {f"{split}/codebook_usage": used.used, f"{split}/perplexity": used.perplexity}
        )


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

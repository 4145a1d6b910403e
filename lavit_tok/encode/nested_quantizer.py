"""Features -> nested codes: each code quantizes the residual of the codes before it.

    features [b n d] -> a vector of every patch [b n p]
    level by level (nn/nested_order.py):
        residual of each area -> its coordinates in the level's basis [b areas c]
        stage by stage: nearest entry of the stage's table -> code; coordinates -= entry
        residual -= the sum of these entries, mapped back to the patches

No code depends on how many follow, so a shorter encoding is a prefix of a longer one, and the sum
of all entries approaches the vectors of the patches with every stage. This is residual quantization
(Juang and Gray, 1982) over areas that become smaller, as the scales of VAR do (Tian et al., 2024);
with three codes of an area in place of four of its quarters, an image never has more codes than
patches. Nothing here is trained by gradients: training/nested_codebook.py fits it to features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.encode.quantizer import half_norms, nearest_to_finite, require_finite
from lavit_tok.nn.nested_order import join_areas, levels, split_areas
from lavit_tok.nn.precision import KeepFloat32, without_autocast

FLOAT32: dict[str, Any] = {"dtype": torch.float32}


class NestedCodebook(KeepFloat32):
    """A table of K entries for each stage, and a basis for each level, in float32.

    Args:
        size: K.
        dim: c, dimension of the entries.
        patches: n, of an image.
        patch_dim: p, dimension of a patch's vector.
    """

    embeddings: Tensor
    area: Tensor
    found_at: Tensor

    def __init__(self, size: int, dim: int, patches: int, patch_dim: int) -> None:
        super().__init__()
        self.patches, self.patch_dim, self.levels = patches, patch_dim, levels(patches)
        area = torch.cat([level.area.flatten() for level in self.levels])  # of every rank
        self.register_buffer("area", area, persistent=False)
        # Of every rank, its place among the codes of all stages, each in the order of its areas
        found_at = torch.cat(
            [
                level.first + stage * level.side**2 + level.area[stage]
                for level in self.levels
                for stage in range(level.stages)
            ]
        )
        self.register_buffer("found_at", found_at, persistent=False)
        stages = sum(level.stages for level in self.levels)
        self.register_buffer("embeddings", torch.randn(stages, size, dim, **FLOAT32) * dim**-0.5)
        for i, level in enumerate(self.levels):
            joined = patches // level.side**2 * patch_dim
            basis = nn.init.orthogonal_(torch.empty(joined, dim, **FLOAT32))
            self.register_buffer(f"basis_{i}", basis)
        self._norms: tuple[Tensor, int, Tensor] | None = None

    def basis(self, level: int) -> Float[Tensor, "joined dim"]:
        """Orthonormal columns: coordinates -> the vectors of an area's patches."""
        found: Tensor = getattr(self, f"basis_{level}")
        return found

    def first_stage(self, level: int) -> int:
        """Number of the level's first stage."""
        return max(0, 3 * level - 2)

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self.embeddings.device

    def half_norms(self) -> Float[Tensor, "stages size"]:
        """|e|^2 / 2 of every entry, kept until the entries change.

        Computing them reads all tables once more, a fifth of the time of encoding one image.
        """
        if self.embeddings.is_inference():  # changes of which are not counted
            return half_norms(self.embeddings)
        of, version, norms = self._norms or (None, 0, self.embeddings)
        if of is not self.embeddings or version != self.embeddings._version:
            norms = half_norms(self.embeddings)
            self._norms = self.embeddings, self.embeddings._version, norms
        return norms

    @torch.no_grad()
    @without_autocast
    def encode(
        self, vectors: Float[Tensor, "batch patches patch_dim"], count: int
    ) -> tuple[Int64[Tensor, "batch count"], Float[Tensor, "batch count"]]:
        """The codes of the first `count` ranks, each the nearest entry; and their residual errors.

        Returns:
            The codes, and after each of them the squared distance between the vectors and the sum
            of the entries so far, mean over the patches, in float32.

        Raises:
            ValueError: NaN or infinity.
        """
        left, codes = vectors.float(), []
        distance, saved = left.square().sum((1, 2)), []
        require_finite(distance)
        norms, needed = self.half_norms(), [x for x in self.levels if x.first < count]
        for i, level in enumerate(needed):
            z = split_areas(left, level.side) @ self.basis(i)
            total, before = torch.zeros_like(z), z.square().sum(-1)
            for stage in range(level.stages):
                start = level.first + stage * level.side**2
                if start >= count:
                    break
                number = self.first_stage(i) + stage
                table = self.embeddings[number]
                found = nearest_to_finite(z.flatten(0, 1), table, norms[number]).view(z.shape[:2])
                entries = F.embedding(found, table)
                # The basis is orthonormal: distances in it are distances of the vectors
                z, total = z - entries, total + entries
                after = z.square().sum(-1)
                codes.append(found)
                saved.append(before - after)
                before = after
            if level is not needed[-1]:
                left = left - join_areas(total @ self.basis(i).T, level.side, self.patches)
        by_rank = self.found_at[:count]
        errors = distance[:, None] - torch.cat(saved, 1)[:, by_rank].cumsum(1)
        return torch.cat(codes, 1)[:, by_rank], errors.clamp(min=0) / self.patches

    @without_autocast
    def decode(
        self, codes: Int64[Tensor, "batch m"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch patches patch_dim"]:
        """The sum of the entries of each image's first codes, as vectors of the patches.

        Args:
            codes: by rank, padded to a rectangle.
            lengths: codes of every image, 1..m.
        """
        kept = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]
        found = self.embeddings.new_zeros(len(codes), self.patches, self.patch_dim)
        for i, level in enumerate(self.levels):
            if level.first >= codes.shape[1]:
                break
            areas = level.side**2
            total = self.embeddings.new_zeros(len(codes), areas, self.embeddings.shape[-1])
            for stage in range(level.stages):
                start = level.first + stage * areas
                some = codes[:, start : start + areas]  # of the last stages fewer, or none
                entries = F.embedding(some, self.embeddings[self.first_stage(i) + stage])
                entries = entries * kept[:, start : start + areas, None]
                total = total.index_add(1, self.area[start : start + some.shape[1]], entries)
            found = found + join_areas(total @ self.basis(i).T, level.side, self.patches)
        return found


class NestedQuantizer(KeepFloat32):
    """Features -> vectors of the patches -> codes, in float32.

    The vector of a patch holds the direction of its feature around the mean feature, and what a
    linear map reads of the feature itself, e.g. colors.

    Args:
        width: d, of the features.
        size: K.
        dim: c, dimension of the entries.
        patches: n, of an image.
        patch_dim: p, dimension of a patch's vector.
    """

    center: Tensor

    def __init__(self, width: int, size: int, dim: int, patches: int, patch_dim: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(width, **FLOAT32))
        self.direction = nn.Linear(width, patch_dim, False, **FLOAT32).requires_grad_(False)
        self.value = nn.Linear(width, patch_dim, **FLOAT32).requires_grad_(False)
        self.codebook = NestedCodebook(size, dim, patches, patch_dim)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.center.device

    @without_autocast
    def project(
        self, features: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch patches patch_dim"]:
        """The vectors of the patches, in float32."""
        x = features.float()
        return self.direction(F.normalize(x - self.center, dim=-1)) + self.value(x)

    def encode(
        self, features: Float[Tensor, "batch patches width"], count: int
    ) -> tuple[Int64[Tensor, "batch count"], Float[Tensor, "batch count"]]:
        """The codes of the first `count` ranks and their residual errors; see NestedCodebook."""
        return self.codebook.encode(self.project(features), count)

"""Codes -> features of every patch -> what the diffusion model is conditioned on.

    VisualCodes -codebook, Reconstructor-> X_rec [b n d] -Projection-> Conditioning
                -> arguments of a U-Net

Two styles, both published (LaVIT, ICLR 2024, section 3.1 and its public release):

    sd     tokens = Linear(X_rec)
           null = stored embedding [1 m c], 0-padded and masked
    sdxl   tokens = [Linear(X_rec), Linear(X_rec)], pooled = attention pool(X_rec),
           sizes as time ids; null = zeros

In both, `spatial_channels` adds Linear(X_rec) on the patch grid to the input channels of the U-Net,
beside the noisy latents, as InstructPix2Pix does with its input image (zeros for the null
conditioning). A small U-Net then does not have to learn the positions of patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.codes import VisualCodes
from lavit_tok.config import TokenizerConfig
from lavit_tok.decode.nested_reconstructor import NestedReconstructor
from lavit_tok.decode.reconstructor import Reconstructor
from lavit_tok.encode.nested_quantizer import NestedCodebook
from lavit_tok.encode.quantizer import Codebook, fingerprint
from lavit_tok.nn.attention import attend
from lavit_tok.nn.ranges import require_integers


@dataclass(frozen=True)
class Conditioning:
    """What a U-Net is conditioned on, for one batch."""

    tokens: Float[Tensor, "batch n cross"]
    """Keys and values of its cross-attention."""
    mask: Bool[Tensor, "batch n"] | None = None
    """Tokens that may be attended to; None for all."""
    pooled: Float[Tensor, "batch pooled"] | None = None
    """One vector per image, added to the time embedding (sdxl)."""
    spatial: Float[Tensor, "batch channels rows columns"] | None = None
    """Additional input channels, on a multiple of the patch grid."""

    def cat(self, other: Conditioning) -> Conditioning:
        """Concatenate both batches, this one first."""
        return self._join(other, torch.cat)

    def where(self, drop: Bool[Tensor, " batch"], other: Conditioning) -> Conditioning:
        """`other` where `drop` is set, else this one; for training classifier-free guidance."""

        def choose(pair: list[Tensor]) -> Tensor:
            return torch.where(drop.view(-1, *[1] * (pair[0].ndim - 1)), pair[1], pair[0])

        return self._join(other, choose)

    def inputs(
        self,
        latents: Float[Tensor, "batch c h w"],
        time_ids: Float[Tensor, "batch 6"] | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of UNet2DConditionModel besides the timestep.

        Args:
            latents: noisy latents.
            time_ids: original size, crop and target size of each image (sdxl).
        """
        values: dict[str, Any] = {"sample": latents, "encoder_hidden_states": self.tokens}
        if self.mask is not None:
            values["encoder_attention_mask"] = self.mask
        if self.pooled is not None:
            values["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": time_ids}
        if self.spatial is not None:
            size, grid = latents.shape[-2:], self.spatial
            if grid.shape[-2:] != size:
                grid = F.interpolate(grid, size, mode="bilinear", align_corners=False)
            values["sample"] = torch.cat([latents, grid.to(latents.dtype)], 1)
        return values

    def _join(self, other: Conditioning, join: Callable[[list[Tensor]], Tensor]) -> Conditioning:
        masks = [self.mask, other.mask]
        if any(m is not None for m in masks):  # a missing mask allows all tokens
            full = [torch.ones_like(c.tokens[..., 0], dtype=torch.bool) for c in (self, other)]
            masks = [f if m is None else m for m, f in zip(masks, full, strict=True)]
        pairs = (
            [self.tokens, other.tokens],
            masks,
            [self.pooled, other.pooled],
            [self.spatial, other.spatial],
        )
        return Conditioning(*(None if pair[0] is None else join(pair) for pair in pairs))  # type: ignore[arg-type]


class AttentionPool(nn.Module):
    """[b n w] -> [b out]: the mean token attends to itself and all tokens; after CLIP's ResNets."""

    def __init__(self, tokens: int, width: int, out: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(tokens + 1, width) * width**-0.5)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, out)

    def forward(self, x: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch out"]:
        """The pooled vector of each image."""
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.position
        parts = (self.query(x[:, :1]), self.key(x), self.value(x))
        q, k, v = (rearrange(p, "b n (h d) -> b h n d", h=self.heads) for p in parts)
        return self.out(rearrange(attend(q, k, v), "b h 1 d -> b (h d)"))


class Projection(nn.Module):
    """X_rec -> Conditioning: the part of a Conditioner that is trained together with the U-Net.

    Args:
        config: of the Conditioner.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        c = config
        width = c.width + 3 * c.color_cells**2
        self.null_length, self.feature_norm = c.null_length, c.feature_norm
        self.grid = (int(c.patches**0.5), c.spatial_scale)
        self.tokens = nn.ModuleList(nn.Linear(width, dim) for dim in c.cross_dims)
        self.null = self.pool = self.spatial = None
        if c.style == "sd":
            null = torch.randn(1, c.null_length, sum(c.cross_dims)) * 0.02
            self.null = nn.Parameter(null)
        else:
            self.pool = AttentionPool(c.patches, width, c.pooled_dim, c.pool_heads)
        if c.spatial_channels:
            self.spatial = nn.Linear(width, c.spatial_channels * c.spatial_scale**2)

    def forward(self, features: Float[Tensor, "batch patches width"]) -> Conditioning:
        """Project the features of every patch."""
        x = features.to(next(self.tokens.parameters()).dtype)
        x = F.layer_norm(x, x.shape[-1:]) if self.feature_norm else x
        tokens = torch.cat([linear(x) for linear in self.tokens], -1)
        pooled = None if self.pool is None else self.pool(x)
        spatial = None if self.spatial is None else patch_grid(self.spatial(x), *self.grid)
        return Conditioning(tokens, None, pooled, spatial)

    def unconditional(self, like: Conditioning) -> Conditioning:
        """The null conditioning of a batch.

        For sd with m = 2 and n = 4:  tokens  null_0 null_1 0 0        mask  1 1 0 0
        """
        pooled, spatial = (
            None if x is None else torch.zeros_like(x) for x in (like.pooled, like.spatial)
        )
        if self.null is None:
            return Conditioning(torch.zeros_like(like.tokens), None, pooled, spatial)
        batch, n, _ = like.tokens.shape
        null = F.pad(self.null.to(like.tokens.dtype), (0, 0, 0, n - self.null_length))
        mask = (torch.arange(n, device=null.device) < self.null_length).expand(batch, -1)
        tokens = null.expand(batch, -1, -1)
        return Conditioning(tokens, None if self.null_length == n else mask, pooled, spatial)


def patch_grid(
    x: Float[Tensor, "batch patches c"], side: int, scale: int
) -> Float[Tensor, "batch channels rows columns"]:
    """Arrange patches in raster order on a grid, each as scale x scale cells.

    4 patches, side 2, scale 2:

    0 0 1 1
    0 0 1 1
    2 2 3 3
    2 2 3 3
    """
    return rearrange(x, "b (r c) (k p q) -> b k (r p) (c q)", r=side, p=scale, q=scale)


class Conditioner(ModelMixin, ConfigMixin):
    """Codes -> Conditioning, with a copy of codebook and reconstructor: no tokenizer is needed.

    Args:
        style: "sd" or "sdxl", see the module docstring.
        width: d, dimension of the tokenizer's features.
        patches: n, patches of an image; a square number if spatial_channels is set.
        codebook_size: K; codes of a tokenizer with another K are refused.
        code_dim: dimension of the codebook entries.
        depth: blocks of the reconstructor.
        heads: attention heads of the reconstructor.
        mlp_width: intermediate size of its MLPs.
        layer_norm_eps: epsilon of its LayerNorms.
        cross_dims: output dimensions of the projections of X_rec, in total the U-Net's
            cross_attention_dim; sd has one, sdxl two. Empty for a decoder without U-Net.
        null_length: m, tokens of the null embedding (sd), 1..n; with m = n no mask is needed.
        pooled_dim: dimension of the pooled vector (sdxl).
        pool_heads: attention heads of the pool (sdxl).
        spatial_channels: additional input channels of the U-Net, 0 for none.
        spatial_scale: cells of the spatial channels per patch side.
        feature_norm: normalize each feature (LayerNorm without weights) before projecting; False
            in the release.
        nested: the codes are nested (TokenizerConfig.sequence), and reconstructed as such.
        color_cells: their reconstructed colors are projected beside the features
            (TokenizerConfig.color_cells).
        patch_dim: dimension of a patch's vector of nested codes (TokenizerConfig.patch_dim).

    Raises:
        ValueError: naming the argument, what was expected and what was received.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        style: str = "sd",
        width: int = 192,
        patches: int = 64,
        codebook_size: int = 2048,
        code_dim: int = 16,
        depth: int = 3,
        heads: int = 6,
        mlp_width: int = 837,
        layer_norm_eps: float = 1e-5,
        cross_dims: tuple[int, ...] | list[int] = (192,),
        null_length: int = 1,
        pooled_dim: int = 0,
        pool_heads: int = 1,
        spatial_channels: int = 0,
        spatial_scale: int = 1,
        feature_norm: bool = False,
        nested: bool = False,
        color_cells: int = 0,
        patch_dim: int = 0,
    ) -> None:
        super().__init__()
        require_integers(Conditioner.__init__, self.config, 0)
        number = {"sd": 1, "sdxl": 2}.get(style)
        self._require("style", number is not None, "'sd' or 'sdxl'")
        is_valid = len(cross_dims) in (number, 0) and min(cross_dims, default=1) > 0
        self._require("cross_dims", is_valid, f"{number} positive widths for {style}")
        if style == "sd":
            self._require("null_length", 1 <= null_length <= patches, f"1..{patches} (patches)")
        else:
            self._require("pooled_dim", pooled_dim > 0, "a positive width for sdxl")
            divides = pool_heads > 0 and width % pool_heads == 0
            self._require("pool_heads", divides, f"a divisor of {width}")
        is_square = int(patches**0.5) ** 2 == patches
        expected = "a square number for spatial_channels"
        self._require("patches", is_square or not spatial_channels, expected)
        self._require("color_cells", nested or not color_cells, "0, unless nested")
        self._require("patch_dim", nested or not patch_dim, "0, unless nested")
        sizes = (depth, heads, mlp_width, layer_norm_eps)
        self.codebook: Any
        self.reconstructor: Any
        if nested:
            self._require("patch_dim", patch_dim > 0, "a positive width for nested codes")
            self.codebook = NestedCodebook(codebook_size, code_dim, patches, patch_dim)
            self.reconstructor = NestedReconstructor(
                width, patches, patch_dim, *sizes, 3 * color_cells**2
            )
        else:
            self.codebook = Codebook(codebook_size, code_dim)
            self.reconstructor = Reconstructor(width, patches, code_dim, *sizes)
        self.projection = Projection(self.config) if len(cross_dims) else None
        self.eval()

    def _require(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ValueError(f"{name}: expected {expected}, got {self.config[name]!r}")

    @classmethod
    def for_tokenizer(
        cls,
        config: TokenizerConfig,
        codebook: Codebook | NestedCodebook | None = None,
        reconstructor: Reconstructor | NestedReconstructor | None = None,
        **kwargs: Any,
    ) -> Conditioner:
        """Build the conditioner of a tokenizer's codes, with a new projection.

        Args:
            config: the tokenizer's.
            codebook: the tokenizer's, copied if given.
            reconstructor: the tokenizer's, copied if given.
            kwargs: style, cross_dims and the arguments of the class that follow it.
        """
        nested: dict[str, Any] = {}
        if config.sequence == "nested":
            sizes = {"color_cells": config.color_cells, "patch_dim": config.patch_dim}
            nested = {"nested": True, **sizes}
        conditioner = cls(
            width=config.width,
            patches=config.num_patches,
            codebook_size=config.codebook_size,
            code_dim=config.code_dim,
            depth=config.reconstructor_depth,
            heads=config.num_heads,
            mlp_width=config.mlp_width,
            layer_norm_eps=config.layer_norm_eps,
            **nested,
            **kwargs,
        )
        if codebook is not None:
            conditioner.codebook.load_state_dict(codebook.state_dict())
        if reconstructor is not None:
            conditioner.reconstructor.load_state_dict(reconstructor.state_dict())
        return conditioner

    def fingerprint(self) -> str:
        """Identifies the codebook, see VisualTokenizer.fingerprint."""
        return fingerprint(self.codebook.embeddings)

    def features(self, codes: VisualCodes) -> Float[Tensor, "batch patches width"]:
        """X_rec, the features of every patch; followed by the colors of nested codes.

        Raises:
            CodeError: codes of another codebook, none, or too many.
        """
        codes.check(self.config.codebook_size)
        codes.check_lengths(self.config.patches)
        codes = codes.to(self.codebook.embeddings.device)
        joined: Tensor = self.reconstructor.of_codes(codes, self.codebook).joined
        return joined

    def forward(self, codes: VisualCodes) -> Conditioning:
        """The conditioning of a batch of codes."""
        if self.projection is None:
            raise ValueError("expected cross_dims for a U-Net, this conditioner has none")
        return self.projection(self.features(codes))

    def unconditional(self, like: Conditioning) -> Conditioning:
        """The null conditioning of a batch."""
        assert self.projection is not None
        return self.projection.unconditional(like)

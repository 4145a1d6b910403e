"""Room 7: codes -> features of every patch -> what the diffusion model is conditioned on.

    VisualCodes -codebook, Reconstructor-> X_rec [b n d] -Projection-> Conditioning -> arguments of a U-Net

Two styles, both published (LaVIT, ICLR 2024, section 3.1 and its public release):

    sd     tokens = Linear(X_rec)                                    null = stored embedding [1 m c], 0-padded, masked
    sdxl   tokens = [Linear(X_rec), Linear(X_rec)], pooled = attention pool(X_rec), sizes as time ids     null = zeros

To either, `spatial_channels` adds a third way in: Linear(X_rec) laid out on the patch grid and joined to the noisy
latents as further input channels, as InstructPix2Pix does with its picture (zeros for the null). A small U-Net then
need not learn where a patch lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.codes import VisualCodes
from lavit_tok.config import TokenizerConfig
from lavit_tok.decode.reconstructor import Reconstructor
from lavit_tok.encode.quantizer import Codebook
from lavit_tok.nn.attention import attend


@dataclass(frozen=True)
class Conditioning:
    """One batch of conditions of a U-Net."""

    tokens: Float[Tensor, "batch n cross"]
    """Keys and values of its cross-attention."""
    mask: Bool[Tensor, "batch n"] | None = None
    """Tokens that may be looked at; None for all."""
    pooled: Float[Tensor, "batch pooled"] | None = None
    """One vector a picture, added to the time embedding (sdxl)."""
    spatial: Float[Tensor, "batch channels rows columns"] | None = None
    """Further input channels, on a multiple of the patch grid."""

    def cat(self, other: Conditioning) -> Conditioning:
        """Both batches, this one first."""
        return self._join(other, torch.cat)

    def where(self, drop: Bool[Tensor, " batch"], other: Conditioning) -> Conditioning:
        """`other` for the pictures in `drop`, this one for the rest; what classifier-free guidance trains on."""

        def choose(pair: list[Tensor]) -> Tensor:
            return torch.where(drop.view(-1, *[1] * (pair[0].ndim - 1)), pair[1], pair[0])

        return self._join(other, choose)

    def inputs(
        self,
        latents: Float[Tensor, "batch c h w"],
        time_ids: Float[Tensor, "batch 6"] | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of UNet2DConditionModel beside the timestep: sample, encoder_hidden_states and the rest."""
        values: dict[str, Any] = {"sample": latents, "encoder_hidden_states": self.tokens}
        if self.mask is not None:
            values["encoder_attention_mask"] = self.mask
        if self.pooled is not None:
            values["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": time_ids}
        if self.spatial is not None:
            size = latents.shape[-2:]
            same = self.spatial.shape[-2:] == size
            grid = (
                self.spatial
                if same
                else F.interpolate(self.spatial, size, mode="bilinear", align_corners=False)
            )
            values["sample"] = torch.cat([latents, grid.to(latents.dtype)], 1)
        return values

    def _join(self, other: Conditioning, join: Callable[[list[Tensor]], Tensor]) -> Conditioning:
        masks = [self.mask, other.mask]
        if any(m is not None for m in masks):
            masks = [
                c._full_mask() if m is None else m
                for c, m in zip((self, other), masks, strict=True)
            ]
        pairs = (
            [self.tokens, other.tokens],
            masks,
            [self.pooled, other.pooled],
            [self.spatial, other.spatial],
        )
        return Conditioning(*(None if pair[0] is None else join(pair) for pair in pairs))  # type: ignore[arg-type]

    def _full_mask(self) -> Bool[Tensor, "batch n"]:
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)


class AttentionPool(nn.Module):
    """[b n w] -> [b out]: the mean token, put before the others, looks once at all of them; after CLIP's ResNets."""

    def __init__(self, tokens: int, width: int, out: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(tokens + 1, width) * width**-0.5)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, out)

    def forward(self, x: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch out"]:
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.position
        parts = (self.query(x[:, :1]), self.key(x), self.value(x))
        q, k, v = (rearrange(p, "b n (h d) -> b h n d", h=self.heads) for p in parts)
        return self.out(rearrange(attend(q, k, v), "b h 1 d -> b (h d)"))


class Projection(nn.Module):
    """X_rec -> Conditioning: the part of a Conditioner that is trained together with the U-Net.

    Args: see Conditioner.
    """

    def __init__(
        self,
        style: Literal["sd", "sdxl"],
        width: int,
        patches: int,
        cross_dims: tuple[int, ...],
        null_length: int,
        pooled_dim: int,
        pool_heads: int,
        spatial_channels: int,
        spatial_scale: int,
        feature_norm: bool,
    ) -> None:
        super().__init__()
        self.style, self.width, self.patches, self.null_length = style, width, patches, null_length
        self.spatial_channels, self.spatial_scale, self.feature_norm = (
            spatial_channels,
            spatial_scale,
            feature_norm,
        )
        self.tokens = nn.ModuleList(nn.Linear(width, dim) for dim in cross_dims)
        self.null = (
            nn.Parameter(torch.randn(1, null_length, sum(cross_dims)) * 0.02)
            if style == "sd"
            else None
        )
        self.pool = (
            AttentionPool(patches, width, pooled_dim, pool_heads) if style == "sdxl" else None
        )
        self.spatial = (
            nn.Linear(width, spatial_channels * spatial_scale**2) if spatial_channels else None
        )

    def forward(self, features: Float[Tensor, "batch patches width"]) -> Conditioning:
        x = features.to(next(self.tokens.parameters()).dtype)
        x = F.layer_norm(x, x.shape[-1:]) if self.feature_norm else x
        tokens = torch.cat([linear(x) for linear in self.tokens], -1)
        pooled = None if self.pool is None else self.pool(x)
        return Conditioning(
            tokens, None, pooled, None if self.spatial is None else self._lay_out(self.spatial(x))
        )

    def unconditional(self, like: Conditioning) -> Conditioning:
        """The null condition for each picture of a batch: see this file's head. For sd with m = 2 and n = 4,

        tokens  null_0 null_1 0 0        mask  1 1 0 0
        """
        pooled, spatial = (
            None if x is None else torch.zeros_like(x) for x in (like.pooled, like.spatial)
        )
        if self.null is None:
            return Conditioning(torch.zeros_like(like.tokens), None, pooled, spatial)
        batch, n, _ = like.tokens.shape
        null = F.pad(self.null.to(like.tokens.dtype), (0, 0, 0, n - self.null_length)).expand(
            batch, -1, -1
        )
        mask = torch.arange(n, device=null.device) < self.null_length
        return Conditioning(
            null, None if self.null_length == n else mask.expand(batch, -1), pooled, spatial
        )

    def _lay_out(
        self, x: Float[Tensor, "batch patches c"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Patch (r, c), raster order, to cell (r, c) of the grid, or to scale x scale cells there; 4 patches, scale 2:

        0 0 1 1
        0 0 1 1
        2 2 3 3
        2 2 3 3
        """
        side, scale = int(self.patches**0.5), self.spatial_scale
        return rearrange(x, "b (r c) (k p q) -> b k (r p) (c q)", r=side, p=scale, q=scale)


class Conditioner(ModelMixin, ConfigMixin):
    """Codes to Conditioning, with its own copy of the codebook and the reconstructor: a decoder needs no tokenizer.

    Args:
        style: "sd" or "sdxl", see this file's head.
        width: d, width of the tokenizer's features.
        patches: n, patches of a picture; a square number if spatial_channels is set.
        codebook_size: K; codes of a tokenizer with another K are refused.
        code_dim: width of a codebook row.
        depth: blocks of the reconstructor.
        heads: attention heads of the reconstructor.
        mlp_width: hidden width of its MLPs.
        layer_norm_eps: epsilon of its LayerNorms.
        cross_dims: widths of the projections of X_rec, together the U-Net's cross_attention_dim; sd has one, sdxl two.
        null_length: m, tokens of the null embedding (sd), 1..n; with m = n no mask is needed.
        pooled_dim: width of the pooled vector (sdxl).
        pool_heads: attention heads of the pool (sdxl).
        spatial_channels: further input channels of the U-Net, 0 for none.
        spatial_scale: cells of the spatial channels per patch side.
        feature_norm: normalize each feature (LayerNorm without weights) before projecting; the release does not.

    Raises:
        ValueError: naming the setting, what was expected and what came.
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
    ) -> None:
        super().__init__()
        dims = tuple(cross_dims)
        expected = {"sd": 1, "sdxl": 2}.get(style)
        _require("style", style, expected is not None, "'sd' or 'sdxl'")
        _require(
            "cross_dims",
            dims,
            len(dims) == expected and min(dims) > 0,
            f"{expected} positive widths for {style}",
        )
        if style == "sd":
            _require(
                "null_length", null_length, 1 <= null_length <= patches, f"1..{patches} (patches)"
            )
        else:
            _require("pooled_dim", pooled_dim, pooled_dim > 0, "a positive width for sdxl")
            _require(
                "pool_heads",
                pool_heads,
                pool_heads > 0 and width % pool_heads == 0,
                f"a divisor of {width}",
            )
        if spatial_channels:
            _require(
                "patches",
                patches,
                int(patches**0.5) ** 2 == patches,
                "a square number for spatial_channels",
            )
        self.codebook = Codebook(codebook_size, code_dim)
        self.reconstructor = Reconstructor(
            width, patches, code_dim, depth, heads, mlp_width, layer_norm_eps
        )
        self.projection = Projection(
            style,  # type: ignore[arg-type]
            width,
            patches,
            dims,
            null_length,
            pooled_dim,
            pool_heads,
            spatial_channels,
            spatial_scale,
            feature_norm,
        )
        self.eval()

    @classmethod
    def for_tokenizer(
        cls,
        config: TokenizerConfig,
        codebook: Codebook | None = None,
        reconstructor: Reconstructor | None = None,
        **settings: Any,
    ) -> Conditioner:
        """Build the conditioner of a tokenizer's codes, with a new projection.

        Args:
            config: the tokenizer's.
            codebook, reconstructor: the tokenizer's, copied if given.
            settings: style, cross_dims and the arguments of the class that follow it.
        """
        c = config
        conditioner = cls(
            width=c.width,
            patches=c.num_patches,
            codebook_size=c.codebook_size,
            code_dim=c.code_dim,
            depth=c.reconstructor_depth,
            heads=c.num_heads,
            mlp_width=c.mlp_width,
            layer_norm_eps=c.layer_norm_eps,
            **settings,
        )
        if codebook is not None:
            conditioner.codebook.load_state_dict(codebook.state_dict())
        if reconstructor is not None:
            conditioner.reconstructor.load_state_dict(reconstructor.state_dict())
        return conditioner

    def features(self, codes: VisualCodes) -> Float[Tensor, "batch patches width"]:
        """X_rec, the features of every patch. Raises CodeError for codes of another codebook, none, or too many."""
        codes.check(self.config.codebook_size)
        codes.check_lengths(self.config.patches)
        codes = codes.to(self.codebook.embeddings.device)
        return self.reconstructor.ragged(self.codebook.lookup(codes.values), codes.layout)

    def forward(self, codes: VisualCodes) -> Conditioning:
        """Codes of a batch -> their conditions."""
        return self.projection(self.features(codes))

    def unconditional(self, like: Conditioning) -> Conditioning:
        """The null condition for each picture of a batch."""
        return self.projection.unconditional(like)


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")

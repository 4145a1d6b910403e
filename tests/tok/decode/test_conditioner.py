"""What a U-Net is conditioned on, against the tokenizer's features, drawings and unpadded nulls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from lavit_tok import CodeError, VisualCodes, VisualTokenizer
from lavit_tok.decode.conditioner import Conditioner, Conditioning, patch_grid
from lavit_tok.decode.mean_decoder import MeanDecoder

STYLES: dict[str, dict[str, Any]] = {
    "sd": {"cross_dims": [24], "null_length": 3},
    "sdxl": {"style": "sdxl", "cross_dims": [8, 16], "pooled_dim": 12, "pool_heads": 4},
    "spatial": {
        "cross_dims": [24],
        "spatial_channels": 5,
        "spatial_scale": 2,
        "feature_norm": True,
    },
}


def conditioner(tokenizer: VisualTokenizer, **options: Any) -> Conditioner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Conditioner.for_tokenizer(
            tokenizer.config, tokenizer.quantizer.codebook, tokenizer.reconstructor, **options
        )


@pytest.fixture
def codes() -> VisualCodes:
    return VisualCodes.from_list([[3, 1, 4, 1, 5], [9], list(range(16))], codebook_size=16)


def equal(a: Conditioning, b: Conditioning) -> None:
    for name in ("tokens", "mask", "pooled", "spatial"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y)


def test_features_are_the_tokenizers(tiny_tokenizer: VisualTokenizer, codes: VisualCodes) -> None:
    module = conditioner(tiny_tokenizer, cross_dims=[24])
    assert torch.equal(module.features(codes), tiny_tokenizer.reconstruct_features(codes))
    with torch.no_grad():
        tiny_tokenizer.reconstructor.queries.add_(1)  # a copy, not shared with the tokenizer
    assert not torch.equal(module.features(codes), tiny_tokenizer.reconstruct_features(codes))


@torch.no_grad()
@pytest.mark.parametrize("style", STYLES)
def test_shapes(style: str, tiny_tokenizer: VisualTokenizer, codes: VisualCodes) -> None:
    module = conditioner(tiny_tokenizer, **STYLES[style])(codes)
    assert module.tokens.shape == (3, 16, 24) and module.mask is None
    assert (None if module.pooled is None else tuple(module.pooled.shape)) == (
        (3, 12) if style == "sdxl" else None
    )
    assert (None if module.spatial is None else tuple(module.spatial.shape)) == (
        (3, 5, 8, 8) if style == "spatial" else None
    )


@torch.no_grad()
def test_tokens_are_a_projection_of_the_features(
    tiny_tokenizer: VisualTokenizer, codes: VisualCodes
) -> None:
    module = conditioner(tiny_tokenizer, **STYLES["sdxl"])
    x, (one, two) = module.features(codes), module.projection.tokens
    torch.testing.assert_close(
        module(codes).tokens,
        torch.cat([x @ one.weight.T + one.bias, x @ two.weight.T + two.bias], 2),
    )


@torch.no_grad()
def test_pool_is_the_mean_tokens_attention(
    tiny_tokenizer: VisualTokenizer, codes: VisualCodes
) -> None:
    """Against torch's own multi-head attention of the mean token, put first, over all tokens."""
    module = conditioner(tiny_tokenizer, **STYLES["sdxl"])
    x, pool = module.features(codes), module.projection.pool
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.position
    expected, _ = F.multi_head_attention_forward(
        *(x.transpose(0, 1)[:1], x.transpose(0, 1), x.transpose(0, 1)),
        embed_dim_to_check=32,
        num_heads=4,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.query.bias, pool.key.bias, pool.value.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.out.weight,
        out_proj_bias=pool.out.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.query.weight,
        k_proj_weight=pool.key.weight,
        v_proj_weight=pool.value.weight,
    )
    torch.testing.assert_close(module(codes).pooled, expected[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_spatial_drawing() -> None:
    """The drawing of patch_grid, and sizes of one patch and one cell."""
    grid = patch_grid(torch.arange(4.0)[None, :, None].expand(1, 4, 4), 2, 2)
    drawing = [line.split() for line in (patch_grid.__doc__ or "").splitlines()[4:8]]
    assert [[str(int(x)) for x in line] for line in grid[0, 0].tolist()] == drawing
    # the four cells of a patch are in raster order too
    cells = patch_grid(torch.arange(16.0).view(1, 4, 4), 2, 2)
    assert cells[0, 0].int().tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    assert patch_grid(torch.ones(2, 1, 3), 1, 1).shape == (2, 3, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize(("m", "mask"), [(1, [1] + [0] * 15), (3, [1] * 3 + [0] * 13), (16, None)])
def test_null_is_padded_and_masked(
    m: int, mask: Any, tiny_tokenizer: VisualTokenizer, codes: VisualCodes
) -> None:
    module = conditioner(tiny_tokenizer, cross_dims=[24], null_length=m)
    null = module.unconditional(module(codes))
    assert null.tokens.shape == (3, 16, 24)
    assert torch.equal(null.tokens[1, :m], module.projection.null[0]) and bool(
        (null.tokens[:, m:] == 0).all()
    )
    assert (None if null.mask is None else null.mask.int().tolist()) == (
        None if mask is None else [mask] * 3
    )


@torch.no_grad()
@pytest.mark.parametrize("style", ["sdxl", "spatial"])
def test_null_of_pooled_and_spatial_is_zero(
    style: str, tiny_tokenizer: VisualTokenizer, codes: VisualCodes
) -> None:
    module = conditioner(tiny_tokenizer, **STYLES[style])
    null = module.unconditional(module(codes))
    other = null.pooled if style == "sdxl" else null.spatial
    assert bool((other == 0).all()) and (style != "sdxl" or bool((null.tokens == 0).all()))


@torch.no_grad()
def test_masked_padding_is_invisible_to_the_unet(
    tiny_tokenizer: VisualTokenizer, codes: VisualCodes
) -> None:
    """The padded null gives exactly what the m tokens alone give."""
    module = conditioner(tiny_tokenizer, cross_dims=[24], null_length=3)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
    latents, null = torch.randn(3, 4, 8, 8), module.unconditional(module(codes))
    padded = unet(timestep=7, **null.inputs(latents)).sample
    plain = unet(latents, 7, module.projection.null.expand(3, -1, -1)).sample
    unmasked = unet(latents, 7, null.tokens).sample
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)
    assert (padded - unmasked).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("style", STYLES)
def test_where_and_cat(style: str, tiny_tokenizer: VisualTokenizer, codes: VisualCodes) -> None:
    module = conditioner(tiny_tokenizer, **STYLES[style])
    given = module(codes)
    null = module.unconditional(given)
    joined, mixed = null.cat(given), given.where(torch.tensor([True, False, False]), null)
    equal(mixed.where(torch.tensor([True, True, True]), given), _with_mask(given, mixed))
    for name in ("tokens", "pooled", "spatial"):
        a, b = getattr(given, name), getattr(null, name)
        if a is not None:
            assert torch.equal(getattr(joined, name), torch.cat([b, a]))
            assert torch.equal(getattr(mixed, name), torch.cat([b[:1], a[1:]]))
    if style != "sdxl":
        m = module.config.null_length
        assert (
            mixed.mask.sum(1).tolist() == [m, 16, 16]
            and joined.mask.sum(1).tolist() == [m] * 3 + [16] * 3
        )


def _with_mask(given: Conditioning, other: Conditioning) -> Conditioning:
    """`given` with an explicit mask of all tokens, if the other has a mask."""
    mask = None if other.mask is None else torch.ones_like(other.mask)
    return Conditioning(given.tokens, mask, given.pooled, given.spatial)


@torch.no_grad()
def test_spatial_channels_are_resized_to_the_latents(
    tiny_tokenizer: VisualTokenizer, codes: VisualCodes
) -> None:
    module = conditioner(tiny_tokenizer, **STYLES["spatial"])(codes)
    exact, larger = module.inputs(torch.zeros(3, 4, 8, 8)), module.inputs(torch.zeros(3, 4, 16, 24))
    assert torch.equal(exact["sample"][:, 4:], module.spatial)
    assert larger["sample"].shape == (3, 9, 16, 24)
    torch.testing.assert_close(
        larger["sample"][:, 4:].mean(), module.spatial.mean(), rtol=1e-3, atol=1e-4
    )


def test_refuses_codes_that_do_not_fit(tiny_tokenizer: VisualTokenizer) -> None:
    module = conditioner(tiny_tokenizer, cross_dims=[24])
    with pytest.raises(CodeError, match="codebook of 32 entries, this one has 16"):
        module(VisualCodes.from_list([[1]], codebook_size=32))
    with pytest.raises(CodeError, match=r"1\.\.16 codes per image, got lengths 17\.\.17"):
        module(VisualCodes.from_list([[0] * 17]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "dit"}, "style: expected 'sd' or 'sdxl', got 'dit'"),
        ({"cross_dims": [8, 8]}, "cross_dims: expected 1 positive widths for sd"),
        ({"null_length": 17}, r"null_length: expected 1\.\.16"),
        ({"style": "sdxl", "cross_dims": [8, 8]}, "pooled_dim: expected a positive width"),
        (
            {"style": "sdxl", "cross_dims": [8, 8], "pooled_dim": 4, "pool_heads": 5},
            "pool_heads: expected a divisor of 32",
        ),
    ],
)
def test_refuses_options(
    options: dict[str, Any], message: str, tiny_tokenizer: VisualTokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        Conditioner.for_tokenizer(tiny_tokenizer.config, **{"cross_dims": [24], **options})
    with pytest.raises(ValueError, match="square number"):
        Conditioner(patches=15, spatial_channels=1)


def test_numbers_of_a_config_are_integers(unchecked: None) -> None:
    """A file's `true` would count as 1: the same weights, other results."""
    with pytest.raises(ValueError, match=r"^heads: expected an integer in .*, got True"):
        Conditioner(heads=True)
    with pytest.raises(ValueError, match=r"^groups: expected an integer in .*, got True"):
        MeanDecoder(groups=True)


@torch.no_grad()
@pytest.mark.parametrize("style", STYLES)
def test_diffusers_round_trip(
    style: str, tmp_path: Path, tiny_tokenizer: VisualTokenizer, codes: VisualCodes
) -> None:
    module = conditioner(tiny_tokenizer, **STYLES[style])
    module.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    equal(Conditioner.from_pretrained(tmp_path)(codes), module(codes))

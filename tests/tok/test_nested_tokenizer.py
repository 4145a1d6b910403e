"""A tokenizer of nested codes: budgets are prefixes, lengths follow the predicted error, quality is
kept."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers.small_nested import SETTINGS as SMALL

from lavit_tok import CodeError, ConfigError, TokenizerConfig, VisualCodes, VisualTokenizer
from lavit_tok.encode.efficientnet import JoinedConfig
from lavit_tok.encode.rate_control import RateControl, Request
from lavit_tok.encode.rate_distortion import Target, counts_at_price
from lavit_tok.nn.nested_order import nested_order

SETTINGS = {**SMALL, "codebook_size": 64, "error_hidden": 8, "price": 0.01}


def build(**changes: object) -> VisualTokenizer:
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(TokenizerConfig.from_dict({**SETTINGS, **changes}))
    for head in getattr(tokenizer, "error_heads", {}).values():  # so that images differ
        torch.nn.init.normal_(head.mlp[-1].weight, std=4.0)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> VisualTokenizer:
    return build()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(5, 3, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")
    noise = torch.rand(5, 3, 32, 32, generator=generator)
    strength = torch.linspace(0, 0.8, 5).view(5, 1, 1, 1)
    return ((1 - strength) * large + strength * noise).mul(255).to(torch.uint8)


def test_a_budget_is_the_beginning_of_a_larger_one(
    tokenizer: VisualTokenizer, images: torch.Tensor
) -> None:
    whole = tokenizer.encode(images, budget=16)
    assert whole.lengths.tolist() == [16] * 5
    for budget in (1, 3, 7):
        codes = tokenizer.encode(images, budget=budget)
        cut = whole.truncate(budget)
        assert torch.equal(codes.values, cut.values)
        assert torch.equal(codes.keep, cut.keep)
        assert codes.nested and cut.nested
    assert whole.truncate([1, 2, 99, 4, 5]).lengths.tolist() == [1, 2, 16, 4, 5]


def test_kept_patches_are_the_first_of_the_order(
    tokenizer: VisualTokenizer, images: torch.Tensor
) -> None:
    codes = tokenizer.encode(images[:1], budget=3)
    assert sorted(codes.keep[0].nonzero()[:, 0].tolist()) == sorted(
        nested_order(16).patch[:3].tolist()
    )
    with pytest.raises(ValueError, match="first patches of the nested order"):
        tokenizer.encode_kept(torch.randn(1, 16, 24), ~codes.keep)
    for stage, arguments in (
        (tokenizer.merge, (torch.randn(1, 16, 24), codes.keep)),
        (tokenizer.project, (torch.randn(3, 24),)),
        (tokenizer.quantize, (torch.randn(3, 4), codes.lengths)),
    ):
        with pytest.raises(ValueError, match="not of merged features"):
            stage(*arguments)
    with pytest.raises(ValueError, match="depends on its rank"):
        tokenizer.lookup(codes)


def test_lengths_do_not_depend_on_the_batch(
    tokenizer: VisualTokenizer, images: torch.Tensor
) -> None:
    for request in ({}, {"rate": 0.02}, {"quality": 0.2}, {"quality": ("psnr", 8.0)}):
        together = tokenizer.encode(images, **request)
        for index, image in enumerate(images):
            alone = tokenizer.encode(image, **request)
            assert torch.equal(alone[0], together[index])


def test_lengths_follow_the_price_and_the_limits(
    tokenizer: VisualTokenizer, images: torch.Tensor
) -> None:
    rates = [tokenizer.encode(images, rate=r, exact=False).lengths for r in (0.0, 0.01, 0.1, 2.0)]
    assert all(bool((a >= b).all()) for a, b in itertools.pairwise(rates))
    assert rates[-1].tolist() == [1] * 5
    assert torch.equal(rates[1], tokenizer.encode(images).lengths)
    limited = tokenizer.encode(images, min_codes=4, max_codes=6).lengths
    assert torch.equal(limited, tokenizer.encode(images).lengths.clamp(4, 6))
    codes = tokenizer.encode(images)
    features = tokenizer.features(tokenizer.preprocess(images))
    predicted = tokenizer.predicted_errors(features)
    assert torch.equal(codes.predicted_error, predicted.gather(1, codes.lengths[:, None] - 1)[:, 0])
    assert torch.equal(codes.keep, tokenizer.select(tokenizer.score(features)))  # the stages agree


def test_a_price_can_be_of_colors(images: torch.Tensor) -> None:
    tokenizer = build(priced="colors", price=1e-3)
    features = tokenizer.features(tokenizer.preprocess(images))
    errors = tokenizer.predicted_errors(features, "psnr").square()
    codes = tokenizer.encode(images)
    assert torch.equal(codes.lengths, counts_at_price(errors, 1e-3))
    assert not torch.equal(codes.lengths, build(price=1e-3).encode(images).lengths)
    assert torch.equal(codes.keep, tokenizer.select(tokenizer.score(features)))
    control = RateControl(tokenizer, features, tokenizer.preprocess(images))
    measured = control.measure(Target("psnr", 20.0))
    start = counts_at_price(errors, 3e-4)
    tried = [(start * 2 ** (step / 2)).round().long().clamp(1, 16) for step in range(-2, 3)]
    costs = torch.stack([measured(counts).square() + 3e-4 * counts for counts in tried])
    exact = torch.stack(tried).gather(0, costs.argmin(0, keepdim=True))[0]
    assert torch.equal(tokenizer.encode(images, rate=3e-4).lengths, exact)


def test_a_fraction_is_dealt_by_predicted_gain(
    tokenizer: VisualTokenizer, images: torch.Tensor
) -> None:
    codes = tokenizer.encode(images, budget=0.4)
    assert int(codes.lengths.sum()) == 32
    assert len(set(codes.lengths.tolist())) > 1
    limited = tokenizer.encode(images, budget=0.4, max_codes=8).lengths
    assert int(limited.sum()) == 32 and int(limited.max()) <= 8


@pytest.mark.parametrize("quality", [0.05, ("psnr", 6.0)])
def test_quality_takes_the_fewest_codes_that_are_measured_to_do(
    tokenizer: VisualTokenizer, images: torch.Tensor, quality: object
) -> None:
    pixels = tokenizer.preprocess(images)
    target = Target.of(quality)
    measure = RateControl(tokenizer, tokenizer.features(pixels), pixels).measure(target)
    curve = torch.stack([measure(torch.full((5,), count)) for count in range(1, 17)], 1)
    codes = tokenizer.encode(images, quality=quality)
    found = curve.gather(1, codes.lengths[:, None] - 1)[:, 0]
    assert torch.allclose(codes.predicted_error.float(), found, atol=1e-5)
    reachable = (curve <= target.error).any(1)
    assert bool(((found <= target.error) | (codes.lengths == 16)).all())
    assert bool((found[reachable] <= target.error + 1e-6).all()) or not bool(reachable.all())


def test_verify_refuses_what_all_codes_do_not_reach(
    tokenizer: VisualTokenizer, images: torch.Tensor
) -> None:
    message = r"image 0 reached a centered cosine of .* with all 16 codes, expected 0.99"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images, quality=0.99, verify=True)
    with pytest.raises(ValueError, match=r"reached .* dB with all 3 codes"):
        tokenizer.encode(images, quality=("psnr", 60), verify=True, max_codes=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 3, "quality": 0.5}, "one of budget, quality and rate"),
        ({"quality": 1.5}, "between 0 and 1"),
        ({"quality": ("ssim", 0.5)}, "psnr"),
        ({"quality": True}, "quality"),
        ({"rate": -1.0}, "rate: expected a number in 0..inf, got -1.0"),
        ({"rate": float("nan")}, "rate: expected a number in 0..inf, got nan"),
        ({"verify": True}, "verify"),
        ({"min_codes": 5, "max_codes": 4}, "min_codes <= max_codes"),
        ({"budget": 1.5}, "fraction must be at most 1"),
    ],
)
def test_bad_requests(
    tokenizer: VisualTokenizer, images: torch.Tensor, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images, **arguments)


def test_without_error_heads(images: torch.Tensor) -> None:
    plain = build(error_hidden=0)
    assert plain.encode(images, budget=4).lengths.tolist() == [4] * 5
    with pytest.raises(ValueError, match="verify=True"):
        plain.encode(images, quality=0.5)
    assert plain.encode(images, quality=("psnr", 1.0), verify=True).lengths.max() <= 16


def test_selected_codes_with_quality(tiny_tokenizer: VisualTokenizer, photos: list[Path]) -> None:
    """A tokenizer without an error head, as released LaVIT is, measures where it is told to
    verify."""
    with pytest.raises(ValueError, match="verify=True"):
        tiny_tokenizer.encode(photos, quality=0.5)
    with pytest.raises(CodeError, match="only nested codes"):
        tiny_tokenizer.encode(photos).truncate(1)
    limited = tiny_tokenizer.encode(photos, max_codes=2)
    assert int(limited.lengths.max()) <= 2


def test_reconstruction_reads_counts_and_colors(
    tokenizer: VisualTokenizer, images: torch.Tensor
) -> None:
    codes = tokenizer.encode(images, budget=16)
    found = tokenizer.reconstruct_patches(codes)
    assert found.features.shape == (5, 16, 24) and found.colors.shape == (5, 16, 48)
    assert torch.equal(found.features, tokenizer.reconstruct_features(codes))
    mixed = codes.truncate([1, 2, 3, 4, 16])
    alone = tokenizer.reconstruct_patches(mixed.take([2]))
    assert torch.allclose(
        tokenizer.reconstruct_patches(mixed).features[2], alone.features[0], atol=1e-5
    )


def test_saving_and_loading(
    tokenizer: VisualTokenizer, images: torch.Tensor, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = VisualTokenizer.from_pretrained(tmp_path)
    assert loaded.config == tokenizer.config
    codes, again = tokenizer.encode(images), loaded.encode(images)
    assert torch.equal(codes.values, again.values) and torch.equal(codes.lengths, again.lengths)


def test_codes_travel_with_their_error(tokenizer: VisualTokenizer, images: torch.Tensor) -> None:
    codes = tokenizer.encode(images)
    joined = VisualCodes.cat([codes.take([0, 1]), codes.take([2, 3, 4])])
    assert torch.equal(joined.predicted_error, codes.predicted_error) and joined.nested
    assert codes.to("cpu").nested
    with pytest.raises(CodeError, match="one number for each of 5"):
        VisualCodes(codes.values, codes.lengths, predicted_error=torch.zeros(2))
    with pytest.raises(CodeError, match="at least 1 code"):
        codes.truncate(0)


def test_configurations_that_cannot_be(images: torch.Tensor) -> None:
    for changes in (
        {"sequence": "other"},
        {"price": -1.0},
        {"attention": "compat"},
        {"continuous_width": 8},
        {"patch_dim": 0},
        {"patch_dim": 24 + 3 * 16 + 1},
    ):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            TokenizerConfig.from_dict({**SETTINGS, **changes})
    for changes in ({"color_cells": 4}, {"patch_dim": 4}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))}: expected 0, unless"):
            TokenizerConfig(**changes)
    encoder = {**SETTINGS["encoder"], "image_size": 24}
    with pytest.raises(ConfigError, match="power of two of patches per side"):
        TokenizerConfig.from_dict({**SETTINGS, "encoder": encoder})
    with pytest.raises(ConfigError, match="sources"):
        JoinedConfig(sources=(9,))
    assert Request().max_codes is None


def test_a_decoder_is_conditioned_on_features_and_colors(
    tokenizer: VisualTokenizer, images: torch.Tensor
) -> None:
    from lavit_tok.decode.conditioner import Conditioner

    conditioner = Conditioner.for_tokenizer(
        tokenizer.config,
        tokenizer.quantizer.codebook,
        tokenizer.reconstructor,
        cross_dims=(8,),
        feature_norm=True,
    )
    codes = tokenizer.encode(images)
    found = tokenizer.reconstruct_patches(codes)
    expected = torch.cat([found.features, 2 * found.colors - 1], -1)
    with torch.no_grad():
        assert torch.equal(conditioner.features(codes), expected)
        assert conditioner(codes).tokens.shape == (5, 16, 8)


def test_codes_do_not_depend_on_the_precision_around_the_call(
    tokenizer: VisualTokenizer, images: torch.Tensor
) -> None:
    def results() -> tuple[torch.Tensor, torch.Tensor]:
        codes = tokenizer.encode(images, quality=0.3)
        return codes.values, tokenizer.reconstruct_features(codes)

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, expected, found)) and all(map(torch.equal, expected, again))


def test_shards_know_the_weights_of_the_error_heads() -> None:
    from lavit_tok.data.tokenize_batch import weights_digest

    one, same, other = build(), build(), build()
    with torch.no_grad():
        other.error_heads["cosine"].mlp[-1].bias += 1
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)

"""The nested order and its layers: the drawings, prefixes, and independence of later codes and of
other patches."""

from __future__ import annotations

import math

import pytest
import torch

from lavit_tok.decode.nested_reconstructor import NestedReconstructor
from lavit_tok.encode.nested_merger import NestedMerger
from lavit_tok.nn.nested_order import merge_bias, nested_order, read_bias


def test_the_drawn_order():
    drawn = [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]
    assert nested_order(16).rank.view(4, 4).tolist() == drawn
    assert nested_order(16).level.tolist() == [0, 1, 1, 1] + 12 * [2]
    assert nested_order(16).center[:4].tolist() == [[1.5, 1.5], [2.5, 2.5], [0.5, 2.5], [2.5, 0.5]]


@pytest.mark.parametrize("side", [1, 2, 3, 8, 12])
def test_every_beginning_is_an_even_cover(side):
    order = nested_order(side * side)
    assert sorted(order.patch.tolist()) == list(range(side * side))
    assert torch.equal(order.patch[order.rank], torch.arange(side * side))
    whole = 2 ** math.ceil(math.log2(side)) if side > 1 else 1
    for level in range(int(order.level.max()) + 1):
        cell = whole // 2**level
        kept = order.patch[order.level <= level]
        corners = {(int(p) // side // cell, int(p) % side // cell) for p in kept}
        assert (
            len(corners) == len(kept) == math.ceil(side / cell) ** 2
        )  # one code in each cell of the level


def test_no_square_is_refused():
    with pytest.raises(ValueError, match="square number of patches, got 12"):
        nested_order(12)


def test_biases_forbid_what_is_drawn_and_fall_with_the_distance():
    bias = merge_bias(4, 2)
    allowed = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]]
    assert nested_order(4).rank.tolist() == [0, 2, 3, 1]
    assert bias[0].isfinite().int().tolist() == bias[1].isfinite().int().tolist() == allowed
    assert bool((bias <= 0).all())
    read = read_bias(16, 4)
    assert read.shape == (4, 16, 16)
    assert bool(read.isfinite().all())
    own = torch.arange(16), nested_order(16).rank
    assert torch.equal(
        read[1].argmax(1)[4:5], own[1][4:5]
    )  # in a head that likes fine codes a patch finds its own


def layers(patches: int = 16):
    torch.manual_seed(0)
    merger = NestedMerger(24, patches, depth=2, heads=3, mlp_width=32).eval()
    reconstructor = NestedReconstructor(
        24, patches, code_dim=6, depth=2, heads=3, mlp_width=32, colors=12
    ).eval()
    return merger, reconstructor


@torch.no_grad()
def test_fewer_codes_are_the_beginning_of_more():
    merger, _ = layers()
    features = torch.randn(2, 16, 24)
    whole = merger(features, 16)
    for count in (1, 3, 16):
        assert torch.allclose(merger(features, count), whole[:, :count], atol=1e-5)


@torch.no_grad()
def test_the_first_code_absorbs_every_patch_and_the_last_its_own_and_earlier_codes():
    merger, _ = layers()
    features = torch.randn(1, 16, 24, dtype=torch.float32)
    last = nested_order(16).patch[-1]
    changed = features.clone()
    changed[0, last] = torch.randn(24)
    assert not torch.allclose(
        merger(features, 16)[0, 0], merger(changed, 16)[0, 0], atol=1e-4
    )  # code 0 absorbs all


@torch.no_grad()
def test_codes_beyond_a_length_and_other_patches_change_nothing():
    _, reconstructor = layers()
    vectors, lengths = torch.randn(3, 10, 6), torch.tensor([1, 4, 10])
    whole = reconstructor(vectors, lengths)
    noisy = vectors.clone()
    noisy[0, 1:] = 7.0
    noisy[1, 4:] = -7.0
    assert torch.allclose(reconstructor(noisy, lengths).features, whole.features, atol=1e-5)
    alone = reconstructor(vectors[1:2, :4], lengths[1:2])
    assert torch.allclose(alone.colors, whole.colors[1:2], atol=1e-5)
    some = reconstructor(vectors, lengths, subset=torch.tensor([5, 2]))
    assert torch.allclose(some.features, whole.features[:, [5, 2]], atol=1e-5)
    assert torch.allclose(some.colors, whole.colors[:, [5, 2]], atol=1e-5)
    assert not torch.allclose(
        reconstructor(vectors, lengths.clamp(max=3)).features, whole.features, atol=1e-3
    )

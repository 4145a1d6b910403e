"""The cache that writes in place: the same keys and values as transformers' own, in memory that is taken once."""

from __future__ import annotations

import pytest
import torch
from lm_parts import lexicon_and_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lavit_lm.cache import RoomyLayer, roomy_cache

B, HEADS, D = 3, 2, 4


def states(places: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, B, HEADS, places, D, generator=generator)
    return keys, values


@pytest.mark.parametrize("room", [1, 3, 5, 7, 20], ids=lambda room: f"room {room}")
def test_it_holds_what_a_growing_cache_holds(room: int):
    """Three places, then four more one by one, the rows in another order in between: as DynamicLayer has them."""
    generator = torch.Generator().manual_seed(0)
    ours, plain = RoomyLayer(room), DynamicLayer()
    for step, places in enumerate([3, 1, 1, 1, 1]):
        new = states(places, generator)
        for a, b in zip(ours.update(*new), plain.update(*new), strict=True):
            assert torch.equal(a, b)
        assert ours.get_seq_length() == plain.get_seq_length() == 3 + step
        assert ours.get_mask_sizes(1) == plain.get_mask_sizes(1)
        if step == 2:
            for layer in (ours, plain):
                layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)


def test_memory_is_taken_once():
    generator = torch.Generator().manual_seed(0)
    layer = RoomyLayer(7)
    layer.update(*states(3, generator))
    first = [held.data_ptr() for held in layer.held]
    for _ in range(4):
        keys, _ = layer.update(*states(1, generator))
        assert keys.data_ptr() == first[0], "a view of the same memory"
    assert [held.data_ptr() for held in layer.held] == first
    layer.update(*states(1, generator))
    assert layer.held[0].shape[-2] == 16 and layer.get_seq_length() == 8


def test_a_model_reads_it_as_its_own():
    _, model = lexicon_and_model("llama")
    causal = model.causal.eval()
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    plain, ours = DynamicCache(config=causal.config), roomy_cache(causal.config, 6)
    with torch.no_grad():
        for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:6], ids[:, 6:7], ids[:, 7:]):  # the last ones need more room
            a, b = (causal(part, past_key_values=cache).logits for cache in (plain, ours))
            torch.testing.assert_close(a, b)


def test_layers_of_a_window_stay():
    _, model = lexicon_and_model("mistral")
    config = model.causal.config
    config.sliding_window = 4
    layers = roomy_cache(config, 8).layers
    assert layers and all(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
    config.sliding_window = None
    assert all(isinstance(layer, RoomyLayer) for layer in roomy_cache(config, 8).layers)

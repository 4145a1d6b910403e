"""Keys and values of what has been said, in memory that is taken once.

    room for 3 places and 4 that may come     k1 k2 k3  .  .  .  .      read
                                              k1 k2 k3 k4  .  .  .      one more: written in place
    what the model sees                       k1 k2 k3 k4               a view, nothing is copied

`transformers`' DynamicCache copies all keys and values of all layers for every new place: with 64 rows on a CPU that is
more than half of a step, most of it the system's handing out fresh pages. Its StaticCache takes the room at once, too,
but every step attends over all of it, and masks must be as wide.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A DynamicLayer that writes in place.

    Args:
        room: places for which memory is taken at first; where more come, it is doubled.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.held: list[Tensor] = []

    def update(
        self,
        key_states: Float[Tensor, "b heads new d"],
        value_states: Float[Tensor, "b heads new e"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "b heads l d"], Float[Tensor, "b heads l e"]]:
        """Keys and values of all places so far, these the last ones."""
        start, new = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.held or end > self.held[0].shape[-2]:
            self.room = max(self.room, end if not self.held else 2 * end)
            grown = [states.new_empty(*states.shape[:-2], self.room, states.shape[-1]) for states in new]
            for old, larger in zip(self.held, grown, strict=False):
                larger[..., :start, :] = old[..., :start, :]
            self.held = grown
        for held, states in zip(self.held, new, strict=True):
            held[..., start:end, :] = states
        self.keys, self.values = (held[..., :end, :] for held in self.held)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Int64[Tensor, " b"]) -> None:
        """Go on with these rows, some more than once."""
        length = self.get_seq_length()
        if length:
            self.held = [held.index_select(0, beam_idx.to(held.device)) for held in self.held]
            self.keys, self.values = (held[..., :length, :] for held in self.held)


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """A model's cache with RoomyLayers where it would have plain ones; layers of a window stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

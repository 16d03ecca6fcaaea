"""The key-value cache of a prefilled batch with room for the tokens to come, so that a step writes one token instead of copying all.

Open this file to change how a cache is copied for several answers to a prompt, or shrinks to the answers that are not finished.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """`DynamicLayer` whose keys and values are views of buffers [rows, heads, length + room, size]."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.lazy_initialization(keys, values)
        self._buffers = tuple(part.new_empty(*part.shape[:2], part.shape[2] + room, part.shape[3]) for part in (keys, values))
        self._length = 0
        self.update(keys, values)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self._length = length
        self.keys, self.values = shown = self._buffers[0][:, :, :length], self._buffers[1][:, :, :length]
        return shown

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write states [rows, heads, new tokens, size] behind the others; returns all keys and all values."""
        start, end = self._length, self._length + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        return self._show(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        self._buffers = tuple(buffer.index_select(0, beam_idx.to(buffer.device)) for buffer in self._buffers)
        self._show(self._length)


def is_plain(cache: Any) -> bool:
    """Whether every layer keeps the keys and values of all tokens, and nothing else."""
    return isinstance(cache, DynamicCache) and all(type(layer) in (DynamicLayer, RoomyLayer) for layer in cache.layers)


def spread(cache: Any, rows: Tensor, room: int) -> None:
    """Make the rows of a cache `rows` [new rows] of what it has, with room for `room` more tokens."""
    if not is_plain(cache):
        cache.reorder_cache(rows)
        return
    for number, layer in enumerate(cache.layers):
        keys, values = (part.index_select(0, rows.to(part.device)) for part in (layer.keys, layer.values))
        cache.layers[number] = RoomyLayer(keys, values, room)

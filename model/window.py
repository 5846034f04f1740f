"""How far a layer's tokens look back: the one place that decides it, for training and for caches.

All of it is in positions, a token's depth in its own text: never in columns of a padded row, nor in
places of a pack. A window layer's cache is a ring: the text's first `sinks` positions have slots of
their own, and position p beyond them has slot sinks + (p − sinks) mod (slots − sinks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import WINDOW, ModelConfig

SPARE = 8  # tokens that can be taken back from a ring, as a refused draft is
ROUND_SLOTS = 8
NOTHING = -(2**40)  # the position of a slot that holds nothing


@dataclass(frozen=True)
class Reach:
    """A token sees the `window` positions that end in its own (None: all of them), and the first
    `sinks` of its text."""

    window: int | None = None
    sinks: int = 0

    def until(self, key: Tensor) -> Tensor:
        """The first query position that no longer sees each key."""
        never = torch.iinfo(key.dtype).max
        if self.window is None:
            return torch.full_like(key, never)
        return torch.where(key < self.sinks, never, key + self.window)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """True where a key at or before the query is within reach; positions, broadcast."""
        return query < self.until(key)

    def covers(self, tokens: int) -> bool:
        """True where texts of this many tokens are within reach as a whole."""
        return self.window is None or self.window >= tokens

    def causal(self, query: Tensor, key: Tensor) -> Tensor:
        """True where a query sees a key of its own text. Negative positions are padding, which sees
        itself (no softmax is empty) and is seen by nothing else."""
        return (query == key) | ((key >= 0) & (key <= query) & self.sees(query, key))

    def slots(self, columns: int) -> int:
        """Columns that a cache needs for texts of up to `columns` tokens."""
        if self.window is None:
            return columns
        ring = self.window + self.sinks + SPARE
        return min(columns, -(-ring // ROUND_SLOTS) * ROUND_SLOTS)

    def slot_of(self, position: Tensor, slots: int) -> Tensor:
        """Where a cache of `slots` columns keeps these positions (≥ 0)."""
        if self.window is None or slots <= self.sinks:
            return position
        ring = self.sinks + (position - self.sinks) % (slots - self.sinks)
        return torch.where(position < self.sinks, position, ring)

    def held(self, last_B: Tensor, slots: int) -> Tensor:
        """(B, S): the position that each slot holds when `last_B` (−1: none) is the latest one
        written; `NOTHING` in slots not yet used."""
        slot_S = torch.arange(slots, device=last_B.device)
        last_B1 = last_B[:, None]
        held_BS = slot_S.expand(len(last_B), slots)
        if self.window is not None and slots > self.sinks:
            turned_BS = last_B1 - (last_B1 - slot_S) % (slots - self.sinks)
            held_BS = torch.where(slot_S < self.sinks, slot_S, turned_BS)
            # Before the ring's first turn is over, a slot's latest position would be a sink's or
            # none at all.
            held_BS = torch.where(held_BS < slot_S, NOTHING, held_BS)
        return torch.where(held_BS <= last_B1, held_BS, NOTHING)

    def stays(self, position: Tensor, last: Tensor, slots: int) -> Tensor:
        """True where a position is still held once `last` (≥ it) has been written."""
        if self.window is None or slots <= self.sinks:
            return torch.ones_like(position - last, dtype=torch.bool)
        return (position < self.sinks) | (last - position < slots - self.sinks)


EVERYTHING = Reach()


def reach_of(config: ModelConfig, layer: int) -> Reach:
    """Of one layer."""
    window = config.window_of(layer)
    return EVERYTHING if window is None else Reach(window, config.num_sink_tokens)


def has_windows(config: ModelConfig) -> bool:
    """True where a layer does not see everything."""
    return WINDOW in config.attn_type_list


def cache_bytes(config: ModelConfig, columns: int, itemsize: int) -> int:
    """Bytes that one row's keys and values of `columns` tokens take in all layers together."""
    layers = range(config.num_hidden_layers)
    kept = sum(reach_of(config, layer).slots(columns) for layer in layers)
    return kept * 2 * config.key_value_size * itemsize

"""Keys and values of prompts that were read lately, for prompts that begin alike.

Tokens are kept in blocks of `BLOCK`. A block is known by its own ids and by the block before it, so
a hit is a hit on all the text to its left: exact, without hashes that could collide. Dropped first
is what was used longest ago, and of one text the end before the beginning.

Shapes: N blocks, L layers, K key heads, S columns, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig

BLOCK = 16

Key = tuple[int, tuple[int, ...]]
"""The number of the block before (0 at the start) and this block's ids."""


class PrefixCache:
    """At most `tokens` tokens (rounded down to whole blocks), in memory that is taken once."""

    def __init__(
        self, config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        heads = (config.num_key_value_heads, BLOCK, config.head_dim)
        shape = (tokens // BLOCK, config.num_hidden_layers, 2, *heads)
        # Uninitialised: the system gives memory only as blocks are filled.
        self._pool = torch.empty(shape, device=device, dtype=dtype)
        self.clear()

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._blocks)

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._blocks: OrderedDict[Key, tuple[int, int]] = OrderedDict()  # to number, place in pool
        self._free = list(range(len(self._pool)))
        self._next = 1

    def find(self, ids: Sequence[int]) -> list[Key]:
        """The longest run of held blocks that `ids` begins with. What it finds counts as used."""
        found: list[Key] = []
        before = 0
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            key = (before, tuple(ids[start : start + BLOCK]))
            if key not in self._blocks:
                break
            before = self._blocks[key][0]
            found.append(key)
        self._use(found)
        return found

    def next_key(self, ids: Sequence[int], found: Sequence[Key]) -> Key | None:
        """The first block that `find` did not find; None if `ids` end before it is whole."""
        start = len(found) * BLOCK
        if start + BLOCK > len(ids):
            return None
        before = self._blocks[found[-1]][0] if found else 0
        return before, tuple(ids[start : start + BLOCK])

    def read(self, found: Sequence[Key]) -> Tensor:
        """Keys and values (L, 2, K, S, D) of the blocks that `find` gave."""
        place_N = torch.tensor([self._blocks[key][1] for key in found], device=self._pool.device)
        blocks = self._pool.index_select(0, place_N)  # (N, L, 2, K, BLOCK, D)
        return blocks.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)

    def put(self, ids: Sequence[int], data: Tensor) -> None:
        """Keep the whole blocks of `ids`, whose keys and values are `data` (L, 2, K, S, D)."""
        found = self.find(ids[: len(self._pool) * BLOCK])
        held = len(found)
        places: list[int] = []
        while (key := self.next_key(ids, found)) and len(found) < len(self._pool):
            if not self._free:  # the oldest is none of `found`: those were used just now
                _, (_, place) = self._blocks.popitem(last=False)
                self._free.append(place)
            places.append(self._free.pop())
            self._blocks[key] = (self._next, places[-1])
            self._next += 1
            found.append(key)
        self._use(found)
        if places:
            new = data[:, :, :, held * BLOCK : (held + len(places)) * BLOCK]
            layers, two, heads, _, size = new.shape
            new = new.reshape(layers, two, heads, len(places), BLOCK, size)
            new = new.permute(3, 0, 1, 2, 4, 5)
            self._pool[torch.tensor(places, device=self._pool.device)] = new

    def _use(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)

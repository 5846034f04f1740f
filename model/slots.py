"""Keys and values of rows that come and go: each row fills its own columns from the left, and its
own ring in window layers.

Shapes: L layers, B rows, K key heads, S columns, D head size, M tokens, T tokens of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.attention import scaled_attention
from model.cache import LayerStore, RingAppend, ring_step
from model.config import ModelConfig
from model.native.memory import prefer_large_pages
from model.window import EVERYTHING, Reach

ROUND_ROWS = 8
ROUND_COLUMNS = 128


class SlotCache:
    """Keys and values of B rows; rows beyond those in use are free. `data` (L, 2, B, K, S, D) holds
    those of the layers that see everything; window layers have rings beside it.

    Columns that a row has not filled hold finite numbers and are hidden by masks.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._context = config, config.max_position_embeddings
        self._store = self._make(0, 0, device, dtype)

    @property
    def data(self) -> Tensor:
        return self._store.data

    @property
    def rows(self) -> int:
        return self.data.shape[2]

    @property
    def columns(self) -> int:
        return self.data.shape[4]

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self._store.nbytes

    def of(self, layer: int) -> Tensor:
        """Keys and values (2, B, K, S, D) of one layer."""
        return self._store.of(layer)

    def reach(self, layer: int) -> Reach:
        """Of one layer."""
        return self._store.reach_L[layer]

    def rounded(self, rows: int, columns: int) -> tuple[int, int]:
        """The size that holds this many, in steps, so that growing is rare."""
        return (
            -(-rows // ROUND_ROWS) * ROUND_ROWS,
            min(-(-columns // ROUND_COLUMNS) * ROUND_COLUMNS, self._context),
        )

    def fit(self, rows: int, columns: int, kept: int, filled: int) -> bool:
        """Make room; the first `kept` rows keep their first `filled` columns. True if it moved."""
        if rows <= self.rows and columns <= self.columns:
            return False
        old = self._store
        self._store = self._make(*self.rounded(rows, columns), old.data.device, old.data.dtype)
        # A ring that still grows has not made its first turn: its slots are columns.
        for new, was in ((self.data, old.data), (self._store.rings, old.rings)):
            used = min(filled, was.shape[4])
            new[:, :, :kept, :, :used] = was[:, :, :kept, :, :used]
        return True

    def clear(self) -> None:
        """Give the memory back."""
        self._store = self._make(0, 0, self.data.device, self.data.dtype)

    def move(self, source: int, target: int, filled: int) -> None:
        """Row `target` becomes row `source`, of which `filled` columns are in use."""
        for part in (self.data, self._store.rings):
            part[:, :, target, :, :filled] = part[:, :, source, :, :filled]

    def _make(
        self, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> LayerStore:
        store = LayerStore(self._config, rows, columns, device, dtype)
        prefer_large_pages(store.data)
        return store


class SlotAttend:
    """One new token for each of the first B rows, at column `column_B`; it sees its row up to
    itself. `seen` columns are looked at, the same for all."""

    def __init__(self, cache: SlotCache, column_B: Tensor, seen: int) -> None:
        self.batch = len(column_B)
        self.cache, self.column_M, self.seen = cache, column_B, seen
        self.first_M: Tensor | None = None  # rows begin in column 0
        self.row_M = torch.arange(self.batch, device=column_B.device)
        self._views: dict[Reach, _View] = {}

    @property
    def mask_BS(self) -> Tensor:
        """0 where a row may look in layers that see everything, −∞ elsewhere."""
        return self._view(EVERYTHING, self.seen).mask_BS

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        keys, values = self.cache.of(layer)[:, : self.batch].unbind(0)
        view = self._view(self.cache.reach(layer), keys.shape[2])
        keys[self.row_M, :, view.place_M] = k_MKD
        values[self.row_M, :, view.place_M] = v_MKD
        # The query heads that share a key head stand in for its queries: no key is copied.
        q_BKGD = q_MND.reshape(len(q_MND), k_MKD.shape[1], -1, q_MND.shape[-1])
        seen = view.mask_BS.shape[1]
        seen_k, seen_v = keys[:, :, :seen], values[:, :, :seen]
        if q_BKGD.device.type == "cpu":
            # Two products over all rows cost less there than the fused kernel at one query a row.
            q_bGD, k_bSD, v_bSD = q_BKGD.flatten(0, 1), seen_k.flatten(0, 1), seen_v.flatten(0, 1)
            scale = q_bGD.shape[-1] ** -0.5
            score_bGS = torch.baddbmm(view.mask_b1S, q_bGD, k_bSD.transpose(1, 2), alpha=scale)
            return torch.bmm(score_bGS.softmax(-1), v_bSD).view(len(q_MND), -1)
        mask_B11S = view.mask_BS[:, None, None]
        return scaled_attention(q_BKGD, seen_k, seen_v, mask_B11S, causal=False).flatten(1)

    def _view(self, reach: Reach, slots: int) -> _View:
        if reach not in self._views:
            column_B = self.column_M
            if reach.window is None:
                place_B = column_B
                seen_BS = torch.arange(self.seen, device=column_B.device) <= column_B[:, None]
            else:
                place_B, seen_BS = ring_step(reach, column_B, slots)
            data = self.cache.data
            mask_BS = torch.zeros(seen_BS.shape, device=column_B.device, dtype=data.dtype)
            mask_BS.masked_fill_(~seen_BS, -torch.inf)
            mask_b1S = mask_BS.repeat_interleave(data.shape[3], dim=0)[:, None]
            self._views[reach] = _View(place_B, mask_BS, mask_b1S)
        return self._views[reach]


@dataclass(frozen=True)
class _View:
    """Where a kind of layer keeps the new tokens and what it looks at: 0 where a row may look, −∞
    elsewhere, and the same for every key head."""

    place_M: Tensor
    mask_BS: Tensor
    mask_b1S: Tensor


class JoinAttend:
    """New tokens of several rows, one row after the other, behind what each row holds already.

    Row `first + r` gets `counts[r]` tokens from column `starts[r]` on. Only attention is done row
    by row; everything else sees all tokens at once, without padding.
    """

    def __init__(
        self, cache: SlotCache, first: int, starts: Sequence[int], counts: Sequence[int]
    ) -> None:
        device = cache.data.device
        self.cache, self.first = cache, first
        self.starts, self.counts = starts, counts
        self.first_M: Tensor | None = None
        self._appends: list[RingAppend] = []
        rows = torch.arange(first, first + len(counts), device=device)
        self.row_M = rows.repeat_interleave(torch.tensor(counts, device=device))
        self.column_M = torch.cat(
            [torch.arange(s, s + n, device=device) for s, n in zip(starts, counts, strict=True)]
        )

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """What each row's new tokens see; None for all, or a plain causal mask."""
        return [
            _behind(start, count, self.column_M.device) if start and count > 1 else None
            for start, count in zip(self.starts, self.counts, strict=True)
        ]

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        keys, values = self.cache.of(layer).unbind(0)
        reach = self.cache.reach(layer)
        if reach.window is not None:
            return self._in_rings(reach, q_MND, k_MKD, v_MKD, keys, values)
        keys[self.row_M, :, self.column_M] = k_MKD
        values[self.row_M, :, self.column_M] = v_MKD
        parts = []
        for r, q_TND in enumerate(torch.split(q_MND, list(self.counts))):
            row, end = self.first + r, self.starts[r] + self.counts[r]
            out_1NTD = scaled_attention(
                q_TND.transpose(0, 1)[None],
                keys[row : row + 1, :, :end],
                values[row : row + 1, :, :end],
                self.masks[r],
                causal=self.starts[r] == 0 and self.counts[r] > 1,
            )
            parts.append(out_1NTD[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)

    def _in_rings(
        self, reach: Reach, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor, *stores: Tensor
    ) -> Tensor:
        if not self._appends:
            starts_R = torch.tensor(self.starts, device=q_MND.device)
            slots = stores[0].shape[2]
            self._appends = [
                RingAppend(reach, start_1, count, slots, alike=True)
                for start_1, count in zip(torch.split(starts_R, 1), self.counts, strict=True)
            ]
        parts = []
        each = (torch.split(x, list(self.counts)) for x in (q_MND, k_MKD, v_MKD))
        for r, new in enumerate(zip(*each, strict=True)):
            row = slice(self.first + r, self.first + r + 1)
            q, k, v = (x_TND.transpose(0, 1)[None] for x_TND in new)
            out_1NTD = self._appends[r](q, k, v, *(store[row] for store in stores))
            parts.append(out_1NTD[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)


def _behind(start: int, count: int, device: torch.device) -> Tensor:
    """True (T, S) where the last `count` of start + count columns may look."""
    seen_TS = torch.ones(count, start + count, dtype=torch.bool, device=device)
    return seen_TS.tril_(start)

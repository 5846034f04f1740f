"""Keys and values of rows that come and go: each row fills its own columns from the left.

Shapes: L layers, B rows, K key heads, S columns, D head size, M tokens, T tokens of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from model.attention import scaled_attention
from model.config import ModelConfig
from model.native.memory import prefer_large_pages

ROUND_ROWS = 8
ROUND_COLUMNS = 128


class SlotCache:
    """`data` (L, 2, B, K, S, D): keys and values of B rows; rows beyond those in use are free.

    Columns that a row has not filled hold finite numbers and are hidden by masks.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._shape = (config.num_hidden_layers, 2), (config.num_key_value_heads, config.head_dim)
        self._context = config.max_position_embeddings
        self.data = self._make(0, 0, device, dtype)

    @property
    def rows(self) -> int:
        return self.data.shape[2]

    @property
    def columns(self) -> int:
        return self.data.shape[4]

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
        old = self.data
        self.data = self._make(*self.rounded(rows, columns), old.device, old.dtype)
        self.data[:, :, :kept, :, :filled] = old[:, :, :kept, :, :filled]
        return True

    def clear(self) -> None:
        """Give the memory back."""
        self.data = self._make(0, 0, self.data.device, self.data.dtype)

    def move(self, source: int, target: int, filled: int) -> None:
        """Row `target` becomes row `source`, of which `filled` columns are in use."""
        self.data[:, :, target, :, :filled] = self.data[:, :, source, :, :filled]

    def _make(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        (layers, two), (heads, size) = self._shape
        shape = (layers, two, rows, heads, columns, size)
        data = torch.zeros(shape, device=device, dtype=dtype)
        prefer_large_pages(data)
        return data


class SlotAttend:
    """One new token for each of the first B rows, at column `column_B`; it sees its row up to
    itself. `seen` columns are looked at, the same for all."""

    def __init__(self, cache: SlotCache, column_B: Tensor, seen: int) -> None:
        batch = len(column_B)
        self.cache, self.column_M, self.seen = cache, column_B, seen
        self.data = cache.data[:, :, :batch]
        self.first_M: Tensor | None = None  # rows begin in column 0
        self.row_M = torch.arange(batch, device=column_B.device)

    @cached_property
    def mask_BS(self) -> Tensor:
        """0 where a row may look, −∞ elsewhere."""
        column_B = self.column_M
        hidden_BS = torch.arange(self.seen, device=column_B.device) > column_B[:, None]
        mask_BS = torch.zeros(hidden_BS.shape, device=column_B.device, dtype=self.data.dtype)
        return mask_BS.masked_fill_(hidden_BS, -torch.inf)

    @cached_property
    def mask_b1S(self) -> Tensor:
        """The same for every key head."""
        return self.mask_BS.repeat_interleave(self.data.shape[3], dim=0)[:, None]

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        keys, values = self.data[layer].unbind(0)
        keys[self.row_M, :, self.column_M] = k_MKD
        values[self.row_M, :, self.column_M] = v_MKD
        # The query heads that share a key head stand in for its queries: no key is copied.
        q_BKGD = q_MND.reshape(len(q_MND), k_MKD.shape[1], -1, q_MND.shape[-1])
        seen_k, seen_v = keys[:, :, : self.seen], values[:, :, : self.seen]
        if q_BKGD.device.type == "cpu":
            # Two products over all rows cost less there than the fused kernel at one query a row.
            q_bGD, k_bSD, v_bSD = q_BKGD.flatten(0, 1), seen_k.flatten(0, 1), seen_v.flatten(0, 1)
            scale = q_bGD.shape[-1] ** -0.5
            score_bGS = torch.baddbmm(self.mask_b1S, q_bGD, k_bSD.transpose(1, 2), alpha=scale)
            return torch.bmm(score_bGS.softmax(-1), v_bSD).view(len(q_MND), -1)
        mask_B11S = self.mask_BS[:, None, None]
        return scaled_attention(q_BKGD, seen_k, seen_v, mask_B11S, causal=False).flatten(1)


class JoinAttend:
    """New tokens of several rows, one row after the other, behind what each row holds already.

    Row `first + r` gets `counts[r]` tokens from column `starts[r]` on. Only attention is done row
    by row; everything else sees all tokens at once, without padding.
    """

    def __init__(
        self, cache: SlotCache, first: int, starts: Sequence[int], counts: Sequence[int]
    ) -> None:
        device = cache.data.device
        self.cache, self.data, self.first = cache, cache.data, first
        self.starts, self.counts = starts, counts
        self.first_M: Tensor | None = None
        rows = torch.arange(first, first + len(counts), device=device)
        self.row_M = rows.repeat_interleave(torch.tensor(counts, device=device))
        self.column_M = torch.cat(
            [torch.arange(s, s + n, device=device) for s, n in zip(starts, counts, strict=True)]
        )

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """What each row's new tokens see; None for all, or a plain causal mask."""
        return [
            _behind(start, count, self.data.device) if start and count > 1 else None
            for start, count in zip(self.starts, self.counts, strict=True)
        ]

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        keys, values = self.data[layer].unbind(0)
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


def _behind(start: int, count: int, device: torch.device) -> Tensor:
    """True (T, S) where the last `count` of start + count columns may look."""
    seen_TS = torch.ones(count, start + count, dtype=torch.bool, device=device)
    return seen_TS.tril_(start)

"""Keys and values of rows that advance together, and attention that adds to them.

Layers that see everything keep every column; window layers keep a ring (`window.Reach`), by the
position in the row's own text: padding on the left takes no place in it.

Shapes: L layers, B rows, T new columns, S columns of a cache, N query heads, K key heads, D head
size, M = B·T tokens, n tokens that stay in a ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention import Nearby, left_pad_mask, rows_first, scaled_attention
from model.config import ModelConfig
from model.window import Reach, reach_of


class LayerStore:
    """Memory for keys and values: `data` (layers, 2, B, K, columns, D) of the layers that see
    everything, and `rings` (layers, 2, B, K, slots, D) of the others."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        ring: bool = True,
    ) -> None:
        self.reach_L = [reach_of(config, i) for i in range(config.num_hidden_layers)]
        self._place_L: list[tuple[bool, int]] = []
        counts = [0, 0]
        for reach in self.reach_L:
            near = reach.window is not None
            self._place_L.append((near, counts[near]))
            counts[near] += 1
        slots = min((r.slots(columns) for r in self.reach_L), default=0) if ring else columns
        heads, size = config.num_key_value_heads, config.head_dim
        self.data, self.rings = (
            torch.zeros((count, 2, rows, heads, wide, size), device=device, dtype=dtype)
            for count, wide in zip(counts, (columns, slots), strict=True)
        )

    def of(self, layer: int) -> Tensor:
        """Keys and values (2, B, K, S, D) of one layer."""
        near, place = self._place_L[layer]
        return (self.rings if near else self.data)[place]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.rings.nbytes


class KVCache:
    """Keys and values (B, K, S, D) of every layer, for texts of up to `columns` tokens with their
    padding; `length` columns are filled. Without `ring`, window layers keep every column too.

    `length` may be set back by up to `window.SPARE` columns, to take tokens back.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        ring: bool = True,
    ) -> None:
        self._store = LayerStore(config, batch, columns, device, dtype, ring=ring)
        both = [self._store.of(i).unbind(0) for i in range(config.num_hidden_layers)]
        self.keys, self.values = [k for k, _ in both], [v for _, v in both]
        self.reach_L, self.columns, self.length = self._store.reach_L, columns, 0

    @property
    def data(self) -> Tensor:
        """The common memory (layers, 2, B, K, S, D) of the layers that see everything."""
        return self._store.data

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self._store.nbytes

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (in rising order)."""
        for stack in (self.keys, self.values):
            for i, old in enumerate(stack):
                kept = old[: len(rows)]
                kept[:, :, : self.length] = old[:, :, : self.length].index_select(0, rows)
                stack[i] = kept


class RingAppend:
    """T more tokens a row, from position `first_B` on, in a window layer.

    They see what the ring holds and each other; then it keeps those that later ones may see. Rows
    that are `alike` have the same positions. Negative positions are padding.
    """

    def __init__(
        self, reach: Reach, first_B: Tensor, time: int, slots: int, *, alike: bool
    ) -> None:
        position_BT = first_B[:, None] + torch.arange(time, device=first_B.device)
        some = slice(1) if alike else slice(None)
        query_XT = key_XS = position_BT[some]
        self.fresh = not bool((first_B > 0).any())
        if not self.fresh:
            key_XS = torch.cat([reach.held(first_B[some] - 1, slots), query_XT], dim=1)
        self.nearby = Nearby(reach, query_XT, key_XS)
        stays_BT = (position_BT >= 0) & reach.stays(position_BT, position_BT[:, -1:], slots)
        self.row_n, self.time_n = stays_BT.nonzero(as_tuple=True)
        self.slot_n = reach.slot_of(position_BT[stays_BT], slots)

    def __call__(
        self, q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor
    ) -> Tensor:
        k, v = k_BKTD, v_BKTD
        if not self.fresh:
            k, v = torch.cat([keys_BKSD, k], dim=2), torch.cat([values_BKSD, v], dim=2)
        out_BNTD = self.nearby(q_BNTD, k, v)
        for ring, new in ((keys_BKSD, k_BKTD), (values_BKSD, v_BKTD)):
            ring[self.row_n, :, self.slot_n] = new[self.row_n, :, self.time_n]
        return out_BNTD


class CachedAttend:
    """Append `time` columns to a cache; they look at all of it that their layer reaches, and
    causally among themselves."""

    def __init__(
        self, cache: KVCache, batch: int, time: int, pad_left_B: Tensor | None = None
    ) -> None:
        self.cache, self.shape = cache, (batch, time)
        self.start, self.end = cache.length, cache.length + time
        masked = pad_left_B is not None or (time > 1 and self.start > 0)
        self.alike = pad_left_B is None
        if pad_left_B is None:
            pad_left_B = torch.zeros(batch, dtype=torch.long, device=cache.keys[0].device)
        self.first_B = self.start - pad_left_B
        self.mask_B1TS = left_pad_mask(time, self.end, pad_left_B) if masked else None
        self.causal = not masked and time > 1
        self._append: RingAppend | None = None

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        q, k, v = (rows_first(x, self.shape) for x in (q_MND, k_MKD, v_MKD))
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        reach = self.cache.reach_L[layer]
        if reach.window is not None:
            if self._append is None:
                time, slots = self.shape[1], keys.shape[2]
                self._append = RingAppend(reach, self.first_B, time, slots, alike=self.alike)
            out = self._append(q, k, v, keys, values)
        else:
            keys[:, :, self.start : self.end] = k
            values[:, :, self.start : self.end] = v
            seen_k, seen_v = keys[:, :, : self.end], values[:, :, : self.end]
            out = scaled_attention(q, seen_k, seen_v, self.mask_B1TS, self.causal)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)


class DecodeAttend:
    """Append one column to a cache and let it look at the first `seen` columns, through a mask.

    `column` is a number, or a tensor of one number where a CUDA graph must not fix it. In window
    layers the new tokens' positions `position_B` alone tell what is written and seen where.
    """

    def __init__(
        self,
        cache: KVCache,
        column: int | Tensor,
        seen: int,
        mask_B11S: Tensor | None,
        position_B: Tensor,
    ) -> None:
        self.cache, self.column, self.seen, self.mask_B11S = cache, column, seen, mask_B11S
        self.position_B = position_B
        self._ring: tuple[Tensor, Tensor] | None = None

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        reach, mask_B11S = self.cache.reach_L[layer], self.mask_B11S
        if reach.window is not None:
            if self._ring is None:
                self._ring = ring_step(reach, self.position_B, keys.shape[2])
            slot_B, seen_BS = self._ring
            row_B = torch.arange(len(slot_B), device=slot_B.device)
            keys[row_B, :, slot_B] = k_MKD
            values[row_B, :, slot_B] = v_MKD
            mask_B11S = seen_BS[:, None, None]
        elif isinstance(self.column, int):
            keys[:, :, self.column] = k_MKD
            values[:, :, self.column] = v_MKD
        else:
            keys.index_copy_(2, self.column, k_MKD.unsqueeze(2))
            values.index_copy_(2, self.column, v_MKD.unsqueeze(2))
        # The query heads that share a key head stand in for its queries: no key is copied.
        q_BKGD = q_MND.view(len(q_MND), k_MKD.shape[1], -1, q_MND.shape[-1])
        if reach.window is None:
            keys, values = keys[:, :, : self.seen], values[:, :, : self.seen]
        return scaled_attention(q_BKGD, keys, values, mask_B11S, causal=False).flatten(1)


def ring_step(reach: Reach, position_B: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """One more token a row in a ring: its slot (B), and what it sees once written (B, S)."""
    held_BS = reach.held(position_B, slots)
    return reach.slot_of(position_B, slots), reach.causal(position_B[:, None], held_BS)

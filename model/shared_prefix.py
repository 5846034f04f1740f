"""Rows that begin alike, computed once: one level of prefix merging for training.

The samples of a group share their prompt, and the dialogues of an agent share system prompt and
tools. A token's hidden state depends on nothing to its right, so what rows have in common to the
left needs one computation, and its gradient is the sum over the rows: exact, not an approximation.

Shapes: B rows, T columns, G groups of rows, M tokens computed, P columns of the longest prefix,
C columns of the longest rest; N, K, D as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import (
    Attend,
    CausalAttend,
    PackedAttend,
    pick,
    place,
    rows_first,
    scaled_attention,
)
from model.config import ModelConfig
from model.visible import Visibility, VisibleAttend, row_visibility
from model.window import has_windows, reach_of

# Sharing needs a mask in the attention, so it must save at least this share of the tokens.
WORTHWHILE = 0.125
# A group is searched for among this many neighbours in sorted order.
MOST_ROWS = 64


@dataclass(frozen=True)
class Groups:
    """`group_B[b]` is the group of row b (-1: none); a group's rows share `prefix_G[g]` columns."""

    group_B: tuple[int, ...]
    prefix_G: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that need not be computed again."""
        rows = [g for g in self.group_B if g >= 0]
        return sum(self.prefix_G[g] for g in rows) - sum(self.prefix_G)


def find_groups(ids_BT: Tensor, lengths: Sequence[int]) -> Groups:
    """The groups of rows that save most tokens, found in the sorted rows by dynamic programming.

    Only the first `lengths[b]` columns of row b count.
    """
    table_BT = ids_BT.cpu()
    # Bytes of big-endian numbers sort as the numbers do, and much faster than lists of them.
    wide = table_BT.numpy().astype(">u4")
    rows = [ids_T[:length].tobytes() for ids_T, length in zip(wide, lengths, strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    table_BT = table_BT[order]
    limit = torch.tensor([lengths[b] for b in order])
    differ = table_BT[1:] != table_BT[:-1]
    same = torch.where(differ.any(1), differ.int().argmax(1), table_BT.shape[1])
    common = torch.minimum(same, torch.minimum(limit[1:], limit[:-1])).tolist()

    best, start = [0], [0]  # of the first n rows: tokens saved, and where the last group begins
    for n in range(1, len(order) + 1):
        saved, begin, shared = best[n - 1], n - 1, lengths[order[n - 1]]
        for first in range(n - 2, max(-1, n - 1 - MOST_ROWS), -1):
            shared = min(shared, common[first])
            if shared == 0:
                break
            gain = best[first] + shared * (n - first - 1)
            if gain > saved:
                saved, begin = gain, first
        best.append(saved)
        start.append(begin)

    group = [-1] * len(order)
    prefix: list[int] = []
    end = len(order)
    while end > 0:
        first = start[end]
        if end - first > 1:
            for row in order[first:end]:
                group[row] = len(prefix)
            prefix.append(min(common[first : end - 1]))
        end = first
    return Groups(tuple(group), tuple(prefix))


@dataclass(frozen=True)
class Layout:
    """The tokens to compute: where each stands (row, column), what joins them, and which of them
    stands for each row and column that predicts something (`at_BT`; arbitrary elsewhere)."""

    row_M: Tensor
    column_M: Tensor
    attend: Attend
    at_BT: Tensor


def lay_out(ids_BT: Tensor, lengths_B: Tensor, config: ModelConfig, *, tree: bool) -> Layout:
    """Tokens of right-padded rows without padding, shared prefixes once where that pays.

    A row's last token predicts nothing, so it is left out. A `tree` is laid out by visibility
    (`visible.py`), for CUDA; else rows are padded inside attention.
    """
    batch, time = ids_BT.shape
    device = ids_BT.device
    column_T = torch.arange(time, device=device)
    read_B = (lengths_B - 1).clamp_min(0)
    read_BT = column_T < read_B[:, None]
    groups = find_groups(ids_BT, read_B.tolist())
    if groups.saved < WORTHWHILE * int(read_BT.sum()):
        row_M, column_M = read_BT.nonzero(as_tuple=True)
        longest = int(read_B.max())
        attend: Attend
        even = len(row_M) == batch * longest
        if even and not (tree and has_windows(config)):  # even rows stand as they are
            attend = CausalAttend(config, batch, longest)
        elif tree:
            attend = VisibleAttend(row_visibility(read_B), config)
        else:
            attend = PackedAttend(config, batch, longest, row_M * longest + column_M)
        return Layout(row_M, column_M, attend, _count(read_BT))

    group_B = torch.tensor(groups.group_B, device=device)
    prefix_G = torch.tensor(groups.prefix_G, device=device)
    shared_B = torch.where(group_B >= 0, prefix_G[group_B], 0)
    leader_G = torch.tensor(
        [groups.group_B.index(g) for g in range(len(groups.prefix_G))], device=device
    )
    prefix_GT = column_T < prefix_G[:, None]
    rest_BT = read_BT & (column_T >= shared_B[:, None])
    group_m, prefix_column_m = prefix_GT.nonzero(as_tuple=True)
    row_m, rest_column_m = rest_BT.nonzero(as_tuple=True)
    in_prefix_BT = (column_T < shared_B[:, None]) & read_BT
    at_BT = torch.where(in_prefix_BT, _count(prefix_GT)[group_B], len(group_m) + _count(rest_BT))
    row_M = torch.cat([leader_G[group_m], row_m])
    column_M = torch.cat([prefix_column_m, rest_column_m])
    if tree:
        unit_B = torch.where(group_B >= 0, group_B, len(prefix_G) + torch.arange(batch).to(device))
        unit_M, within_M = torch.cat([group_m, unit_B[row_m]]), torch.zeros_like(row_M)
        within_M[len(group_m) :] = row_m + 1
        order_M, visibility = _in_pre_order(unit_M, within_M, column_M)
        attend = VisibleAttend(visibility, config)
        return Layout(row_M[order_M], column_M[order_M], attend, order_M.argsort()[at_BT])
    longest, rest = max(groups.prefix_G), max(1, int((read_B - shared_B).max()))
    attend = SharedPrefixAttend(
        config,
        groups,
        group_m * longest + prefix_column_m,
        row_m * rest + rest_column_m - shared_B[row_m],
        rest,
    )
    return Layout(row_M, column_M, attend, at_BT)


def _in_pre_order(unit_M: Tensor, within_M: Tensor, column_M: Tensor) -> tuple[Tensor, Visibility]:
    """Prefixes (`within_M` 0), each followed by the rests (1, 2, …) of its rows, unit by unit: the
    order of the tokens, and who sees whom then."""
    run_M, order_M = (unit_M * (within_M.max() + 1) + within_M).sort(stable=True)
    unit_M, within_M = unit_M[order_M].contiguous(), within_M[order_M]
    end_of_unit_M = torch.searchsorted(unit_M, unit_M, right=True)
    end_of_run_M = torch.searchsorted(run_M, run_M, right=True)
    tout_M = torch.where(within_M == 0, end_of_unit_M, end_of_run_M)
    return order_M, Visibility(tout_M, column_M[order_M])


def _count(mask_XT: Tensor) -> Tensor:
    """For every true entry, how many come before it in reading order."""
    return mask_XT.flatten().cumsum(0).view(mask_XT.shape) - 1


class SharedPrefixAttend:
    """Attention over tokens laid out as all prefixes, then all rests, both without padding.

    Prefixes are causal rows of their own; a rest looks at its group's prefix and, causally, at
    itself. Rows without a group have an empty prefix.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: Groups,
        prefix_place_M: Tensor,
        rest_place_M: Tensor,
        rest: int,
    ) -> None:
        device = rest_place_M.device
        self.config = config
        batch, longest = len(groups.group_B), max(groups.prefix_G)
        self.prefixes = PackedAttend(config, len(groups.prefix_G), longest, prefix_place_M)
        self.prefix_shape = (len(groups.prefix_G), longest)
        self.cut = len(prefix_place_M)
        self.rest_place_M, self.shape = rest_place_M, (batch, rest)
        self.group_B = torch.tensor(groups.group_B, device=device).clamp_min(0)
        seen_B = torch.tensor(
            [groups.prefix_G[g] if g >= 0 else 0 for g in groups.group_B], device=device
        )
        prefix_BP = torch.arange(longest, device=device) < seen_B[:, None]
        if bool((seen_B == seen_B[0]).all()):
            prefix_BP, seen_B = prefix_BP[:1], seen_B[:1]
        causal_CC = torch.ones(rest, rest, dtype=torch.bool, device=device).tril()
        self.mask_B1CS = torch.cat(
            [
                prefix_BP[:, None, :].expand(-1, rest, -1),
                causal_CC.expand(len(prefix_BP), -1, -1),
            ],
            dim=-1,
        )[:, None]
        # Positions of the rest's tokens, and of what stands before and among them.
        self.query_BC = seen_B[:, None] + torch.arange(rest, device=device)
        prefix_P = torch.arange(longest, device=device).expand(len(seen_B), -1)
        self.key_BS = torch.cat([prefix_P, self.query_BC], dim=1)
        self._window_mask_B1CS: Tensor | None = None

    def _mask(self, layer: int) -> Tensor:
        reach = reach_of(self.config, layer)
        if reach.window is None:
            return self.mask_B1CS
        if self._window_mask_B1CS is None:
            near_BCS = reach.sees(self.query_BC[:, :, None], self.key_BS[:, None])
            self._window_mask_B1CS = self.mask_B1CS & near_BCS[:, None]
        return self._window_mask_B1CS

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        cut = self.cut
        of_prefixes = self.prefixes(layer, q_MND[:cut], k_MKD[:cut], v_MKD[:cut])
        places = self.shape[0] * self.shape[1]
        q, k, v = (
            rows_first(place(x[cut:], self.rest_place_M, places), self.shape)
            for x in (q_MND, k_MKD, v_MKD)
        )
        k, v = (self._behind_prefix(x[:cut], y) for x, y in ((k_MKD, k), (v_MKD, v)))
        out = scaled_attention(q, k, v, self._mask(layer), causal=False)
        of_rests = pick(out.transpose(1, 2).flatten(0, 1).flatten(1), self.rest_place_M)
        return torch.cat([of_prefixes, of_rests])

    def _behind_prefix(self, prefix_MKD: Tensor, rest_BKCD: Tensor) -> Tensor:
        placed = place(prefix_MKD, self.prefixes.place_M, self.prefixes.places)
        prefix_BKPD = rows_first(placed, self.prefix_shape).index_select(0, self.group_B)
        return torch.cat([prefix_BKPD, rest_BKCD], dim=2)

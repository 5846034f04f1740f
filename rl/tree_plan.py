"""How one optimiser step's calls are computed: merged or apart, and in which pieces.

*Pieces.* A layout in pre-order is cut into runs of at most `budget` tokens, anywhere. Tokens of
earlier pieces that a later one sees form the path that is *open* at a cut. Two ways to give it to
the later piece:

    repeat   it computes the path again, as context (level 1: cuts between calls only)
    carry    the path's keys and values are computed once without graph, before all pieces, and each
             piece hands their gradients back to the piece that owns them (level 2: cuts anywhere)

`repeat` costs a forward and a backward pass of each open path, `carry` one forward pass of their
union and the memory of its keys and values. Cuts are placed where least is open.

*Merging.* What a way costs is estimated in floating-point operations from its tokens, its visible
pairs and its passes; merging must save at least `MARGIN` of that.

No torch here. Shapes: M packed tokens, S tokens of a piece with the C carried before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from rl.prefix_tree import Call, Ints, Labels, Pack, Sorted, cut, lay_out, sort_calls

Merge = Literal["auto", "always", "never"]
Split = Literal["auto", "repeat", "carry"]

MARGIN = 0.05  # of the cost: what merging must save
FORWARD = 1 / 3  # of a token's cost: a forward pass alone
LONG = 2048


@dataclass(frozen=True)
class Costs:
    """Floating-point operations of a forward and backward pass, by token and by visible pair, and
    what starting a pass and starting a call's attention costs in the same unit.

    `plain_pair` is the part of a pair's cost that remains where a causal kernel without a mask
    computes it: in whole rows of one length, and for queries in runs of `LONG` tokens.
    """

    token: float
    pair: float
    start: float = 0.0
    row: float = 0.0
    plain_pair: float = 1.0

    def of(self, pack: Pack, passes: int = 1) -> float:
        """Of a pack computed in so many passes."""
        starts = pack.starts
        lengths = np.diff(np.append(starts, pack.tokens))
        whole = not pack.depth_M[starts].any()
        return self._sum(pack.tokens, pack.pairs, lengths, whole, passes)

    def of_run(self, found: Sorted, run: range) -> float:
        """Of a run of sorted calls as one pack, before it is laid out."""
        ends = np.array([len(found.rows[i]) for i in run])
        kept = np.array([0, *found.shared[run.start + 1 : run.stop]])
        tokens, pairs = int((ends - kept).sum()), int((ends * (ends + 1) - kept * (kept + 1)).sum())
        adds = ends > kept
        whole = not kept[adds].any()
        return self._sum(tokens, pairs // 2, (ends - kept)[adds], whole, 1)

    def of_rows(self, rows: Sequence[Ints], budget: int) -> float:
        """Of calls one by one, in passes of at most `budget` tokens."""
        lengths = np.array([len(row) for row in rows])
        tokens, pairs = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
        return self._sum(tokens, pairs, lengths, True, -(-tokens // budget))

    def _sum(self, tokens: int, pairs: int, lengths: Ints, whole: bool, passes: int) -> float:
        even = whole and bool((lengths == lengths[0]).all())
        plain = 1.0 if even else float(lengths[lengths >= LONG].sum()) / tokens
        pair = self.pair * (1.0 - plain * (1.0 - self.plain_pair))
        return self.token * tokens + pair * pairs + self.start * passes + self.row * len(lengths)


@dataclass(frozen=True)
class Piece:
    """Tokens `own_M` of a pack, in its order, that are computed together after the path
    `carried_C` (indices of the pack; a token of depth i at place i)."""

    own_M: Ints
    carried_C: Ints


@dataclass(frozen=True)
class Plan:
    """Packs and the pieces of each, and what is expected of it.

    `open_tokens`: tokens that are computed once more, forward only, for later pieces.
    `ratio_calls`: tokens of the calls one by one over tokens computed here with graph.
    `cost_share`: estimated cost over that of not merging.
    """

    packs: tuple[Pack, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    merged: bool
    split: Literal["repeat", "carry"]
    call_tokens: int
    open_tokens: int
    cost_share: float

    @property
    def tokens(self) -> int:
        return sum(pack.tokens for pack in self.packs)

    @property
    def pairs(self) -> int:
        return sum(pack.pairs for pack in self.packs)

    @property
    def ratio_calls(self) -> float:
        return self.call_tokens / max(1, self.tokens)


def plan_step(
    calls: Sequence[Call],
    budget: int,
    costs: Costs,
    *,
    merge: Merge = "auto",
    split: Split = "auto",
    labels: Labels | None = None,
) -> Plan:
    """Lay calls out in pieces of at most `budget` tokens.

    Calls without a response are left out. `labels`: whole numbers (tokens − 1, X) of a call that
    must be equal, beside the ids, where tokens are merged (the experts to replay).
    Raises ValueError for a budget below 1, a call without a prompt, and, with `repeat`, for a call
    longer than the budget.
    """
    if budget < 1:
        raise ValueError(f"a budget of {budget} tokens; give at least one")
    tree = sort_calls(calls, labels)
    if not tree.rows:
        return Plan((), (), False, "carry", 0, 0, 1.0)
    plain_cost = costs.of_rows(tree.rows, budget)
    saved = sum(tree.shared) >= MARGIN * sum(map(len, tree.rows))
    if merge == "always" or (merge == "auto" and saved):
        merged = plan_layout(calls, tree, budget, costs, split, plain_cost)
        if merge == "always" or merged.cost_share <= 1 - MARGIN:
            return merged
    return plan_layout(calls, tree.apart(), budget, costs, split, plain_cost)


def plan_layout(
    calls: Sequence[Call],
    found: Sorted,
    budget: int,
    costs: Costs,
    split: Split = "auto",
    plain_cost: float | None = None,
) -> Plan:
    """Pieces of this very layout, by the cheaper of the two splits or the one asked for."""
    if plain_cost is None:
        plain_cost = costs.of_rows(found.rows, budget)
    merged = any(found.shared)
    call_tokens = sum(len(row) for row in found.rows)
    runs = []
    repeated = float("inf")
    if split == "repeat" or (split == "auto" and max(map(len, found.rows)) <= budget):
        runs = cut(found, budget)
        repeated = sum(costs.of_run(found, run) for run in runs)
    if split != "repeat":
        pack = lay_out(calls, found)
        pieces = carried_pieces(pack, cut_points(pack, budget, costs))
        open_M = open_tokens(pack, pieces)
        depths = pack.depth_M[open_M]
        again = costs.token * len(open_M) + costs.pair * float(depths.sum() + len(depths))
        cost = costs.of(pack, len(pieces)) + again * FORWARD
        if cost <= repeated:
            share = cost / plain_cost
            return Plan((pack,), (pieces,), merged, "carry", call_tokens, len(open_M), share)
    packs = tuple(lay_out(calls, found, run) for run in runs)
    whole = tuple((Piece(np.arange(p.tokens), np.zeros(0, np.int64)),) for p in packs)
    return Plan(packs, whole, merged, "repeat", call_tokens, 0, repeated / plain_cost)


def cut_points(pack: Pack, budget: int, costs: Costs) -> list[int]:
    """Where pieces of at most `budget` tokens begin, and M: the cheapest set, by dynamic
    programming over the places where a call turns off and, inside long runs, eighths of the budget.


    A cut after which `depth` tokens are open costs a forward pass of those that no earlier cut has
    opened: all but the ones that the path kept since the previous cut.
    """
    depth_M, total = pack.depth_M, pack.tokens
    if total <= budget:
        return [0, total]
    steps = np.arange(0, total, max(1, budget // 8))
    points = np.unique(np.concatenate([pack.starts, steps, [0, total]]))
    # The least depth from each point (its own included) up to the next one.
    least = np.minimum.reduceat(np.append(depth_M, 0), points)[:-1]
    start = costs.start / costs.token
    best = np.full(len(points), np.inf)
    origin = np.zeros(len(points), np.int64)
    best[0] = 0.0
    first = 0
    for i in range(1, len(points)):
        while points[i] - points[first] > budget:
            first += 1
        here = int(depth_M[points[i]]) if points[i] < total else 0
        # kept[j]: tokens of the path at cut j that are still open here.
        kept = np.minimum.accumulate(least[first:i][::-1])[::-1]
        open_cost = FORWARD * np.maximum(0, here - np.minimum(kept, here))
        cost = best[first:i] + open_cost + start
        j = int(cost.argmin())
        best[i], origin[i] = cost[j], first + j
    cuts = [len(points) - 1]
    while cuts[-1]:
        cuts.append(int(origin[cuts[-1]]))
    return [int(points[i]) for i in reversed(cuts)]


def carried_pieces(pack: Pack, points: Sequence[int]) -> tuple[Piece, ...]:
    """The runs between the points, each with the path that is open where it begins."""
    pieces = []
    for begin, end in pairwise(points):
        open_C = np.flatnonzero(pack.tout_M[:begin] > begin)
        pieces.append(Piece(np.arange(begin, end), open_C))
    return tuple(pieces)


def open_tokens(pack: Pack, pieces: Sequence[Piece]) -> Ints:
    """Tokens that some later piece sees, in the pack's order."""
    marked = np.zeros(pack.tokens, bool)
    for piece in pieces:
        marked[piece.carried_C] = True
    return np.flatnonzero(marked)


def part_of(pieces: Sequence[Piece], open_M: Ints) -> list[Piece]:
    """The pieces' own open tokens, with what is open before them."""
    kept = [np.intersect1d(piece.own_M, open_M, assume_unique=True) for piece in pieces]
    return [Piece(own, p.carried_C) for own, p in zip(kept, pieces, strict=True) if len(own)]


def tout_within(pack: Pack, piece: Piece) -> tuple[Ints, Ints]:
    """`tout` and depth of a piece's S tokens, carried ones first, in places of the piece."""
    places_S = np.concatenate([piece.carried_C, piece.own_M])
    return np.searchsorted(places_S, pack.tout_M[places_S]), pack.depth_M[places_S]

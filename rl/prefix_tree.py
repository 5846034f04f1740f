"""Calls that begin alike, merged into a tree of tokens that is computed once (M2 report §6.2.5).

A causal model's state at a token depends on the tokens before it alone. So among the calls of a
batch every prefix that some of them share needs one computation; nothing else about the loss
changes. This module lays calls out; it holds no tensor.

*Layout.* Sort the calls by their ids. The tokens that a call does not share with the one before it,
call after call, are the compressed trie of all calls in depth-first pre-order. In that order the
descendants of a token are one interval that begins at it, so one number a token says who sees it:

    query q sees key k  ⇔  k ≤ q < tout[k],        position of a token = depth on its path.

*Restore.* A response token is predicted by the token before it on its call's path. Each call keeps
the packed indices of its predictors; its log-probs are gathered by them, and the objective is
computed on them as if the call had been alone. A shared predictor receives the sum of its
contributions: that is what the gradient of the sum is.

*Budget.* A run of sorted calls is a tree of its own. A tree above the budget is cut into such runs;
each repeats the path to its first call, and every call is trained in exactly one of them.

Shapes: M packed tokens, n trained tokens, C calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Call(Protocol):
    """What is merged: exact ids."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...

    @property
    def response_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Pack:
    """One tree (or several side by side), laid out.

    ids_M, depth_M, tout_M: id, position and end of the visible interval of each packed token.
    calls_M: how many calls pass through it (load statistics count a token that often).
    predictor_n, target_n, call_n, offset_n: for every trained token, call after call: the packed
    index that predicts it, its id, its call (index into the sequence that was packed) and its place
    in the response.
    """

    ids_M: Ints
    depth_M: Ints
    tout_M: Ints
    calls_M: Ints
    predictor_n: Ints
    target_n: Ints
    call_n: Ints
    offset_n: Ints

    @property
    def tokens(self) -> int:
        """M."""
        return len(self.ids_M)

    @property
    def pairs(self) -> int:
        """Query–key pairs that see each other: what attention costs."""
        return int(self.depth_M.sum()) + self.tokens


@dataclass(frozen=True)
class Sorted:
    """Calls in the order of their ids, without those that have no response.

    `rows[i]` is what must be computed of the i-th (all but its last token, which predicts nothing),
    `index[i]` its place in the sequence given, `shared[i]` the length of the prefix that it has in
    common with the one before it (0 for the first).
    """

    rows: tuple[Ints, ...]
    index: tuple[int, ...]
    shared: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the whole tree."""
        return sum(len(row) for row in self.rows) - sum(self.shared)


def sort_calls(calls: Sequence[Call]) -> Sorted:
    """Order calls so that equal prefixes are neighbours.

    Raises ValueError for a call without a prompt: nothing would predict its first token.
    """
    found: list[tuple[bytes, int, Ints]] = []
    for index, call in enumerate(calls):
        if not len(call.prompt_ids):
            raise ValueError(f"call {index} has no prompt; give at least one token")
        if len(call.response_ids):
            ids = np.fromiter((*call.prompt_ids, *call.response_ids), np.int64)[:-1]
            # Bytes of big-endian numbers sort as the numbers do.
            found.append((ids.astype(">u4").tobytes(), index, ids))
    found.sort(key=lambda entry: entry[:2])
    rows = [ids for _, _, ids in found]
    shared = [0, *(_common(a, b) for a, b in pairwise(rows))]
    return Sorted(tuple(rows), tuple(i for _, i, _ in found), tuple(shared[: len(rows)]))


def _common(a: Ints, b: Ints) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def cut(found: Sorted, budget: int | None) -> list[range]:
    """Runs of sorted calls whose trees have at most `budget` tokens, as many calls each as fit.

    Raises ValueError where one call alone is longer.
    """
    runs: list[range] = []
    begin, size = 0, 0
    for i, row in enumerate(found.rows):
        if budget is not None and len(row) > budget:
            raise ValueError(
                f"call {found.index[i]} has {len(row)} tokens, more than a pack's {budget}; raise "
                "the budget or shorten the episode's context"
            )
        more = len(row) - (found.shared[i] if i > begin else 0)
        if i > begin and budget is not None and size + more > budget:
            runs.append(range(begin, i))
            begin, size, more = i, 0, len(row)
        size += more
    if found.rows:
        runs.append(range(begin, len(found.rows)))
    return runs


def build_packs(calls: Sequence[Call], budget: int | None = None) -> list[Pack]:
    """All calls that have a response, in trees of at most `budget` packed tokens (None: one)."""
    found = sort_calls(calls)
    return [_lay_out(calls, found, run) for run in cut(found, budget)]


def _lay_out(calls: Sequence[Call], found: Sorted, run: range) -> Pack:
    longest = max(len(found.rows[i]) for i in run)
    total = sum(len(found.rows[i]) for i in run) - sum(found.shared[i] for i in run[1:])
    ids_M, depth_M, tout_M, calls_M = (np.zeros(total, np.int64) for _ in range(4))
    path = np.zeros(longest, np.int64)  # packed index of each token of the call at hand
    size = length = 0
    parts: list[tuple[Ints, Ints, Ints, Ints]] = []
    for i in run:
        row, kept = found.rows[i], found.shared[i] if i > run.start else 0
        tout_M[path[kept:length]] = size  # the subtrees that end where this call turns off
        length, more = len(row), len(row) - kept
        path[kept:length] = np.arange(size, size + more)
        ids_M[size : size + more] = row[kept:]
        depth_M[size : size + more] = np.arange(kept, length)
        calls_M[path[:length]] += 1
        size += more
        call = calls[found.index[i]]
        prompt, response = len(call.prompt_ids), len(call.response_ids)
        parts.append(
            (
                path[prompt - 1 : length].copy(),
                np.fromiter(call.response_ids, np.int64),
                np.full(response, found.index[i], np.int64),
                np.arange(response, dtype=np.int64),
            )
        )
    tout_M[path[:length]] = size
    columns: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Pack(ids_M, depth_M, tout_M, calls_M, *columns)

"""Calls that begin alike, merged into a tree of tokens that is computed once (M2 report §6.2.5).

A causal model's state at a token depends on the tokens before it alone. So among the calls of a
batch every prefix that some of them share needs one computation; nothing else about the loss
changes. This module lays calls out; it holds no tensor.

*Layout.* The calls are sorted so that those that begin alike are neighbours. The tokens that a call
does not share with the one before it, call after call, are the compressed trie of all calls in
depth-first pre-order. In that order the descendants of a token are one interval that begins at it,
so one number a token says who sees it:

    query q sees key k  ⇔  k ≤ q < tout[k],        position of a token = depth on its path.

Where calls part, the branch with the longest call comes first. So the path from a branch's first
token to its deepest one is a single run, and attention sees few long causal runs.

*Restore.* A response token is predicted by the token before it on its call's path. Each call keeps
the packed indices of its predictors; its log-probs are gathered by them, and the objective is
computed on them as if the call had been alone. A shared predictor receives the sum of its
contributions: that is what the gradient of the sum is.

*Budget.* A run of sorted calls is a tree of its own. A tree above the budget is cut into such runs;
each repeats the path to its first call, and every call is trained in exactly one of them.
(`rl.tree_plan` has another way to cut.)

*Labels.* What else a token's state depends on, the experts it was routed to when they are replayed,
is compared beside its id: tokens are merged where both are equal.

Shapes: M packed tokens, n trained tokens, C calls, X numbers of a token's label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Call(Protocol):
    """What is merged: exact ids."""

    @property
    def prompt_ids(self) -> Sequence[int] | Ints: ...

    @property
    def response_ids(self) -> Sequence[int] | Ints: ...


@dataclass(frozen=True)
class Pack:
    """One tree (or several side by side), laid out.

    ids_M, depth_M, tout_M: id, position and end of the visible interval of each packed token.
    calls_M: how many calls pass through it (load statistics count a token that often).
    predictor_n, target_n, call_n, offset_n: for every trained token, call after call: the packed
    index that predicts it, its id, its call (index into the sequence that was packed) and its place
    in the response. labels_MX: each token's label (−1: its call has none; None: no call has).
    """

    ids_M: Ints
    depth_M: Ints
    tout_M: Ints
    calls_M: Ints
    predictor_n: Ints
    target_n: Ints
    call_n: Ints
    offset_n: Ints
    labels_MX: Ints | None = None

    @property
    def starts(self) -> Ints:
        """Where tokens begin that do not continue the one before them: one a call that adds any."""
        return np.flatnonzero(np.diff(self.depth_M, prepend=-2) != 1)

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
    """Calls in pre-order of their trie, longest branch first, without those that have no response.

    `rows[i]` is what must be computed of the i-th (all but its last token, which predicts nothing),
    `index[i]` its place in the sequence given, `shared[i]` the length of the prefix that it has in
    common with the one before it (0 for the first, the whole row where it is a prefix of others or
    equals an earlier one), `labels[i]` (tokens of the row, X).
    """

    rows: tuple[Ints, ...]
    index: tuple[int, ...]
    shared: tuple[int, ...]
    labels: tuple[Ints, ...] | None = None

    def apart(self) -> Sorted:
        """The same calls without any sharing, longest first."""
        order = sorted(range(len(self.rows)), key=lambda i: -len(self.rows[i]))
        labels = None if self.labels is None else tuple(self.labels[i] for i in order)
        rows, index = tuple(self.rows[i] for i in order), tuple(self.index[i] for i in order)
        return Sorted(rows, index, (0,) * len(order), labels)

    @property
    def tokens(self) -> int:
        """Tokens of the whole tree."""
        return sum(len(row) for row in self.rows) - sum(self.shared)


Labels = Sequence[Ints | None]
"""For each call the labels of all its tokens but the last (tokens − 1, X), or None."""


def sort_calls(calls: Sequence[Call], labels: Labels | None = None) -> Sorted:
    """Order calls so that equal prefixes are neighbours, and the longest branch of each is first.

    Branches of equal length keep the order of their ids, equal calls that of the sequence given.
    Raises ValueError for a call without a prompt: nothing would predict its first token; and for
    labels of another shape.
    """
    found = _rows(calls, labels)
    if not found:
        return Sorted((), (), ())
    # Bytes of big-endian numbers sort as the numbers do.
    key = [_joined(row, label).astype(">i4").tobytes() for _, row, label in found]
    order = sorted(range(len(found)), key=lambda i: (key[i], found[i][0]))
    found = [found[i] for i in order]
    joined = [_joined(row, label) for _, row, label in found]
    common = [_common(a, b) for a, b in pairwise(joined)]
    order, shared = _longest_first([len(row) for _, row, _ in found], common)
    return _sorted([found[i] for i in order], shared)


_Row = tuple[int, Ints, Ints | None]  # index, ids, labels


def _rows(calls: Sequence[Call], labels: Labels | None) -> list[_Row]:
    found: list[_Row] = []
    width = next((label.shape[1] for label in labels or () if label is not None), 0)
    for index, call in enumerate(calls):
        if not len(call.prompt_ids):
            raise ValueError(f"call {index} has no prompt; give at least one token")
        if not len(call.response_ids):
            continue
        ids = np.concatenate([_array(call.prompt_ids), _array(call.response_ids)])[:-1]
        label = None
        if width and labels is not None:
            label = labels[index]
            if label is None:
                label = np.full((len(ids), width), -1, np.int64)
            if label.shape != (len(ids), width):
                raise ValueError(
                    f"call {index}: labels of shape {label.shape}; it has {len(ids)} tokens before "
                    f"its last, and others have {width} numbers a token"
                )
        found.append((index, ids, label))
    return found


def _array(ids: Sequence[int] | Ints) -> Ints:
    return ids if isinstance(ids, np.ndarray) else np.fromiter(ids, np.int64, len(ids))


def _joined(ids: Ints, label: Ints | None) -> Ints:
    return ids[:, None] if label is None else np.concatenate([ids[:, None], label], axis=1)


def _sorted(found: Sequence[_Row], shared: Sequence[int]) -> Sorted:
    labels = tuple(label for _, _, label in found if label is not None)
    rows, index = tuple(ids for _, ids, _ in found), tuple(i for i, _, _ in found)
    return Sorted(rows, index, tuple(shared), labels or None)


def _common(a_TX: Ints, b_TX: Ints) -> int:
    length = min(len(a_TX), len(b_TX))
    differs = a_TX[:length] != b_TX[:length]
    differs = differs[:, 0] if differs.shape[1] == 1 else differs.any(axis=1)
    return int(differs.argmax()) if differs.any() else length


def _longest_first(lengths: Sequence[int], common: Sequence[int]) -> tuple[list[int], list[int]]:
    """Pre-order of sorted rows with the longest branch first; what each shares with the one before.

    `common[i]`: tokens that rows i and i + 1 have in common; at least one row. Nodes are the rows,
    which are leaves (as deep as its branch where a row is a prefix of others), and the branches,
    numbered after them. The first branch, of depth 0, holds all.
    """
    rows = root = len(lengths)
    depth = [*lengths, 0]
    reach = [*lengths, 0]  # the longest row through a node
    below: dict[int, list[int]] = {root: []}
    path = [root]  # branches above the row at hand

    def hang(node: int, branch: int) -> None:
        below[branch].append(node)
        reach[branch] = max(reach[branch], reach[node])

    for row, turn in enumerate([*common, 0]):
        node = row
        while depth[path[-1]] > turn:  # branches that end with this row
            branch = path.pop()
            hang(node, branch)
            node = branch
        if depth[path[-1]] < turn:
            path.append(len(depth))
            depth.append(turn)
            reach.append(0)
            below[path[-1]] = []
        hang(node, path[-1])

    order: list[int] = []
    shared: list[int] = []
    todo = [(root, 0)]
    while todo:
        node, kept = todo.pop()
        if node < rows:
            order.append(node)
            shared.append(kept)
            continue
        first, *others = sorted(below[node], key=reach.__getitem__, reverse=True)  # stable
        todo += [(other, depth[node]) for other in reversed(others)]
        todo.append((first, kept))
    return order, shared


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
    return [lay_out(calls, found, run) for run in cut(found, budget)]


def lay_out(calls: Sequence[Call], found: Sorted, run: range | None = None) -> Pack:
    """One pack of a run of sorted calls (None: of all)."""
    run = range(len(found.rows)) if run is None else run
    longest = max(len(found.rows[i]) for i in run)
    total = sum(len(found.rows[i]) for i in run) - sum(found.shared[i] for i in run[1:])
    ids_M, depth_M, tout_M = (np.zeros(total, np.int64) for _ in range(3))
    ends_M = np.zeros(total + 1, np.int64)  # calls that end at the token before
    path = np.zeros(longest, np.int64)  # packed index of each token of the call at hand
    size = length = 0
    parts: list[tuple[Ints, Ints, Ints, Ints]] = []
    labels: list[Ints] = []
    for i in run:
        row, kept = found.rows[i], found.shared[i] if i > run.start else 0
        tout_M[path[kept:length]] = size  # the subtrees that end where this call turns off
        length, more = len(row), len(row) - kept
        path[kept:length] = np.arange(size, size + more)
        ids_M[size : size + more] = row[kept:]
        depth_M[size : size + more] = np.arange(kept, length)
        ends_M[path[length - 1] + 1] += 1
        size += more
        if found.labels is not None:
            labels.append(found.labels[i][kept:])
        call = calls[found.index[i]]
        prompt, response = len(call.prompt_ids), len(call.response_ids)
        parts.append(
            (
                path[prompt - 1 : length].copy(),
                _array(call.response_ids),
                np.full(response, found.index[i], np.int64),
                np.arange(response, dtype=np.int64),
            )
        )
    tout_M[path[:length]] = size
    ends_M = ends_M.cumsum()
    calls_M = ends_M[tout_M] - ends_M[:-1]  # the calls through a token end in its interval
    labels_MX = np.concatenate(labels) if labels else None
    predictor_n, target_n, call_n, offset_n = (np.concatenate(x) for x in zip(*parts, strict=True))
    found_n = predictor_n, target_n, call_n, offset_n
    return Pack(ids_M, depth_M, tout_M, calls_M, *found_n, labels_MX)

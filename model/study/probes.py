"""Retrieval tasks at drawn distances, written into real text.

A row is a text of the same split in which some slots of four tokens are overwritten:

| task | written earlier | asked later | answer |
|---|---|---|---|
| lookup | `FACT k v` | `ASK k` | v (many keys a row: multi-query) |
| count | `FACT k v` four times, three other values once each | `COUNT k` | the common value |
| hop | `FACT b c`, then `FACT a b` | `HOP a` | c |
| copy | `COPY` and seven tokens | `COPY` and the first of them | the other six |

The distance of an answer is from its question to the *farthest* thing that it needs, in tokens,
and falls into one of five classes: up to 1, 2, 4, 8 and 16 windows. Keys and values are ordinary
tokens of the vocabulary. One in eight ordered pairs (what is bound, or follows) is held out: it is
never written in training rows and alone is written in measured ones.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.errors import ModelError
from model.study.corpus import Tokens

TASKS = ("lookup", "count", "hop", "copy")
REACHES = (1, 2, 4, 8, 16)
"""Upper ends of the classes of distance, in windows."""

FACT, ASK, COUNT, HOP, COPY = 3, 4, 5, 6, 7  # ids of special tokens, which text does not hold
_FIRST_KEY = 8
_SLOT = 4
_COPIED = 7
_VOTES, _DECOYS = 4, 3
_FILL = 0.6  # of a row's slots
_TRIES = 12
_TOO_SMALL = "the vocabulary has too few tokens for the keys of one row; use shorter rows"
_HELDOUT_PAIRS = 8


@dataclass(frozen=True)
class ProbeRows:
    """`ids` (N, T); `reach` (N, T) is the class of distance of each answer token, else -1; `task`
    (N,) is an index into TASKS."""

    ids: Tokens
    reach: npt.NDArray[np.int8]
    task: npt.NDArray[np.int8]


def make_rows(
    text_NT: Tokens, *, window: int, seed: int, heldout: bool, vocabulary: int = 2048
) -> ProbeRows:
    """Write tasks into the rows of `text_NT`, one kind a row, in turns."""
    ids = text_NT.copy()
    reach = np.full(ids.shape, -1, dtype=np.int8)
    draw = random.Random(seed)
    shuffle = np.random.default_rng(seed)
    for row in range(len(ids)):
        keys = (_FIRST_KEY + shuffle.permutation(vocabulary - _FIRST_KEY)).tolist()
        board = _Board(ids[row], reach[row], window, draw, heldout, keys)
        _WRITERS[row % len(TASKS)](board)
    return ProbeRows(ids, reach, (np.arange(len(ids)) % len(TASKS)).astype(np.int8))


def reach_class(distance: int, window: int) -> int:
    """Index into REACHES of a distance in tokens (the last class has no end)."""
    return min(bisect_left([reach * window for reach in REACHES], distance), len(REACHES) - 1)


def pair_is_heldout(first: int, second: int) -> bool:
    """Whether `second` may follow (or be bound to) `first` in measured rows only."""
    return ((first * 2654435761 + second * 40503) >> 7) % _HELDOUT_PAIRS == 0


class _Board:
    """One row: which slots are free, and how to write into them."""

    def __init__(
        self,
        ids_T: Tokens,
        reach_T: npt.NDArray[np.int8],
        window: int,
        draw: random.Random,
        heldout: bool,
        keys: list[int],
    ) -> None:
        self.ids_T, self.reach_T, self.draw, self.heldout = ids_T, reach_T, draw, heldout
        self.slots = len(ids_T) // _SLOT
        self.window = window // _SLOT
        self.values = keys.copy()
        self.used = [False] * self.slots
        self.full = round(self.slots * _FILL)
        self.keys = keys
        self.filled = 0

    def below(self, end: int) -> int:
        """A whole number in [0, end); several times faster than `randrange`."""
        return int(self.draw.random() * end)

    def key(self) -> int:
        """A token that is no key in this row yet."""
        if not self.keys:
            raise ModelError(_TOO_SMALL)
        return self.keys.pop()

    def partner(self, first: int) -> int:
        """A token that may follow `first` in this kind of row."""
        while True:
            second = self.values[self.below(len(self.values))]
            if pair_is_heldout(first, second) == self.heldout:
                return second

    def next_key(self, first: int) -> int:
        """The same, and no key in this row yet."""
        for place in reversed(range(len(self.keys))):
            if pair_is_heldout(first, self.keys[place]) == self.heldout:
                return self.keys.pop(place)
        raise ModelError(_TOO_SMALL)

    def spans(self, width: int = 1, between: int = 0) -> Iterator[tuple[int, int, int, list[int]]]:
        """Until the row is full: a class of distance, the first slots of a thing and of its
        question that far apart, and so many slots between them. All are free, and to be written."""
        misses = 0
        while self.filled < self.full and misses < _TRIES:
            reach = self.below(len(REACHES))
            low = REACHES[reach - 1] * self.window if reach else width - 1
            high = min(REACHES[reach] * self.window, self.slots - width)
            for _ in range(_TRIES if low < high else 0):
                distance = low + 1 + self.below(high - low)
                start = self.below(self.slots - width - distance + 1)
                end = start + distance
                if self.free(start, width) and self.free(end, width):
                    inner = self.between(start, end, between) if between else []
                    break
            else:
                inner = None
            if inner is None:
                misses += 1
            else:
                yield reach, start, end, inner

    def free(self, slot: int, width: int) -> bool:
        """Whether so many slots from this one on are free."""
        return not any(self.used[slot : slot + width])

    def between(self, start: int, end: int, count: int) -> list[int] | None:
        """Free slots strictly between two, drawn, in order."""
        found = [slot for slot in range(start + 1, end) if not self.used[slot]]
        return sorted(self.draw.sample(found, count)) if len(found) >= count else None

    def write(self, slot: int, *tokens: int, reach: int = -1, answers: int = 0) -> None:
        """Put tokens at a slot; the last `answers` of them are answers of that class."""
        width = -(-len(tokens) // _SLOT)
        for used in range(slot, slot + width):
            self.used[used] = True
        self.filled += width
        start = slot * _SLOT
        end = start + len(tokens)
        self.ids_T[start:end] = tokens
        if answers:
            self.reach_T[end - answers : end] = reach


def _lookup(board: _Board) -> None:
    for reach, fact, ask, _ in board.spans():
        key = board.key()
        value = board.partner(key)
        board.write(fact, FACT, key, value)
        board.write(ask, ASK, key, value, reach=reach, answers=1)


def _count(board: _Board) -> None:
    for reach, first, ask, inner in board.spans(between=_VOTES + _DECOYS - 1):
        key = board.key()
        common = board.partner(key)
        values = [common] * _VOTES + [board.partner(key) for _ in range(_DECOYS)]
        board.draw.shuffle(values)
        for slot, value in zip((first, *inner), values, strict=True):
            board.write(slot, FACT, key, value)
        board.write(ask, COUNT, key, common, reach=reach, answers=1)


def _hop(board: _Board) -> None:
    for reach, first, ask, inner in board.spans(between=1):
        start = board.key()
        middle = board.next_key(start)
        end = board.partner(middle)
        board.write(first, FACT, middle, end)
        board.write(inner[0], FACT, start, middle)
        board.write(ask, HOP, start, end, reach=reach, answers=1)


def _copy(board: _Board) -> None:
    for reach, first, again, _ in board.spans(width=(_COPIED + 1) // _SLOT):
        string = [board.key()]
        while len(string) < _COPIED:
            string.append(board.partner(string[-1]))
        board.write(first, COPY, *string)
        board.write(again, COPY, *string, reach=reach, answers=_COPIED - 1)


_WRITERS: tuple[Callable[[_Board], None], ...] = (_lookup, _count, _hop, _copy)

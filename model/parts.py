"""How the attention of a pack or tree is divided among kernels that need no mask (CUDA).

A *strand* (`strands.py`) sees itself causally, a square, and all of some earlier runs of tokens,
rectangles; strands side by side that see the same keys share a rectangle. cuDNN's kernel is almost
twice as fast there as flex attention with a mask. It makes a plan for each pair of sizes, though,
which takes 0.1 s. So squares and rectangles are cut into *parts* of sizes that come again: squares
16 to 32 an octave, rectangles 2 an octave of queries by 8 of keys. A square may be longer than its
strand: no token sees what stands behind it. What is left, short ends of squares and whole short
strands with the nearest keys of their path, is gathered for one call of the flash kernel, which
takes rows of any lengths and is as fast as flex attention.

No tensors here. Own tokens are counted from 0, keys among the S = C + M tokens with C carried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from model.strands import Strand

LEAST = 1024  # queries and keys of a part that has a plan
MOST_QUERIES = 65_536  # of a rectangle with a plan
MOST_STRANDS = 4096  # with more, all is left to flex attention
MOST_GATHERED = 4  # keys that are gathered, over all tokens
# Costs, measured on one H100, in pairs of flex attention: of a pair, of a call, of a query in a
# rectangle (dearer to differentiate, and joined to what it had), and of a key that is gathered.
PLANNED_PAIR, FLASH_PAIR = 0.56, 1.0
CALL_COST, JOIN_COST, GATHER_COST = 1_500_000, 400, 30

Run = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A square or rectangle: own tokens `queries` by `keys` of the S tokens.

    causal: a square, and each query sees the keys up to itself. Else each sees all, and the result
    is joined to what these queries have from parts before. planned: for cuDNN. padding: what a
    square is lengthened by.
    """

    queries: slice
    keys: slice
    causal: bool
    planned: bool
    padding: int = 0

    @property
    def sizes(self) -> tuple[int, int]:
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def pairs(self) -> int:
        queries, keys = self.sizes
        return queries * (queries + 1) // 2 if self.causal else queries * keys

    @property
    def cost(self) -> float:
        pair, pairs = PLANNED_PAIR if self.planned else FLASH_PAIR, self.pairs
        if self.causal:
            return pair * (pairs + self.padding * self.sizes[0]) + CALL_COST
        return pair * pairs + CALL_COST + JOIN_COST * self.sizes[0]


@dataclass(frozen=True)
class Row:
    """Own tokens [begin, end) by the keys of `runs`; the last query sees all of them, each one
    before it one less."""

    begin: int
    end: int
    runs: tuple[Run, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.end - self.begin, sum(stop - start for start, stop in self.runs)

    @property
    def pairs(self) -> int:
        queries, keys = self.sizes
        return queries * keys - queries * (queries - 1) // 2


@dataclass(frozen=True)
class Division:
    """Squares and rows, which cover each own token once, and the rectangles joined to them."""

    squares: tuple[Part, ...]
    rows: tuple[Row, ...]
    rectangles: tuple[Part, ...]

    @property
    def pairs(self) -> int:
        """Query–key pairs that see each other."""
        parts = sum(part.pairs for part in (*self.squares, *self.rectangles))
        return parts + sum(row.pairs for row in self.rows)

    @property
    def gathered(self) -> int:
        """Keys of all rows."""
        return sum(row.sizes[1] for row in self.rows)

    @property
    def cost(self) -> float:
        rows = FLASH_PAIR * sum(row.pairs for row in self.rows) + GATHER_COST * self.gathered
        rows += CALL_COST if self.rows else 0
        return rows + sum(part.cost for part in (*self.squares, *self.rectangles))


def divide(strands: Sequence[Strand], carried: int = 0) -> Division | None:
    """The parts, or None where flex attention over all takes less."""
    if not strands or len(strands) > MOST_STRANDS or max(s.end for s in strands) < LEAST:
        return None
    found = division(strands, carried)
    many = found.gathered > MOST_GATHERED * (carried + strands[-1].end)
    return None if many or found.cost >= found.pairs else found


def division(strands: Sequence[Strand], carried: int = 0) -> Division:
    """The parts of these strands, which cover the own tokens in order."""
    near: dict[int, list[Run]] = {strand.begin: [] for strand in strands}
    rectangles = tuple(_rectangles(strands, near))
    squares: list[Part] = []
    rows: list[Row] = []
    for strand in strands:
        planned, padding = _square(len(strand))
        begin, split, end = strand.begin, strand.begin + planned, strand.end
        own = carried + begin
        if planned:
            keys = slice(own, own + planned)
            squares.append(Part(slice(begin, split), keys, True, True, padding))
        if split < end:
            rows.append(Row(split, end, (*near[begin], (own, carried + end))))
    return Division(tuple(squares), tuple(rows), rectangles)


def _rectangles(strands: Sequence[Strand], near: dict[int, list[Run]]) -> Iterator[Part]:
    """What strands see of their paths. What a short strand does not share with enough others is
    noted in `near`."""
    groups: dict[int, list[_Step]] = {}  # of strands side by side, by where a run begins
    for strand in strands:
        for start, stop in strand.runs:
            group = groups.setdefault(start, [])
            if group and group[-1].strand.end != strand.begin:
                yield from _staircase(group, start, near)
                group.clear()
            group.append(_Step(strand, stop))
    for start, group in groups.items():
        yield from _staircase(group, start, near)


@dataclass(frozen=True)
class _Step:
    """A strand that sees a run of keys up to `stop`."""

    strand: Strand
    stop: int


def _staircase(group: Sequence[_Step], start: int, near: dict[int, list[Run]]) -> Iterator[Part]:
    """Keys from `start` on by strands side by side: what all of them see in one rectangle, then
    each half of those that see more (all, where they see the same)."""
    tokens = group[-1].strand.end - group[0].strand.begin
    least = min(step.stop for step in group)
    if tokens < LEAST:
        for step in group:
            if start < step.stop:
                near[step.strand.begin].append((start, step.stop))
        return
    if len(group) == 1 or least - start >= LEAST:
        yield from _rectangle(group[0].strand.begin, group[-1].strand.end, start, least)
        start = least
    for part in _side_by_side([step for step in group if step.stop > start]):
        stops = {step.stop for step in part}
        if len(part) == 1 or (len(stops) == 1 and stops.pop() - start >= LEAST):
            yield from _staircase(part, start, near)
        else:
            half = len(part) // 2
            yield from _staircase(part[:half], start, near)
            yield from _staircase(part[half:], start, near)


def _side_by_side(group: Sequence[_Step]) -> Iterator[Sequence[_Step]]:
    """Maximal runs of strands without others between them."""
    turns = [i for i, (a, b) in enumerate(pairwise(group), 1) if a.strand.end != b.strand.begin]
    for begin, end in pairwise([0, *turns, len(group)] if group else []):
        yield group[begin:end]


def _rectangle(begin: int, end: int, start: int, stop: int) -> Iterator[Part]:
    """In planned sizes as far as that goes: then the other keys, then the other queries."""
    split = start + _floor(stop - start, 8)
    at = begin
    while split > start and (size := _floor(min(end - at, MOST_QUERIES), 2)):
        yield Part(slice(at, at + size), slice(start, split), False, planned=True)
        at += size
    if begin < at and split < stop:
        yield Part(slice(begin, at), slice(split, stop), False, planned=False)
    if at < end:
        yield Part(slice(at, end), slice(start, stop), False, planned=False)


def _square(length: int) -> tuple[int, int]:
    """How many tokens of a strand go into its square, and the padding of that: either the end is
    left out, or padded where that takes less."""
    steps = 32 if length >= 8 * LEAST else 16
    short = _floor(length, steps)
    end = length - short
    padding = _step(length, steps) - end
    if short and end and PLANNED_PAIR * padding < FLASH_PAIR * end:
        return length, padding
    return short, 0


def _floor(size: int, steps: int) -> int:
    """The greatest planned size up to this one, of so many an octave; 0: none."""
    if size < LEAST:
        return 0
    step = _step(size, steps)
    return size // step * step


def _step(size: int, steps: int) -> int:
    return max(1, (1 << (size.bit_length() - 1)) // steps)

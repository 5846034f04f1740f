"""How the attention of a pack or tree is divided among causal kernels and the flexible one (CUDA).

A *strand* (`strands.py`) sees itself causally, a square, and all of some earlier runs of tokens,
rectangles; strands side by side that see the same run share its rectangle. Neither needs a mask,
and cuDNN's kernel is almost twice as fast as flex attention there. It makes a plan for each pair of
sizes, though, which takes 0.1 s. So squares and rectangles are cut into *parts* of sizes that come
again, 16 to 32 an octave in squares, powers of two of queries by 8 numbers of keys an octave in
rectangles; what is left goes to the flash kernel, which is half as fast and needs no plan. Strands
too short for all that stay with flex attention.

No tensors here. Own tokens are counted from 0, keys among the S = C + M tokens with C carried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from model.strands import Strand

LEAST = 1024  # queries and keys of a part that has a plan
MOST_QUERIES = 65_536  # of a rectangle with a plan
MOST_STRANDS = 512  # for which calls of their own are considered where they are short
# Costs, measured on one H100, in pairs of flex attention: of a pair, of a part, of a query in a
# rectangle (dearer to differentiate, and joined to what it had), and of a call of flex attention.
PLANNED_PAIR, FLASH_PAIR = 0.56, 1.0
PART_COST, JOIN_COST, REST_COST = 1_500_000, 400, 3_000_000


@dataclass(frozen=True)
class Part:
    """One kernel call: own tokens `queries` by `keys` of the S tokens.

    causal: the last query sees all keys, each one before it one less. Else each sees all, and the
    result is joined to what these queries have from parts before. lengths: rows side by side, each
    causal in itself. planned: for cuDNN.
    """

    queries: slice
    keys: slice
    causal: bool
    planned: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, int]:
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def pairs(self) -> int:
        queries, keys = self.sizes
        if self.lengths:
            return sum(length * (length + 1) // 2 for length in self.lengths)
        return queries * keys - (queries * (queries - 1) // 2 if self.causal else 0)

    @property
    def cost(self) -> float:
        pair = PLANNED_PAIR if self.planned else FLASH_PAIR
        return pair * self.pairs + PART_COST + (0 if self.causal else JOIN_COST * self.sizes[0])


@dataclass(frozen=True)
class Division:
    """`parts` in the order in which they are joined, and the strands left to flex attention."""

    parts: tuple[Part, ...]
    rest: tuple[Strand, ...]

    @property
    def cost(self) -> float:
        rest = sum(strand.pairs for strand in self.rest) + REST_COST if self.rest else 0
        return sum(part.cost for part in self.parts) + rest


def divide(strands: Sequence[Strand], carried: int = 0) -> Division | None:
    """The cheapest of four divisions: long strands in parts; also short ones that many share a run
    with; all, if there are few; none (None)."""
    taken = {i for i, strand in enumerate(strands) if len(strand) >= LEAST}
    choices = [taken, taken | _families(strands)]
    if len(strands) <= MOST_STRANDS:
        choices.append(set(range(len(strands))))
    best, least = None, float(sum(strand.pairs for strand in strands))
    for choice in choices:
        if choice:
            found = division(strands, choice, carried)
            if found.cost < least:
                best, least = found, found.cost
    return best


def _families(strands: Sequence[Strand]) -> set[int]:
    """Strands side by side that hang at one place, together long enough for a rectangle."""
    found: set[int] = set()
    for runs, family in groupby(range(len(strands)), lambda i: strands[i].runs):
        members = list(family)
        long = sum(len(strands[i]) for i in members) >= LEAST
        if long and any(stop - start >= LEAST for start, stop in runs):
            found.update(members)
    return found


def division(strands: Sequence[Strand], taken: set[int], carried: int = 0) -> Division:
    """Those strands in parts, the others left."""
    chosen = [strand for i, strand in enumerate(strands) if i in taken]
    parts = [*_squares(chosen, carried), *_rectangles(chosen)]
    return Division(tuple(parts), tuple(s for i, s in enumerate(strands) if i not in taken))


def _squares(strands: Sequence[Strand], carried: int) -> Iterator[Part]:
    """What strands see of themselves; short ones side by side in one call."""
    short: list[Strand] = []
    for strand in strands:
        planned = _floor(len(strand), 32 if len(strand) >= 8 * LEAST else 16)
        if short and (planned or strand.begin != short[-1].end):
            yield _side_by_side(short, carried)
            short = []
        if not planned:
            short.append(strand)
            continue
        begin, split, end = strand.begin, strand.begin + planned, strand.end
        yield Part(
            slice(begin, split), slice(carried + begin, carried + split), causal=True, planned=True
        )
        if split < end:
            yield Part(slice(split, end), slice(carried + begin, carried + end), causal=True)
    if short:
        yield _side_by_side(short, carried)


def _side_by_side(strands: Sequence[Strand], carried: int) -> Part:
    begin, end = strands[0].begin, strands[-1].end
    lengths = tuple(map(len, strands)) if len(strands) > 1 else ()
    return Part(slice(begin, end), slice(carried + begin, carried + end), True, lengths=lengths)


def _rectangles(strands: Sequence[Strand]) -> Iterator[Part]:
    """What strands see of earlier runs."""
    wide: dict[tuple[int, int], tuple[int, int]] = {}
    for strand in strands:
        for run in strand.runs:
            begin, end = wide.get(run, (0, -1))
            if end != strand.begin:
                if end >= 0:
                    yield from _rectangle(begin, end, run)
                begin = strand.begin
            wide[run] = begin, strand.end
    for run, (begin, end) in wide.items():
        yield from _rectangle(begin, end, run)


def _rectangle(begin: int, end: int, run: tuple[int, int]) -> Iterator[Part]:
    """Queries in powers of two by as many keys as have a plan; then the other keys; then the other
    queries."""
    start, stop = run
    split = start + _floor(stop - start, 8)
    at = begin
    while split > start and (size := _floor(min(end - at, MOST_QUERIES), 1)):
        yield Part(slice(at, at + size), slice(start, split), causal=False, planned=True)
        at += size
    if begin < at and split < stop:
        yield Part(slice(begin, at), slice(split, stop), causal=False)
    if at < end:
        yield Part(slice(at, end), slice(start, stop), causal=False)


def _floor(size: int, steps: int) -> int:
    """The greatest planned size up to this one, of so many an octave; 0: none."""
    if size < LEAST:
        return 0
    step = max(1, (1 << (size.bit_length() - 1)) // steps)
    return size // step * step

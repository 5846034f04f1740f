"""From ledger rows to the table of `make medals`: pure.

A row is one graded submission (see `judge.py`). Per seed: the share of competitions, then the mean
over seeds ± one standard error of the mean (sample deviation, n - 1, over the root of the seeds),
as in MLE-bench; with one seed the error is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error; percent or percentile points."""

    value: float
    sem: float

    def text(self) -> str:
        return f"{self.value:.1f} ± {self.sem:.1f}"


@dataclass(frozen=True)
class Line:
    """One competition, or all: shares in percent, percentile 0 to 100."""

    name: str
    any_medal: Mean
    above_median: Mean
    percentile: Mean
    valid: Mean


@dataclass(frozen=True)
class Table:
    """Lines a competition in the rows' order, and the mean over competitions of each seed.

    `incomplete`: seeds that lack a competition and therefore count in no line of `total`.
    """

    lines: tuple[Line, ...]
    total: Line
    seeds: tuple[int, ...]
    incomplete: tuple[int, ...]


_FIGURES: dict[str, Callable[[Row], float]] = {
    "any_medal": lambda row: 100.0 * (row["medal"] is not None),
    "above_median": lambda row: 100.0 * bool(row["above_median"]),
    "percentile": lambda row: float(row["percentile"]),
    "valid": lambda row: 100.0 * bool(row["valid"]),
}


def summarise(rows: Sequence[Row]) -> Table:
    """The table of rows that have one whole-test score for a competition and seed.

    Raises ValueError without rows, and for two rows of one competition and seed.
    """
    whole = [row for row in rows if row["fold"] is None]
    by_seed: dict[int, dict[str, Row]] = {}
    names = list(dict.fromkeys(str(row["competition"]) for row in whole))
    for row in whole:
        seed, name = int(row["seed"]), str(row["competition"])
        if name in by_seed.setdefault(seed, {}):
            raise ValueError(f"two rows of {name} with seed {seed}")
        by_seed[seed][name] = row
    if not names:
        raise ValueError("no rows")
    seeds = sorted(by_seed)
    complete = [seed for seed in seeds if len(by_seed[seed]) == len(names)]
    lines = tuple(
        _line(name, [[by_seed[seed][name]] for seed in seeds if name in by_seed[seed]])
        for name in names
    )
    total = _line("all", [list(by_seed[seed].values()) for seed in complete])
    return Table(lines, total, tuple(seeds), tuple(s for s in seeds if s not in complete))


def mean_sem(values: Sequence[float]) -> Mean:
    """Mean and standard error; NaN without values, error 0 for one."""
    if not values:
        return Mean(math.nan, math.nan)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Mean(mean, 0.0)
    spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Mean(mean, math.sqrt(spread / len(values)))


def show(table: Table, *, title: str, best_on_test: Table | None = None) -> str:
    """The table as text, with the best-on-test medals beside it where they are given."""
    head = f"{'competition':24} {'any medal %':>14} {'above median %':>15} {'percentile':>13}"
    lines = [title, f"{head} {'valid %':>13}" + ("  best-on-test medal %" if best_on_test else "")]
    other = {line.name: line for line in (*best_on_test.lines, best_on_test.total)} if (
        best_on_test
    ) else {}  # fmt: skip
    for line in (*table.lines, table.total):
        text = (
            f"{line.name:24} {line.any_medal.text():>14} {line.above_median.text():>15} "
            f"{line.percentile.text():>13} {line.valid.text():>13}"
        )
        if line.name in other:
            text += f" {other[line.name].any_medal.text():>21}"
        lines.append(text)
    if table.incomplete:
        missing = ", ".join(map(str, table.incomplete))
        lines.append(f"incomplete seeds, not counted under all: {missing}")
    return "\n".join(lines)


def _line(name: str, seeds: Sequence[Sequence[Row]]) -> Line:
    def over_seeds(figure: Callable[[Row], float]) -> Mean:
        return mean_sem([sum(map(figure, rows)) / len(rows) for rows in seeds])

    return Line(name, **{key: over_seeds(figure) for key, figure in _FIGURES.items()})

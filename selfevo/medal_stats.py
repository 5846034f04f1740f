"""Medal rates with their uncertainty, from the ledger's rows. Pure functions.

A rate of one seed is the mean over competitions of the mean over their scripts, so each
competition counts once. The table gives the mean over seeds ± one standard error of the mean
(sample deviation / √seeds; 0 for one seed, as MLE-bench has it) and a 95 % bootstrap interval that
draws scripts again within each stratum: a competition of one seed, or, where each seed has one
submission a competition, that competition over all seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

By = Literal["round", "arm", "competition", "seed"]
BYS: tuple[By, ...] = ("round", "arm", "competition", "seed")
DRAWS = 2_000
FIGURES = ("any_medal", "above_median", "percentile", "valid")


@dataclass(frozen=True)
class Rate:
    """Per cent: mean over seeds, its standard error, and the bootstrap interval."""

    mean: float
    sem: float
    low: float
    high: float


@dataclass(frozen=True)
class MedalStats:
    """One line of the table. `rates` are by the names in FIGURES; counts are of scripts."""

    group: str
    round: int
    arm: str
    role: str
    seeds: int
    competitions: int
    scripts: int
    gold: int
    silver: int
    bronze: int
    rates: dict[str, Rate]
    wall_hours: float
    job_hours: float
    gpu_hours: float


Row = dict[str, Any]
QUERY = """
    SELECT source, suite, suite_version, split, agent, board, checkpoint, campaign, round, arm,
           role, seed, competition, medal, any_medal, above_median, percentile, valid, wall_hours,
           job_hours, gpu_hours
    FROM scores WHERE campaign = ? AND suite = ? AND fold IS NULL
      AND (source = ? OR starts_with(source, 'medals/'))
    ORDER BY agent <> 'policy', source, suite_version, split, round, role DESC, arm, seed,
             competition, sample
"""


def stats(rows: Sequence[Row], by: By) -> list[MedalStats]:
    """The table's lines, in the order in which their first row comes."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        arm = (row["round"], row["arm"])
        key = {"round": arm, "arm": (row["arm"],)}.get(by, (*arm, row.get(by)))
        groups.setdefault(key, []).append(row)
    return [_line(found, by) for found in groups.values()]


def _line(rows: Sequence[Row], by: By) -> MedalStats:
    first = rows[0]
    cells: dict[int, dict[str, list[Row]]] = {}
    for row in rows:
        cells.setdefault(row["seed"], {}).setdefault(row["competition"], []).append(row)
    last = {name: max(row[name] for row in rows) for name in ("wall_hours", "job_hours")}
    return MedalStats(
        group=str(first[by]),
        round=first["round"],
        arm=first["arm"],
        role=first["role"],
        seeds=len(cells),
        competitions=len({row["competition"] for row in rows}),
        scripts=len(rows),
        **{m: sum(row["medal"] == m for row in rows) for m in ("gold", "silver", "bronze")},
        rates={name: rate(_values(cells, name), strata=_strata(cells, name)) for name in FIGURES},
        wall_hours=last["wall_hours"],
        job_hours=last["job_hours"],
        gpu_hours=max(row["gpu_hours"] for row in rows),
    )


Cells = dict[int, dict[str, list[Row]]]


def _values(cells: Cells, name: str) -> list[list[list[float]]]:
    return [
        [[_value(row, name) for row in found] for found in competitions.values()]
        for competitions in cells.values()
    ]


def _strata(cells: Cells, name: str) -> list[list[float]] | None:
    """Competitions over all seeds, where every seed has one row of each; else None."""
    names = {frozenset(competitions) for competitions in cells.values()}
    if len(names) > 1 or any(len(f) > 1 for c in cells.values() for f in c.values()):
        return None
    return [[_value(c[one][0], name) for c in cells.values()] for one in sorted(next(iter(names)))]


def _value(row: Row, name: str) -> float:
    return (1.0 if name == "percentile" else 100.0) * float(row[name])


def rate(
    values: Sequence[Sequence[Sequence[float]]],
    draws: int = DRAWS,
    strata: Sequence[Sequence[float]] | None = None,
) -> Rate:
    """The rate of values by seed, competition and script.

    `strata` are drawn from instead of the competitions of each seed; each counts the same.
    """
    seeds = np.array([_seed_mean(seed) for seed in values])
    sem = float(seeds.std(ddof=1) / np.sqrt(len(seeds))) if len(seeds) > 1 else 0.0
    rng = np.random.default_rng(0)
    drawn = np.zeros(draws)
    groups = [(s, len(seed) * len(values)) for seed in values for s in seed]
    if strata is not None:
        groups = [(stratum, len(strata)) for stratum in strata]
    for scripts, parts in groups:
        drawn += _drawn_means(np.asarray(scripts), draws, rng) / parts
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Rate(float(seeds.mean()), sem, float(low), float(high))


def _seed_mean(competitions: Sequence[Sequence[float]]) -> float:
    return float(np.mean([np.mean(scripts) for scripts in competitions]))


def _drawn_means(
    scripts: npt.NDArray[np.float64], draws: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    index = rng.integers(0, len(scripts), (draws, len(scripts)))
    means: npt.NDArray[np.float64] = scripts[index].mean(axis=1)
    return means

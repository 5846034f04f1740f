"""Means, differences and intervals of arms. Numpy only.

Shapes: S seeds, C competitions, K scripts of a competition, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, nan, sqrt

import numpy as np
from numpy.typing import NDArray

from model.study.statistics import Interval, student

RESAMPLES = 4000
Z_POWER = 0.8416212335729143  # 80 %

Val = dict[str, list[float]]


def mean_percentile(val: Val) -> float:
    """Mean over competitions of their means: each counts once."""
    return float(np.mean([np.mean(values) for values in val.values() if values]))


def val_difference(ours: Sequence[Val], theirs: Sequence[Val], seed: int = 0) -> Interval:
    """Mean percentile of `ours` (one `Val` a training seed) minus that of `theirs`.

    95 % percentile bootstrap that draws competitions (the same for both sides: they are paired),
    training seeds of either side, and scripts of each competition.
    """
    if not ours or not theirs:
        return Interval(nan, nan, nan)
    names = sorted(set.intersection(*(set(val) for val in (*ours, *theirs))))
    random = np.random.default_rng(seed)
    chosen_RC = random.integers(len(names), size=(RESAMPLES, len(names)))
    a_R = _draws(ours, names, chosen_RC, random)
    b_R = _draws(theirs, names, chosen_RC, random)
    low, high = np.percentile(a_R - b_R, [2.5, 97.5])
    point = _mean(ours, names) - _mean(theirs, names)
    return Interval(point, float(low), float(high))


def _mean(vals: Sequence[Val], names: Sequence[str]) -> float:
    return float(np.mean([[np.mean(val[name]) for name in names] for val in vals]))


def _draws(
    vals: Sequence[Val],
    names: Sequence[str],
    chosen_RC: NDArray[np.int64],
    random: np.random.Generator,
) -> NDArray[np.float64]:
    """Means of R resamples. The mean of K scripts drawn from K is drawn as such, by competition."""
    seeds = len(vals)
    rounds = len(chosen_RC)
    mean_RSC = np.empty((rounds, seeds, len(names)))
    for s, val in enumerate(vals):
        for c, name in enumerate(names):
            value_K = np.asarray(val[name], dtype=np.float64)
            drawn_RK = random.integers(len(value_K), size=(rounds, len(value_K)))
            mean_RSC[:, s, c] = value_K[drawn_RK].mean(axis=1)
    seed_RS = random.integers(seeds, size=(rounds, seeds))
    rows_R = np.arange(rounds)[:, None, None]
    picked_RSC = mean_RSC[rows_R, seed_RS[:, :, None], chosen_RC[:, None, :]]
    means: NDArray[np.float64] = picked_RSC.mean(axis=(1, 2))
    return means


@dataclass(frozen=True)
class Slope:
    """Least-squares rise of a curve a step, its 95 % interval, and what a curve of this length and
    noise shows: `power`, the chance that the interval excludes 0 if the true slope is `expected`,
    and `smallest`, the slope that is shown with a chance of 80 %."""

    slope: Interval
    noise: float
    smallest: float
    expected: float
    power: float


def slope_of(values: Sequence[float], expected: float) -> Slope:
    """Of one curve, a value a step; ValueError with fewer than four."""
    if len(values) < 4:
        raise ValueError(f"{len(values)} steps; a slope and its noise need at least 4")
    y = np.asarray(values, dtype=np.float64)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    spread = float((x**2).sum())
    slope = float((x * y).sum() / spread)
    rest = y - y.mean() - slope * x
    noise = sqrt(float((rest**2).sum()) / (len(y) - 2))
    error = noise / sqrt(spread)
    half = student(len(y) - 2) * error
    power = 1.0
    if error > 0:
        power = _normal(expected / error - student(len(y) - 2))
    interval = Interval(slope, slope - half, slope + half)
    return Slope(interval, noise, (student(len(y) - 2) + Z_POWER) * error, expected, power)


def _normal(z: float) -> float:
    return 0.5 * (1 + erf(z / sqrt(2)))

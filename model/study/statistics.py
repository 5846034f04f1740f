"""Means and intervals of the study: seeds are the unit, packages are resampled for losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z = 1.96
_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; the ends are nan where there is a single value."""

    mean: float
    low: float
    high: float

    def within(self, low: float, high: float) -> bool:
        """Whether all of it lies between two bounds."""
        return self.low >= low and self.high <= high


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of values of different seeds, and Student's interval for it."""
    mean = fmean(values) if values else nan
    if len(values) < 2:
        return Interval(mean, nan, nan)
    half = student(len(values) - 1) * stdev(values) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def student(degrees: int) -> float:
    """97.5 % point of Student's t by degrees of freedom: a table up to 9, then the Cornish–Fisher
    expansion (to four digits)."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z, n = _Z, float(degrees)
    first = (z**3 + z) / (4 * n)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + first + second + third


def share_interval(hits: int, count: int) -> Interval:
    """Share of runs of which something holds, and Wilson's 95 % interval for it."""
    share, z2 = hits / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def package_interval(
    nats_SP: npt.NDArray[np.float64], count_P: npt.NDArray[np.float64], seed: int = 0
) -> Interval:
    """Loss difference a token, with packages drawn again and again (percentile bootstrap).

    `nats_SP`: difference of summed nats by seed and package; `count_P`: targets of each package.
    """
    draw = np.random.default_rng(seed)
    packages = len(count_P)
    chosen_RP = draw.integers(packages, size=(_RESAMPLES, packages))
    mean_P = nats_SP.mean(axis=0)
    losses_R = mean_P[chosen_RP].sum(axis=1) / count_P[chosen_RP].sum(axis=1)
    low, high = np.percentile(losses_R, [2.5, 97.5])
    return Interval(float(mean_P.sum() / count_P.sum()), float(low), float(high))

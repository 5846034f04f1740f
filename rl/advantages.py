"""Group baselines and batch-normalised advantages (M2 report §6.1.5). Pure numpy.

Baseline of an attempt = mean return of the *other* attempts of its group (leave-one-out), which is
unbiased. Advantages are divided by their standard deviation over the whole batch, not the group:
per-group division favours very easy and very hard prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ZERO_SPREAD = 1e-9
"""Returns closer than this are equal: exact equality fails on floats."""


@dataclass(frozen=True)
class Advantages:
    """One advantage an attempt, in input order, and what the normalisation saw."""

    values: NDArray[np.float64]
    zero_std_groups: int
    groups: int
    std: float

    @property
    def zero_std_frac(self) -> float:
        return self.zero_std_groups / self.groups if self.groups else 0.0


def group_advantages(returns: Sequence[float], groups: Sequence[int]) -> Advantages:
    """Leave-one-out advantages, divided by their root mean square deviation over the batch.

    returns: one number an attempt. groups: its group. A group without spread (or with a single
    attempt left) gets exactly zero; if all are so, everything is zero and nothing is divided.
    Non-finite returns raise ValueError.
    """
    returns_N = np.asarray(returns, dtype=np.float64)
    groups_N = np.asarray(groups, dtype=np.int64)
    if returns_N.shape != groups_N.shape or returns_N.ndim != 1:
        raise ValueError("returns and groups must be two sequences of one length")
    if not np.isfinite(returns_N).all():
        raise ValueError("a return is not finite")
    advantage_N = np.zeros_like(returns_N)
    live_N = np.zeros(returns_N.shape, dtype=bool)
    unique = np.unique(groups_N)
    zero = 0
    for group in unique:
        members = groups_N == group
        values = returns_N[members]
        if len(values) < 2 or values.max() - values.min() <= ZERO_SPREAD:
            zero += 1
            continue
        others_mean = (values.sum() - values) / (len(values) - 1)
        advantage_N[members] = values - others_mean
        live_N |= members
    std = float(advantage_N.std()) if live_N.any() else 0.0
    if std > ZERO_SPREAD:
        advantage_N = advantage_N / std
    return Advantages(advantage_N, zero, len(unique), std)

"""Group baselines and batch-normalised advantages (M2 report §6.1.5–6). Pure numpy.

    A_it = (G_it − B_i) / σ        B_i = mean return G_j0 of the *other* attempts j of i's group

The leave-one-out baseline is unbiased: it does not depend on attempt i. σ is the standard deviation
of A_i0 over the batch's attempts of one domain, not the group: per-group division favours very easy
and very hard prompts, and one σ for several domains favours the one with the widest rewards. GRPO
divides by the group's deviation (`std="group"`): then A_i0 is its (R_i − mean) / std exactly, as
leave-one-out only scales a group by G / (G − 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ZERO_SPREAD = 1e-9
"""Returns closer than this are equal: exact equality fails on floats."""

Spread = Literal["batch", "group"]


@dataclass(frozen=True)
class Advantages:
    """One advantage an attempt, in input order, and what they were made with.

    `baselines` B_i; `scales` σ (1 where nothing is divided); `live`: the attempt's group has
    spread. `std`: the deviation over all attempts before division.
    """

    values: NDArray[np.float64]
    baselines: NDArray[np.float64]
    scales: NDArray[np.float64]
    live: NDArray[np.bool_]
    zero_std_groups: int
    groups: int
    std: float

    @property
    def zero_std_frac(self) -> float:
        return self.zero_std_groups / self.groups if self.groups else 0.0

    def of_calls(self, attempt: int, to_go: Sequence[float]) -> list[float]:
        """A_it of an attempt's calls from their rewards-to-go; zeros in a group without spread."""
        if not self.live[attempt]:
            return [0.0] * len(to_go)
        baseline, scale = self.baselines[attempt], self.scales[attempt]
        return [float((value - baseline) / scale) for value in to_go]


def group_advantages(
    returns: Sequence[float],
    groups: Sequence[int],
    domains: Sequence[str] | None = None,
    spread: Spread = "batch",
) -> Advantages:
    """Leave-one-out advantages, divided by their deviation over the batch's domain, or the group.

    returns: G_i0, one number an attempt. groups: its group; domains: its domain (one for all if not
    given). A group without spread (or with a single attempt left) gets exactly zero; if all are so,
    everything is zero and nothing is divided. Non-finite returns raise ValueError.
    """
    returns_N = np.asarray(returns, dtype=np.float64)
    groups_N = np.asarray(groups, dtype=np.int64)
    domains_N = np.asarray(domains if domains is not None else [""] * len(returns_N), dtype=str)
    if returns_N.shape != groups_N.shape or returns_N.ndim != 1 or len(domains_N) != len(returns_N):
        raise ValueError("returns, groups and domains must be sequences of one length")
    if not np.isfinite(returns_N).all():
        raise ValueError("a return is not finite")
    advantage_N = np.zeros_like(returns_N)
    baseline_N = returns_N.copy()
    scale_N = np.ones_like(returns_N)
    live_N = np.zeros(returns_N.shape, dtype=bool)
    unique = np.unique(groups_N)
    zero = 0
    for group in unique:
        members = groups_N == group
        values = returns_N[members]
        if len(values) < 2 or values.max() - values.min() <= ZERO_SPREAD:
            zero += 1
            continue
        baseline_N[members] = (values.sum() - values) / (len(values) - 1)
        advantage_N[members] = values - baseline_N[members]
        live_N |= members
    std = float(advantage_N.std()) if live_N.any() else 0.0
    if spread == "group":
        parts = [groups_N == group for group in unique]
    else:
        parts = [domains_N == domain for domain in np.unique(domains_N)]
    for part in parts:
        deviation = float(advantage_N[part].std())
        if deviation > ZERO_SPREAD:
            scale_N[part] = deviation
    return Advantages(advantage_N / scale_N, baseline_N, scale_N, live_N, zero, len(unique), std)

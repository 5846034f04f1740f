"""Rewards of an episode: r = α·process + β·speed + perf (M2 report §6.1.5), no discount.

The paper gives neither weights nor h. Ours: performance is the percentile of the final submission
on the task's field, divided by 100; process and speed are off (0) unless asked for; speed is paid
at the last step, only when performance is positive, against the median time of the group's
successful attempts. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rl.types import RewardRecord


@dataclass(frozen=True)
class RewardWeights:
    """`process` α, `speed` β, and the clip c of h(x) = clip(1 − x, −c, c)."""

    process: float = 0.0
    speed: float = 0.0
    speed_clip: float = 0.5


def percentile_reward(percentile: float, *, valid: bool) -> float:
    """Percentile (0–100, among the field) → reward in [0, 1]; an invalid submission earns 0."""
    if not valid:
        return 0.0
    if not 0.0 <= percentile <= 100.0:
        raise ValueError(f"percentile {percentile} is outside 0 … 100")
    return percentile / 100.0


def speed_bonus(seconds: float, baseline_seconds: float, clip: float) -> float:
    """h(T / T_baseline) = clip(1 − T / T_baseline, −c, c); 0 without a baseline."""
    if baseline_seconds <= 0:
        return 0.0
    return max(-clip, min(clip, 1.0 - seconds / baseline_seconds))


def episode_returns(
    records: Sequence[RewardRecord], weights: RewardWeights | None = None
) -> list[float]:
    """Undiscounted return of each attempt of *one group*, in order."""
    weights = weights or RewardWeights()
    times = [r.t_wall for r in records if r.status == "done" and r.outcome > 0]
    baseline = median(times) if times else 0.0
    returns = []
    for record in records:
        total = record.outcome + weights.process * sum(value for _, value in record.process)
        if weights.speed and record.outcome > 0:
            total += weights.speed * speed_bonus(record.t_wall, baseline, weights.speed_clip)
        returns.append(total)
    return returns

"""Rewards of an episode's calls: r_t = α·process_t + β·speed_t + outcome_t (M2 report §6.1.5), and
the reward-to-go G_t = Σ_{τ ≥ t} γ^(τ−t) r_τ (Eq. 6).

The report gives neither weights nor h nor γ. Ours: the outcome is the percentile of the final
submission on the task's field, divided by 100, and is paid at the last call; process rewards are
paid at their own call; speed is paid at the last call, only when the outcome is positive, against
the median time of the group's successful attempts. α = β = 0 and γ = 1 unless asked for. A call may
also be charged for its length (`length_penalty`, DAPO §3.4 as adopted by MiniMax-M1). Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from rl.types import CallRecord, RewardRecord


@dataclass(frozen=True)
class RewardWeights:
    """`process` α, `speed` β, the clip c of h(x) = clip(1 − x, −c, c), its clock, and γ."""

    process: float = 0.0
    speed: float = 0.0
    speed_clip: float = 0.5
    speed_clock: Literal["wall", "work"] = "wall"
    gamma: float = 1.0


@dataclass(frozen=True)
class LengthPenalty:
    """From `limit` − `buffer` tokens on a call loses up to `penalty`, linearly."""

    limit: int
    buffer: int
    penalty: float = 1.0

    def of(self, tokens: int) -> float:
        """≤ 0: penalty · clip((limit − buffer − tokens) / buffer, −1, 0)."""
        over = (self.limit - self.buffer - tokens) / self.buffer
        return self.penalty * max(-1.0, min(0.0, over))


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


def completion_seconds(
    record: RewardRecord, calls: Sequence[CallRecord], clock: Literal["wall", "work"]
) -> float:
    """T: the whole attempt (`wall`), or its calls and tools only, without waiting in between."""
    if clock == "wall":
        return record.t_wall
    return record.t_tool + sum(call.t_end - call.t_start for call in calls)


def call_rewards(
    records: Sequence[RewardRecord],
    calls: Sequence[Sequence[CallRecord]],
    weights: RewardWeights | None = None,
    length: LengthPenalty | None = None,
) -> list[list[float]]:
    """r_t of each call of each attempt of *one group*. An attempt without calls has one entry.

    Process rewards name calls by `CallRecord.index`; those of a call that is not there count for
    the last one.
    """
    weights = weights or RewardWeights()
    seconds = [
        completion_seconds(record, made, weights.speed_clock)
        for record, made in zip(records, calls, strict=True)
    ]
    done = [
        t
        for record, t in zip(records, seconds, strict=True)
        if record.status == "done" and record.outcome > 0
    ]
    baseline = median(done) if done else 0.0
    out = []
    for record, made, t in zip(records, calls, seconds, strict=True):
        rewards = [0.0] * max(1, len(made))
        rewards[-1] = record.outcome
        if weights.process:
            place = {call.index: i for i, call in enumerate(made)}
            for index, value in record.process:
                rewards[place.get(index, -1)] += weights.process * value
        if weights.speed and record.outcome > 0:
            rewards[-1] += weights.speed * speed_bonus(t, baseline, weights.speed_clip)
        if length is not None:
            for i, call in enumerate(made):
                rewards[i] += length.of(len(call.response_ids))
        out.append(rewards)
    return out


def returns_to_go(rewards: Sequence[float], gamma: float = 1.0) -> list[float]:
    """G_t of every call; G_0 is the episode's return."""
    total = 0.0
    out = []
    for reward in reversed(rewards):
        total = reward + gamma * total
        out.append(total)
    return out[::-1]

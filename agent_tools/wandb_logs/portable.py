"""Detectors for runs of any policy and trainer: trends and shares, no level of one's own model.

`detectors.py` knows the healthy levels of the bundled policy (entropy, gradient norm, learning
rate); these rules compare a run with itself, or a share with a limit that holds for every policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import stdev

from agent_tools.wandb_logs.detectors import (
    MISMATCH_HIGH,
    Finding,
    Point,
    Suggestion,
    apply_rules,
    finding_of_entropy_trend,
    finding_of_grad_spike,
    finding_of_level,
    finding_of_non_finite,
    finding_of_warming_up,
    finite,
    mean,
    thirds,
    window,
)
from agent_tools.wandb_logs.history import RunHistory

REWARD_NOISE = 3.0  # a fall of this many standard errors, and ...
REWARD_SHARE = 0.25  # ... of this share of the largest reward's size, is no noise
REWARD_FLAT = 1e-9  # a reward that never moves by more than this carries no signal
ENTROPY_GONE = 0.1  # last third over first: every sample of a group is the same by now
TRUNCATED = 0.25  # from the start: a quarter of the answers has no end
ZERO_GROUPS = 0.60  # hard or easy prompts alone explain less
CLIP_HIGH = 0.30  # PPO's authors aim at 0.1 to 0.2
KL_UPDATE = 0.10  # nats a token in one update; PPO implementations stop at 0.01 to 0.05
KL_REFERENCE = 2.0  # nats a token: the answers are no longer the reference's language
MISMATCH = 5 * MISMATCH_HIGH  # bfloat16 samplers alone reach 0.01

LOWER_LR = Suggestion("optim.lr", "decrease")


def detect_portable(history: RunHistory) -> list[Finding]:
    """All findings, critical first, then in the order of the rules below."""
    return apply_rules(_RULES, history)


def _reward_falling(history: RunHistory) -> list[Finding]:
    """Down from the best stretch by more than its noise and a quarter of its size."""
    points = finite(history, "reward")
    ends = thirds(points)
    if ends is None:
        return []
    size = len(ends[0])
    stretches = [points[i : i + size] for i in range(len(points) - size + 1)]
    best = max(stretches, key=mean)
    drop = mean(best) - mean(ends[1])
    limit = max(REWARD_NOISE * _error(best, ends[1]), REWARD_SHARE * _scale(points))
    if best[-1][0] >= ends[1][0][0] or drop <= limit or drop <= 0:
        return []
    return [
        Finding(
            "reward_falling", "reward", "critical", points[-1][0], drop, limit,
            f"{window(best)}, then {window(ends[1])}", LOWER_LR,
        )
    ]  # fmt: skip


def _error(first: Sequence[Point], last: Sequence[Point]) -> float:
    """Standard error of the difference of two means; 0 with too few points to tell."""
    parts = [stdev(v for _, v in part) ** 2 / len(part) for part in (first, last) if len(part) > 1]
    return math.sqrt(sum(parts))


def _scale(points: Sequence[Point]) -> float:
    return max(abs(value) for _, value in points)


def _no_signal(history: RunHistory) -> list[Finding]:
    """Every group without spread, or a reward that never moves: there is nothing to learn from."""
    points = finite(history, "reward")
    spread = finite(history, "reward_std")
    if len(points) < 4:
        return []
    low, high = min(v for _, v in points), max(v for _, v in points)
    if high - low > REWARD_FLAT or any(v > REWARD_FLAT for _, v in spread):
        return []
    evidence = f"the reward is {high:.3g} at each of {len(points)} steps: mend the reward function"
    return [
        Finding("reward_constant", "reward", "critical", points[-1][0], high - low, REWARD_FLAT,
                evidence, None)
    ]  # fmt: skip


def _truncated(history: RunHistory) -> list[Finding]:
    return finding_of_level(
        history, "truncated_high", "rollout/truncated_frac", TRUNCATED, "warning",
        Suggestion("rollout.max_new_tokens", "increase"), first_third=True,
    )  # fmt: skip


def _entropy(history: RunHistory) -> list[Finding]:
    return [
        replace(finding, severity="critical") if finding.value < ENTROPY_GONE else finding
        for finding in finding_of_entropy_trend(history)
    ]


def _clip(history: RunHistory) -> list[Finding]:
    return finding_of_level(
        history, "clip_high", "policy/clip_frac", CLIP_HIGH, "warning",
        Suggestion("optim.updates_per_batch", "decrease"),
    )  # fmt: skip


def _kl_update(history: RunHistory) -> list[Finding]:
    return finding_of_level(
        history, "kl_update_high", "policy/kl_update", KL_UPDATE, "warning", LOWER_LR
    )


def _kl_reference(history: RunHistory) -> list[Finding]:
    ends = thirds(finite(history, "policy/kl_reference"))
    if ends is None or mean(ends[1]) <= KL_REFERENCE:
        return []
    return [
        Finding(
            "kl_reference_high", "policy/kl_reference", "warning", ends[1][-1][0], mean(ends[1]),
            KL_REFERENCE, window(ends[1]), LOWER_LR,
        )
    ]  # fmt: skip


def _zero_groups(history: RunHistory) -> list[Finding]:
    if _no_signal(history):
        return []  # said already
    return finding_of_level(
        history, "zero_groups", "group/zero_std_frac", ZERO_GROUPS, "warning",
        Suggestion("rollout.group_size", "increase"),
    )  # fmt: skip


def _mismatch(history: RunHistory) -> list[Finding]:
    return finding_of_level(history, "mismatch_high", "mismatch_kl/mean", MISMATCH, "warning", None)


_RULES: tuple[Callable[[RunHistory], list[Finding]], ...] = (
    finding_of_non_finite,
    _no_signal,
    _reward_falling,
    _entropy,
    _kl_reference,
    _kl_update,
    _truncated,
    _clip,
    finding_of_grad_spike,
    finding_of_warming_up,
    _zero_groups,
    _mismatch,
)

"""Named rules that recognise what goes wrong in an RL run, with evidence and a suggestion.

Pure functions of a history; each rule works on a run of 4 rows as on one of thousands. The first
finding is the most severe; the rules baseline of the loop follows its suggestion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from agent_tools.wandb_logs.history import RunHistory

Direction = Literal["increase", "decrease"]
Severity = Literal["critical", "warning", "info"]
Point = tuple[int, float]

# Thresholds. "Healthy" means the bundled policy at learning rate 3e-4, 24 to 72 scripts a step.
VALID_FALL = 0.20  # share of valid scripts; noise of 24 scripts is 0.07 a step
VALID_LOW = 0.60  # healthy: 0.80 to 0.95 from the first step on
REWARD_FALL = 0.12  # percentile / 100; noise of 24 scripts is 0.06 a step
RATIO_HIGH = 2.0  # largest importance weight; exactly 1 while every update is on-policy
CEILING_BELOW = 0.999  # a weight_max below 1 can only come from a ceiling below 1
CAPPED_HIGH = 0.2  # share of tokens above the ceiling; healthy: 0
CAPPED_ALL = 0.9  # likewise; ratios lie around 1, so only a ceiling below 1 caps nearly all
ENTROPY_COLLAPSE = 0.4  # last third over first; learning alone takes 38 steps to come to 0.55
ENTROPY_RISE = 2.0  # last third over first; healthy entropy falls or stays
ENTROPY_LOW = 0.10  # nats a token at the first step; healthy: 0.12 to 0.18
ENTROPY_HIGH = 0.25  # likewise
ZERO_GROUPS = 0.30  # share of groups without spread, hence without gradient
GRAD_HIGH = 2.0  # norm before clipping; healthy: 0.05 to 0.2
GRAD_SPIKE = 6.0  # times the median of the run
TRUNCATED_HIGH = 0.15  # healthy: below 0.03
TIMEOUTS_HIGH = 0.15  # healthy: below 0.05
LR_RISING = 1.02  # a last step this much above the one before it: still warming up
LR_LOW = 5e-5  # at and below it nothing moves in 25 steps
LR_HIGH = 8e-4  # 6e-4 drifts within 38 steps
MISMATCH_HIGH = 0.01  # sampler and trainer in float32 differ by 1e-6


@dataclass(frozen=True)
class Suggestion:
    """Which configuration key to move, and which way."""

    config_key: str
    direction: Direction


@dataclass(frozen=True)
class Finding:
    """One rule that fired.

    step: where the evidence is strongest; value: what was compared with threshold;
    evidence: the numbers and steps looked at, for people; suggestion: None if no editable key
    would mend it.
    """

    name: str
    key: str
    severity: Severity
    step: int
    value: float
    threshold: float
    evidence: str
    suggestion: Suggestion | None


def detect(history: RunHistory) -> list[Finding]:
    """All findings, critical first, then in the order of the rules below."""
    return apply_rules(_RULES, history)


def apply_rules(
    rules: Sequence[Callable[[RunHistory], list[Finding]]], history: RunHistory
) -> list[Finding]:
    """What the rules find, critical first, then in their order."""
    findings = [finding for rule in rules for finding in rule(history)]
    rank = {"critical": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda finding: rank[finding.severity])  # stable


def finite(history: RunHistory, key: str) -> list[Point]:
    return [point for point in history.series(key) if math.isfinite(point[1])]


def _third(points: Sequence[Point]) -> int:
    """Rows of the window compared at either end: a third, rounded up, so 2 of 4 to 6 rows."""
    return max(1, -(-len(points) // 3))


def mean(points: Sequence[Point]) -> float:
    # Divided one by one: the sum of huge values may overflow.
    return math.fsum(value / len(points) for _, value in points)


def window(points: Sequence[Point]) -> str:
    steps = f"{points[0][0]}-{points[-1][0]}" if len(points) > 1 else f"{points[0][0]}"
    return f"{mean(points):.3g} over steps {steps}"


def thirds(points: Sequence[Point]) -> tuple[Sequence[Point], Sequence[Point]] | None:
    """First and last third; None with fewer than three rows, which show no trend."""
    if len(points) < 3:
        return None
    size = min(_third(points), len(points) // 2)
    return points[:size], points[-size:]


def finding_of_non_finite(history: RunHistory) -> list[Finding]:
    broken: list[tuple[int, str, float]] = []
    for key in history.keys():  # noqa: SIM118 - a method that sorts, not a mapping
        broken += [(step, key, v) for step, v in history.series(key) if not math.isfinite(v)]
    if not broken:
        return []
    step, key, value = min(broken, key=lambda item: (item[0], item[1]))
    keys = len({key for _, key, _ in broken})
    return [
        Finding(
            "non_finite", key, "critical", step, float(len(broken)), 0.0,
            f"{key} is {value} at step {step}; {len(broken)} such values in {keys} keys",
            Suggestion("optim.lr", "decrease"),
        )
    ]  # fmt: skip


def _fall(
    history: RunHistory, name: str, key: str, threshold: float, severity: Severity
) -> list[Finding]:
    """Mean of the first third minus mean of the last third, at least `threshold`."""
    points = finite(history, key)
    ends = thirds(points)
    if ends is None:
        return []
    drop = mean(ends[0]) - mean(ends[1])
    if drop < threshold:
        return []
    lowest = min(points, key=lambda point: point[1])[0]
    return [
        Finding(
            name, key, severity, lowest, drop, threshold,
            f"{window(ends[0])}, then {window(ends[1])}",
            Suggestion("optim.lr", "decrease"),
        )
    ]  # fmt: skip


def _ratio_blowup(history: RunHistory) -> list[Finding]:
    key = "loss/cispo/weight_max"
    return _peak(
        history, "ratio_blowup", key, RATIO_HIGH, "warning",
        Suggestion("optim.updates_per_batch", "decrease"),
    )  # fmt: skip


def _valid_falling(history: RunHistory) -> list[Finding]:
    return _fall(history, "valid_falling", "rollout/valid_frac", VALID_FALL, "critical")


def _reward_falling(history: RunHistory) -> list[Finding]:
    return _fall(history, "reward_falling", "reward/mle/mean", REWARD_FALL, "warning")


def _ceiling_below_one(history: RunHistory) -> list[Finding]:
    """Seen in the weights (all below 1) or in the share of capped tokens (nearly all)."""
    hint = Suggestion("cispo.is_weight_max", "increase")
    weights = finite(history, "loss/cispo/weight_max")
    if weights and max(value for _, value in weights) < CEILING_BELOW:
        step, value = max(weights, key=lambda point: point[1])
        evidence = f"largest importance weight {value:.3g}: every token is capped"
        return [
            Finding(
                "ceiling_below_one", "loss/cispo/weight_max", "critical", step, value,
                CEILING_BELOW, evidence, hint,
            )
        ]  # fmt: skip
    key = "loss/cispo/capped_frac"
    return finding_of_level(history, "ceiling_below_one", key, CAPPED_ALL, "critical", hint)


def _capped(history: RunHistory) -> list[Finding]:
    if _ceiling_below_one(history):
        return []  # said already
    return finding_of_level(
        history, "capped_high", "loss/cispo/capped_frac", CAPPED_HIGH, "warning",
        Suggestion("cispo.is_weight_max", "increase"),
    )  # fmt: skip


def _entropy(history: RunHistory) -> list[Finding]:
    """Wrong from the start: the sampling temperature; wrong later: the updates did it."""
    key = "policy/entropy"
    points = finite(history, key)
    if not points:
        return []
    step, first = points[0]
    start = f"{first:.3g} nats a token at step {step}"
    if first < ENTROPY_LOW:
        hint = Suggestion("rollout.temperature", "increase")
        return [Finding("entropy_low", key, "warning", step, first, ENTROPY_LOW, start, hint)]
    if first > ENTROPY_HIGH:
        hint = Suggestion("rollout.temperature", "decrease")
        return [Finding("entropy_high", key, "warning", step, first, ENTROPY_HIGH, start, hint)]
    return finding_of_entropy_trend(history)


def finding_of_entropy_trend(history: RunHistory) -> list[Finding]:
    """The last third far below or above the first."""
    key = "policy/entropy"
    points = finite(history, key)
    ends = thirds(points)
    if ends is None:
        return []
    ratio = mean(ends[1]) / mean(ends[0]) if mean(ends[0]) > 0 else 1.0
    evidence = f"{window(ends[0])}, then {window(ends[1])}"
    hint = Suggestion("optim.lr", "decrease")
    last = points[-1][0]
    if ratio < ENTROPY_COLLAPSE:
        return [
            Finding(
                "entropy_collapse", key, "warning", last, ratio, ENTROPY_COLLAPSE, evidence, hint
            )
        ]
    if ratio > ENTROPY_RISE:
        return [
            Finding("entropy_rising", key, "warning", last, ratio, ENTROPY_RISE, evidence, hint)
        ]
    return []


def _truncated(history: RunHistory) -> list[Finding]:
    return finding_of_level(
        history, "truncated_high", "rollout/truncated_frac", TRUNCATED_HIGH, "warning",
        Suggestion("rollout.max_new_tokens", "increase"), first_third=True,
    )  # fmt: skip


def _timeouts(history: RunHistory) -> list[Finding]:
    return finding_of_level(
        history, "timeouts_high", "rollout/timeout_frac", TIMEOUTS_HIGH, "warning",
        Suggestion("env.cpu_seconds", "increase"), first_third=True,
    )  # fmt: skip


def _valid_low(history: RunHistory) -> list[Finding]:
    """Low from the first rows on, with neither truncation nor time limit to blame."""
    key = "rollout/valid_frac"
    points = finite(history, key)
    if not points or _truncated(history) or _timeouts(history):
        return []
    head = points[: _third(points)]
    if mean(head) >= VALID_LOW:
        return []
    return [
        Finding(
            "valid_low", key, "warning", head[0][0], mean(head), VALID_LOW, window(head),
            Suggestion("rollout.temperature", "decrease"),
        )
    ]  # fmt: skip


def _zero_groups(history: RunHistory) -> list[Finding]:
    return finding_of_level(
        history, "zero_groups", "group/zero_std_frac", ZERO_GROUPS, "warning",
        Suggestion("rollout.group_size", "increase"),
    )  # fmt: skip


def _grad(history: RunHistory) -> list[Finding]:
    key = "policy/grad_norm"
    hint = Suggestion("optim.lr", "decrease")
    high = _peak(history, "grad_high", key, GRAD_HIGH, "warning", hint)
    return high or finding_of_grad_spike(history)


def finding_of_grad_spike(history: RunHistory) -> list[Finding]:
    """The largest norm against the run's median."""
    key = "policy/grad_norm"
    points = finite(history, key)
    if len(points) < 4:
        return []
    typical = median(value for _, value in points)
    step, value = max(points, key=lambda point: point[1])
    if typical <= 0 or value / typical < GRAD_SPIKE:
        return []
    evidence = f"{value:.3g} at step {step}, median {typical:.3g}"
    hint = Suggestion("optim.lr", "decrease")
    return [
        Finding("grad_spike", key, "warning", step, value / typical, GRAD_SPIKE, evidence, hint)
    ]


def finding_of_warming_up(history: RunHistory) -> list[Finding]:
    key = "optim/lr"
    points = finite(history, key)
    if len(points) < 2 or points[-2][1] <= 0:
        return []
    step, value = points[-1]
    growth = value / points[-2][1]
    if growth < LR_RISING:
        return []
    evidence = f"{points[-2][1]:.3g} at step {points[-2][0]}, {value:.3g} at step {step}, the last"
    hint = Suggestion("optim.warmup_steps", "decrease")
    return [Finding("warming_up", key, "warning", step, growth, LR_RISING, evidence, hint)]


def _lr_range(history: RunHistory) -> list[Finding]:
    key = "optim/lr"
    points = finite(history, key)
    if not points:
        return []
    step, top = max(points, key=lambda point: point[1])
    evidence = f"largest learning rate {top:.3g}, at step {step}"
    if top <= LR_LOW and not finding_of_warming_up(history):
        hint = Suggestion("optim.lr", "increase")
        return [Finding("lr_low", key, "warning", step, top, LR_LOW, evidence, hint)]
    if top >= LR_HIGH:
        hint = Suggestion("optim.lr", "decrease")
        return [Finding("lr_high", key, "info", step, top, LR_HIGH, evidence, hint)]
    return []


def _mismatch(history: RunHistory) -> list[Finding]:
    return finding_of_level(
        history, "mismatch_high", "mismatch_kl/mean", MISMATCH_HIGH, "warning", None
    )


def _peak(
    history: RunHistory, name: str, key: str, threshold: float, severity: Severity,
    suggestion: Suggestion | None,
) -> list[Finding]:  # fmt: skip
    """The largest value of the run, above `threshold`."""
    points = finite(history, key)
    if not points:
        return []
    step, value = max(points, key=lambda point: point[1])
    if value <= threshold:
        return []
    above = sum(v > threshold for _, v in points)
    evidence = f"{value:.3g} at step {step}; above in {above} of {len(points)} rows"
    return [Finding(name, key, severity, step, value, threshold, evidence, suggestion)]


def finding_of_level(
    history: RunHistory, name: str, key: str, threshold: float, severity: Severity,
    suggestion: Suggestion | None, *, first_third: bool = False,
) -> list[Finding]:  # fmt: skip
    """A mean above `threshold`: over the run, or over its first third.

    The first third tells a limit that was too tight from the start from a policy that breaks
    later and then runs into the limit.
    """
    points = finite(history, key)
    if not points:
        return []
    part = points[: _third(points)] if first_third else points
    value = mean(part)
    if value <= threshold:
        return []
    return [Finding(name, key, severity, part[0][0], value, threshold, window(part), suggestion)]


_RULES: tuple[Callable[[RunHistory], list[Finding]], ...] = (
    finding_of_non_finite,
    _ceiling_below_one,
    _ratio_blowup,
    _valid_falling,
    _truncated,
    _timeouts,
    _entropy,
    _valid_low,
    _grad,
    _reward_falling,
    finding_of_warming_up,
    _lr_range,
    _zero_groups,
    _capped,
    _mismatch,
)

"""Each detector fires on its fault, on short and long runs, and on nothing healthy."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_tools.wandb_logs import DEFAULT_KEYS, Finding, RunHistory, Suggestion, detect

LENGTHS = [4, 5, 6, 40, 400]


def healthy(length: int, seed: int = 0) -> dict[str, list[float]]:
    """A run of the bundled policy at 3e-4, with the noise of 24 scripts a step."""
    rng = random.Random(seed)
    return {
        "reward/mle/mean": [0.40 + 0.06 * rng.uniform(-1, 1) for _ in range(length)],
        "rollout/valid_frac": [0.85 + 0.07 * rng.uniform(-1, 1) for _ in range(length)],
        "rollout/truncated_frac": [rng.choice([0, 0, 1 / 24]) for _ in range(length)],
        "rollout/timeout_frac": [rng.choice([0, 0, 1 / 24]) for _ in range(length)],
        "policy/entropy": [0.2 * rng.uniform(0.85, 1.15) for _ in range(length)],
        "policy/grad_norm": [0.09 * rng.uniform(0.6, 1.6) for _ in range(length)],
        "loss/cispo/weight_max": [1.0 + 1e-6 * rng.uniform(-1, 1) for _ in range(length)],
        "loss/cispo/capped_frac": [0.0] * length,
        "group/zero_std_frac": [rng.choice([0, 0, 1 / 3]) for _ in range(length)],
        "mismatch_kl/mean": [1e-7] * length,
        "optim/lr": [3e-4] * length,
    }


def run(columns: dict[str, list[float]]) -> RunHistory:
    length = max(len(values) for values in columns.values())
    return RunHistory(
        [
            {"step": i + 1, **{k: v[i] for k, v in columns.items() if i < len(v)}}
            for i in range(length)
        ]
    )


def ramp(start: float, end: float, length: int) -> list[float]:
    return [start + (end - start) * i / (length - 1) for i in range(length)]


def flat(value: float):
    return lambda length: [value] * length


FAULTS = [
    ("valid_falling", "rollout/valid_frac", lambda n: ramp(0.85, 0.2, n), "optim.lr", "decrease"),
    ("reward_falling", "reward/mle/mean", lambda n: ramp(0.42, 0.1, n), "optim.lr", "decrease"),
    ("ratio_blowup", "loss/cispo/weight_max", flat(4.0), "optim.updates_per_batch", "decrease"),
    ("ceiling_below_one", "loss/cispo/weight_max", flat(0.5), "cispo.is_weight_max", "increase"),
    ("ceiling_below_one", "loss/cispo/capped_frac", flat(0.99), "cispo.is_weight_max", "increase"),
    ("capped_high", "loss/cispo/capped_frac", flat(0.5), "cispo.is_weight_max", "increase"),
    ("entropy_collapse", "policy/entropy", lambda n: ramp(0.2, 0.01, n), "optim.lr", "decrease"),
    ("entropy_rising", "policy/entropy", lambda n: ramp(0.2, 2.0, n), "optim.lr", "decrease"),
    ("entropy_low", "policy/entropy", flat(0.02), "rollout.temperature", "increase"),
    ("entropy_high", "policy/entropy", flat(0.9), "rollout.temperature", "decrease"),
    ("valid_low", "rollout/valid_frac", flat(0.3), "rollout.temperature", "decrease"),
    ("zero_groups", "group/zero_std_frac", flat(0.7), "rollout.group_size", "increase"),
    ("grad_high", "policy/grad_norm", flat(8.0), "optim.lr", "decrease"),
    (
        "grad_spike", "policy/grad_norm", lambda n: [0.08] * (n - 1) + [0.9],
        "optim.lr", "decrease",
    ),
    (
        "non_finite", "policy/grad_norm", lambda n: [0.08] * (n - 1) + [math.nan],
        "optim.lr", "decrease",
    ),
    (
        "truncated_high", "rollout/truncated_frac", flat(0.5),
        "rollout.max_new_tokens", "increase",
    ),
    ("timeouts_high", "rollout/timeout_frac", flat(0.5), "env.cpu_seconds", "increase"),
    ("warming_up", "optim/lr", lambda n: ramp(1e-6, 3e-4, n), "optim.warmup_steps", "decrease"),
    ("lr_low", "optim/lr", flat(1e-5), "optim.lr", "increase"),
    ("lr_high", "optim/lr", flat(3e-3), "optim.lr", "decrease"),
]  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_no_finding(length, seed):
    assert detect(run(healthy(length, seed))) == []


@pytest.mark.parametrize("length", [4, 6, 40])
@pytest.mark.parametrize(("name", "key", "make", "config_key", "direction"), FAULTS)
def test_one_fault_gives_its_one_finding(name, key, make, config_key, direction, length):
    if name == "warming_up" and length == 40:
        length = 12  # of 40 steps of one warm-up the last is a smaller share than the threshold
    findings = detect(run({**healthy(length), key: make(length)}))
    assert [finding.name for finding in findings] == [name]
    finding = findings[0]
    assert finding.key == key
    assert finding.suggestion == Suggestion(config_key, direction)
    assert 1 <= finding.step <= length
    assert finding.evidence


def test_a_mismatch_of_sampler_and_trainer_suggests_no_key():
    (finding,) = detect(run({**healthy(5), "mismatch_kl/mean": [0.5] * 5}))
    assert (finding.name, finding.suggestion) == ("mismatch_high", None)


def test_a_finished_warm_up_is_healthy_and_a_slow_one_is_not_called_a_low_rate():
    warm = ramp(6e-5, 3e-4, 5) + [3e-4] * 3
    assert detect(run({**healthy(8), "optim/lr": warm})) == []
    slow = [3e-6 * (i + 1) for i in range(5)]
    findings = detect(run({**healthy(5), "optim/lr": slow}))
    assert [finding.name for finding in findings] == ["warming_up"]


def test_invalid_scripts_are_blamed_on_the_limit_that_cut_them():
    cut = {"rollout/valid_frac": [0.3] * 5, "rollout/truncated_frac": [0.6] * 5}
    assert [f.name for f in detect(run({**healthy(5), **cut}))] == ["truncated_high"]
    slow = {"rollout/valid_frac": [0.3] * 5, "rollout/timeout_frac": [0.6] * 5}
    assert [f.name for f in detect(run({**healthy(5), **slow}))] == ["timeouts_high"]


def test_a_policy_that_breaks_and_then_rambles_is_not_blamed_on_the_token_limit():
    broken = {
        "rollout/valid_frac": [0.85, 0.8, 0.4, 0.1, 0.0],
        "rollout/truncated_frac": [0.0, 0.0, 0.3, 0.8, 1.0],
    }
    assert [f.name for f in detect(run({**healthy(5), **broken}))] == ["valid_falling"]


def test_the_most_severe_finding_comes_first():
    both = {"optim/lr": [3e-3] * 5, "reward/mle/mean": ramp(0.4, 0.1, 5),
            "rollout/valid_frac": ramp(0.85, 0.1, 5)}  # fmt: skip
    findings = detect(run({**healthy(5), **both}))
    assert [(f.name, f.severity) for f in findings] == [
        ("valid_falling", "critical"), ("reward_falling", "warning"), ("lr_high", "info"),
    ]  # fmt: skip


def test_the_end_of_a_run_is_looked_at():
    late = [0.08] * 5000 + [math.inf]
    findings = detect(run({"policy/grad_norm": late}))
    assert findings[0].name == "non_finite" and findings[0].step == 5001


SERIES = st.lists(
    st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -1e308, 1e308, 5e-324])), max_size=30
)
KEYS = [*DEFAULT_KEYS, "group/zero_std_frac", "loss/cispo/capped_frac", "mismatch_kl/mean", "z"]


@given(st.dictionaries(st.sampled_from(KEYS), SERIES, min_size=1), st.randoms())
def test_no_series_breaks_the_detectors_and_the_order_of_keys_is_irrelevant(columns, rng):
    findings = detect(run(columns))
    assert all(isinstance(finding, Finding) for finding in findings)
    assert all(math.isfinite(f.value) or abs(f.value) == math.inf for f in findings)
    shuffled = list(columns)
    rng.shuffle(shuffled)
    assert detect(run({key: columns[key] for key in shuffled})) == findings
    assert detect(RunHistory([])) == []

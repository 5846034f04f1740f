"""Group baselines, rewards, expert pool, step figures: the arithmetic without torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.advantages import group_advantages
from rl.config import StopSection
from rl.engine import derive_seed
from rl.expert_iteration import ExpertPool, round_ends
from rl.rewards import RewardWeights, call_rewards, percentile_reward, speed_bonus
from rl.rollout import plan_step
from rl.step_metrics import Counts, drift, rollout_metrics
from rl.types import CallRecord, Episode, RewardRecord, ScriptOutcome, Task


def test_leave_one_out_and_batch_normalisation() -> None:
    returns, groups = [1.0, 0.0, 0.5, 0.2, 0.8], [0, 0, 0, 1, 1]
    raw = [1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5, 0.2 - 0.8, 0.8 - 0.2]
    out = group_advantages(returns, groups)
    assert np.allclose(out.values, np.asarray(raw) / np.std(raw), atol=1e-12)
    assert float(out.values.std()) == pytest.approx(1.0)
    assert (out.zero_std_groups, out.groups) == (0, 2)


def test_better_attempts_get_positive_advantages() -> None:
    values = group_advantages([0.9, 0.1], [0, 0]).values
    assert values[0] > 0 > values[1]


def test_groups_without_spread_get_zero_within_tolerance() -> None:
    out = group_advantages([0.3, 0.3 + 1e-12, 0.1, 0.9], [0, 0, 1, 1])
    assert out.values[:2].tolist() == [0.0, 0.0]
    assert out.zero_std_frac == 0.5


@pytest.mark.parametrize("returns", [[0.4] * 6, [0.0] * 6])
def test_a_batch_of_equal_rewards_is_all_zero_and_not_nan(returns: list[float]) -> None:
    out = group_advantages(returns, [0, 0, 0, 1, 1, 1])
    assert out.values.tolist() == [0.0] * 6
    assert out.zero_std_frac == 1.0


def test_single_survivors_and_empty_batches() -> None:
    assert group_advantages([0.7], [3]).values.tolist() == [0.0]
    assert group_advantages([], []).values.tolist() == []
    with pytest.raises(ValueError, match="finite"):
        group_advantages([math.nan, 1.0], [0, 0])


def test_percentile_reward() -> None:
    assert percentile_reward(37.0, valid=True) == 0.37
    assert percentile_reward(37.0, valid=False) == 0.0
    with pytest.raises(ValueError, match="outside"):
        percentile_reward(101.0, valid=True)


def test_speed_is_paid_only_on_success_and_against_the_groups_median() -> None:
    records = [
        RewardRecord("a", 0.5, t_wall=1.0),
        RewardRecord("b", 0.5, t_wall=3.0),
        RewardRecord("c", 0.0, t_wall=0.1),
    ]
    out = call_rewards(records, [[], [], []], RewardWeights(speed=0.2))
    assert [total for (total,) in out] == pytest.approx([0.5 + 0.2 * 0.5, 0.5 - 0.2 * 0.5, 0.0])
    assert call_rewards(records, [[], [], []]) == [[0.5], [0.5], [0.0]]
    assert speed_bonus(1.0, 0.0, 0.5) == 0.0


def test_competitions_are_taken_in_turn_and_seeds_are_distinct() -> None:
    tasks = [Task(name, (), Path(), "dev") for name in "abcd"]
    plans = [
        plan_step(tasks, seed=0, step=s, groups=3, group_size=2, temperature=1.0, max_tokens=8)
        for s in (1, 2)
    ]
    assert [t.id for t in plans[0]] == list("aabbcc")
    assert [t.id for t in plans[1]] == list("ddaabb")
    seeds = {t.sampling.seed for plan in plans for t in plan}
    assert len(seeds) == 12
    assert derive_seed(0, 1, 0, 0) == plans[0][0].sampling.seed
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_expert_pool_keeps_the_best_distinct_scripts() -> None:
    pool = ExpertPool(keep=2)
    for script, reward in [("a", 0.2), ("b", 0.9), ("b", 0.9), ("c", 0.5), ("d", 0.0), ("e", 0.5)]:
        pool.add("x", script, reward, [1], [ord(script)])
    assert [chr(e.response_ids[0]) for e in pool.experts()] == ["b", "c"]
    again = ExpertPool(keep=2)
    again.restore(pool.state())
    assert again.experts() == pool.experts()
    drawn = pool.draw(seed=0, step=4, updates=3, batch=2)
    assert drawn == again.draw(seed=0, step=4, updates=3, batch=2)
    assert [len(batch) for batch in drawn] == [2, 2, 2]
    counts = [sum(e == expert for batch in drawn for e in batch) for expert in pool.experts()]
    assert counts == [3, 3]
    assert ExpertPool(1).draw(seed=0, step=1, updates=1, batch=1) == []


def test_rounds_end_at_their_steps_and_at_the_last() -> None:
    assert [s for s in range(1, 8) if round_ends(s, 7, 3)] == [3, 6, 7]


def episode(status: str = "ok", reward: str = "done", percentile: float = 50.0) -> Episode:
    call = CallRecord("e", 0, 0, (1,), (2, 3), (-1.0, -1.0), ((0, 2, 0),), "length", 0, 0)
    script = ScriptOutcome("s", status, status == "ok", 1.0, percentile, cpu_s=0.5)
    record = RewardRecord("e", percentile / 100, status=reward)  # type: ignore[arg-type]
    return Episode("e", "x", 0, 0, (call,), (script,), record)


def test_infrastructure_errors_are_left_out_of_figures_and_counted() -> None:
    batch = [episode(), episode("timeout", "timeout", 0.0), episode("infra", "env_error", 0.0)]
    figures = rollout_metrics(batch, ["x", "y"])
    assert figures["reward/mle/mean"] == figures["reward/x/mean"] == 0.25
    assert "reward/y/mean" not in figures
    assert figures["rollout/valid_frac"] == figures["rollout/timeout_frac"] == 0.5
    assert figures["rollout/infra_frac"] == pytest.approx(1 / 3)
    assert figures["rollout/truncated_frac"] == 1.0
    totals = Counts().plus(batch, 2.0)
    assert (totals.scripts, totals.infra, totals.tokens) == (3, 1, 6)
    assert totals.infra_share == pytest.approx(1 / 3)


def test_stop_rule_needs_both_signs_of_drift() -> None:
    def rows(norm: float, valid: float) -> list[dict[str, Any]]:
        usual = {"policy/grad_norm": 0.1, "rollout/valid_frac": 0.9}
        last = {"step": 11, "policy/grad_norm": norm, "rollout/valid_frac": valid}
        return [{"step": i, **usual} for i in range(1, 11)] + [last]

    rule = StopSection(rule="drift")
    assert "step 11" in str(drift(rows(0.3, 0.7), rule))
    assert drift(rows(0.3, 0.9), rule) is None
    assert drift(rows(0.15, 0.5), rule) is None
    assert drift(rows(0.3, 0.7), StopSection()) is None
    without_scripts = [
        {k: v for k, v in row.items() if not k.endswith("valid_frac")} for row in rows(0.3, 0.7)
    ]
    assert drift(without_scripts, rule) is None

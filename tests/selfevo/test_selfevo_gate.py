"""The gate against scipy, and its properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selfevo.gate import Budget, SeedScore, decide, pooled_variance, seed_score


def arm(*scores: float, sampling: float = 0.0, infra: int = 0) -> list[SeedScore]:
    return [SeedScore(i, s, sampling, 32, infra) for i, s in enumerate(scores)]


def test_equals_the_two_sample_t_test_of_scipy() -> None:
    a, b = [38.0, 41.0, 44.5], [47.0, 52.0, 49.0]
    result = decide(arm(*a), arm(*b), alpha=0.05, rounds=1)
    expected = stats.ttest_ind(b, a, equal_var=True, alternative="greater")
    assert result.t == pytest.approx(expected.statistic)
    assert result.p_better == pytest.approx(expected.pvalue)
    assert result.df == 4 and result.verdict == "accept"


def test_pools_the_variance_of_every_arm() -> None:
    others = [arm(10.0, 20.0), arm(70.0, 71.0, 75.0)]
    result = decide(arm(40.0, 42.0), arm(50.0, 53.0), others, alpha=0.05, rounds=1)
    groups = [[40, 42], [50, 53], [10, 20], [70, 71, 75]]
    total = sum(sum((x - sum(g) / len(g)) ** 2 for x in g) for g in groups)
    variance = total / 5
    assert result.df == 5 and result.seed_sd == pytest.approx(math.sqrt(variance))
    t = 10.5 / math.sqrt(variance * (1 / 2 + 1 / 2))
    assert result.p_better == pytest.approx(stats.t.sf(t, 5))
    assert pooled_variance([arm(1.0)]) == (0.0, 0)


def test_sampling_variance_is_a_floor() -> None:
    calm = decide(arm(40.0, 40.1), arm(45.0, 45.1), alpha=0.05, rounds=1)
    noisy = decide(
        arm(40.0, 40.1, sampling=25.0), arm(45.0, 45.1, sampling=25.0), alpha=0.05, rounds=1
    )
    assert calm.verdict == "accept" and noisy.verdict == "indecisive"
    assert noisy.standard_error == pytest.approx(5.0)


def test_alpha_is_shared_by_the_rounds() -> None:
    control, candidate = arm(40.0, 44.0), arm(52.0, 56.0)
    one = decide(control, candidate, alpha=0.05, rounds=1)
    ten = decide(control, candidate, alpha=0.05, rounds=10)
    assert one.verdict == "accept" and ten.verdict == "indecisive"
    assert ten.alpha_round == pytest.approx(0.005)


def test_smallest_effect_is_where_the_verdict_flips() -> None:
    base = decide(arm(40.0, 44.0), arm(42.0, 46.0), alpha=0.05, rounds=2)
    assert base.smallest_effect is not None
    for factor, verdict in ((0.999, "indecisive"), (1.001, "accept")):
        shift = base.smallest_effect * factor
        moved = decide(arm(40.0, 44.0), arm(40.0 + shift, 44.0 + shift), alpha=0.05, rounds=2)
        assert moved.verdict == verdict


def test_no_op_is_indecisive_with_and_without_variance() -> None:
    same = decide(arm(40.0, 43.0), arm(40.0, 43.0), alpha=0.05, rounds=1)
    assert same.verdict == "indecisive" and same.p_better == pytest.approx(0.5)
    flat = decide(arm(40.0, 40.0), arm(40.0, 40.0), alpha=0.05, rounds=1)
    assert flat.verdict == "indecisive" and flat.p_better is None


def test_infrastructure_errors_make_it_indecisive() -> None:
    result = decide(arm(10.0, 11.0), arm(80.0, 81.0, infra=10), alpha=0.05, rounds=1)
    assert result.verdict == "indecisive" and "machine" in result.reason
    assert result.infra_share == pytest.approx(20 / 148)


def test_a_larger_allowed_budget_blocks_an_accept_but_not_a_reject() -> None:
    better = decide(arm(10.0, 11.0), arm(80.0, 81.0), alpha=0.05, rounds=1, budget_ratio=1.2)
    worse = decide(arm(80.0, 81.0), arm(10.0, 11.0), alpha=0.05, rounds=1, budget_ratio=1.2)
    assert better.verdict == "indecisive" and "budget" in better.reason
    assert worse.verdict == "reject"
    assert Budget(120, 256, 3.0).ratio(Budget(120, 128, 6.0)) == 2.0


def test_single_seeds_are_indecisive() -> None:
    assert decide(arm(0.0), arm(99.0), alpha=0.05, rounds=1).verdict == "indecisive"


scores = st.lists(st.floats(0, 100), min_size=2, max_size=5)


@given(scores, scores, st.floats(0, 50))
def test_swapping_the_arms_mirrors_the_verdict(
    a: list[float], b: list[float], sampling: float
) -> None:
    forward = decide(arm(*a, sampling=sampling), arm(*b, sampling=sampling), alpha=0.1, rounds=2)
    back = decide(arm(*b, sampling=sampling), arm(*a, sampling=sampling), alpha=0.1, rounds=2)
    mirror = {"accept": "reject", "reject": "accept", "indecisive": "indecisive"}
    assert back.verdict == mirror[forward.verdict]
    assert back.difference == pytest.approx(-forward.difference)


@given(scores, st.floats(0, 50))
def test_an_arm_against_itself_is_indecisive(a: list[float], sampling: float) -> None:
    result = decide(arm(*a, sampling=sampling), arm(*a, sampling=sampling), alpha=0.4, rounds=1)
    assert result.verdict == "indecisive"


def test_seed_score_weighs_competitions_equally_and_zeroes_invalid() -> None:
    found = seed_score(3, {"a": [0.0, 100.0], "b": [10.0, 10.0, 10.0, 10.0]}, infra=2)
    assert found.score == pytest.approx(30.0)
    assert found.sampling_var == pytest.approx((5000 / 2) / 4)
    assert found.samples == 6 and found.infra == 2
    with pytest.raises(ValueError, match="no graded script"):
        seed_score(0, {"a": []})

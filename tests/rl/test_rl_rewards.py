"""Rewards, rewards-to-go, baselines and normalisation against naive float64 versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.advantages import group_advantages
from rl.config import RunConfig, validate
from rl.errors import ConfigError, RecordError
from rl.rewards import (
    LengthPenalty,
    RewardWeights,
    call_rewards,
    completion_seconds,
    returns_to_go,
)
from rl.samples import Sample, check_call, dead_groups, make_batch, minibatches, rewards_to_go
from rl.types import CallRecord, Episode, RewardRecord, ScriptOutcome

finite = st.floats(-3, 3, allow_nan=False)


def call(episode: str, index: int, tokens: int = 3, finish: str = "stop") -> CallRecord:
    ids = tuple(range(1, tokens + 1))
    spans = ((0, tokens, 0),)
    return CallRecord(
        episode, 0, index, (1, 2), ids, (-0.5,) * tokens, spans, finish, 10.0, 10.0 + tokens
    )


def episode(
    name: str, group: int, outcome: float, *, calls: int = 1, domain: str = "mle", **reward: object
) -> Episode:
    made = tuple(call(name, i) for i in range(calls))
    script = ScriptOutcome("s", "ok", True, outcome, 100 * outcome)
    record = RewardRecord(name, outcome, **reward)  # type: ignore[arg-type]
    return Episode(name, "t", group, 0, made, (script,), record, domain)


def config(**changes: object) -> RunConfig:
    return validate(RunConfig, changes, "test")


@given(st.lists(finite, min_size=1, max_size=9), st.floats(0.1, 1.0))
def test_reward_to_go_is_the_discounted_sum_of_what_follows(
    rewards: list[float], gamma: float
) -> None:
    naive = [
        sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards)))
        for t in range(len(rewards))
    ]
    assert returns_to_go(rewards, gamma) == pytest.approx(naive, abs=1e-12)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1),
            st.lists(st.tuples(st.integers(0, 3), finite), max_size=5),
            st.floats(0.1, 9),
            st.sampled_from(["done", "timeout"]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.floats(-1, 1),
    st.floats(0, 1),
)
def test_reward_is_process_speed_and_outcome(
    made: list[tuple[float, list[tuple[int, float]], float, str]], alpha: float, beta: float
) -> None:
    turns = 3  # call 3 does not exist: its reward goes to the last
    records = [
        RewardRecord(str(i), outcome, tuple(process), t_wall=t, status=status)  # type: ignore[arg-type]
        for i, (outcome, process, t, status) in enumerate(made)
    ]
    calls = [[call(r.episode, i) for i in range(turns)] for r in records]
    out = call_rewards(records, calls, RewardWeights(alpha, beta, 0.5))
    good = sorted(t for outcome, _, t, status in made if status == "done" and outcome > 0)
    half = len(good) // 2
    base = 0.0
    if good:
        base = good[half] if len(good) % 2 else (good[half - 1] + good[half]) / 2
    for (outcome, process, t, _), rewards in zip(made, out, strict=True):
        h = min(0.5, max(-0.5, 1 - t / base)) if base else 0.0
        for k in range(turns):
            last = k == turns - 1
            r = sum(alpha * v for index, v in process if index == k or (last and index > k))
            r += (outcome + (beta * h if outcome > 0 else 0.0)) if last else 0.0
            assert rewards[k] == pytest.approx(r, abs=1e-12)


def test_the_speed_clock_may_leave_waiting_out() -> None:
    record = RewardRecord("a", 1.0, t_wall=50.0, t_tool=4.0)
    assert completion_seconds(record, [call("a", 0, 3), call("a", 1, 2)], "wall") == 50.0
    assert completion_seconds(record, [call("a", 0, 3), call("a", 1, 2)], "work") == 4.0 + 3 + 2


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0.0), (70, 0.0), (85, -0.5), (99, -29 / 30), (100, -1.0), (200, -1.0)]
)
def test_length_penalty_is_linear_inside_its_buffer(tokens: int, value: float) -> None:
    assert LengthPenalty(100, 30).of(tokens) == pytest.approx(value)


groups_and_returns = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([0.0, 0.1, 0.4, 0.7, 1.0]),
        st.lists(finite, max_size=3),
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=200)
@given(groups_and_returns, st.sampled_from(["batch", "group"]))
def test_advantages_equal_the_naive_formula(
    attempts: list[tuple[int, float, list[float]]], spread: str
) -> None:
    domains = {0: "code", 1: "code", 2: "mle", 3: "mle"}
    returns, groups = [r for _, r, _ in attempts], [g for g, _, _ in attempts]
    found = group_advantages(returns, groups, [domains[g] for g in groups], spread)  # type: ignore[arg-type]
    raw, base = [], []
    for i, (group, value, _) in enumerate(attempts):
        others = [r for j, (g, r, _) in enumerate(attempts) if g == group and j != i]
        mine = [r for g, r, _ in attempts if g == group]
        live = bool(others) and max(mine) > min(mine)
        base.append(math.fsum(others) / len(others) if live else None)
        raw.append(value - base[-1] if base[-1] is not None else 0.0)
    for i, (group, _, later) in enumerate(attempts):
        same = [
            raw[j]
            for j, (g, _, _) in enumerate(attempts)
            if (g == group if spread == "group" else domains[g] == domains[group])
        ]
        mean = math.fsum(same) / len(same)
        sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in same) / len(same))
        sigma = sigma if sigma > 1e-9 else 1.0
        assert found.values[i] == pytest.approx(raw[i] / sigma, abs=1e-12)
        expected = [0.0 if base[i] is None else (g - base[i]) / sigma for g in later]
        assert found.of_calls(i, later) == pytest.approx(expected, abs=1e-12)


def test_grpo_is_return_minus_mean_over_the_groups_deviation() -> None:
    returns = [0.1, 0.9, 0.4, 0.4, 3.0, 5.0, 4.5, 3.0]
    found = group_advantages(returns, [0] * 4 + [1] * 4, None, "group")
    for part in (np.array(returns[:4]), np.array(returns[4:])):
        expected = (part - part.mean()) / part.std()
        mine = found.values[:4] if part[0] == 0.1 else found.values[4:]
        assert np.allclose(mine, expected, atol=1e-12)


def test_a_domain_of_wide_rewards_does_not_drown_another() -> None:
    returns, groups = [0.0, 1.0, 0.0, 100.0], [0, 0, 1, 1]
    apart = group_advantages(returns, groups, ["a", "a", "b", "b"]).values
    assert apart.tolist() == [-1.0, 1.0, -1.0, 1.0]
    together = group_advantages(returns, groups).values
    assert abs(together[0]) < 0.02


def test_process_rewards_reach_only_the_calls_up_to_their_own() -> None:
    run = config(reward={"process": 1.0}, rollout={"turns": 3})
    first = episode("a", 0, 0.0, calls=3, process=((1, 0.5),))
    batch = make_batch([first, episode("b", 0, 0.25, calls=3)], run, "batch")
    assert rewards_to_go([first], run) == [[0.5, 0.5, 0.0]]
    # baselines 0.25 and 0.5; deviation of (0.25, −0.25)
    assert [s.advantage for s in batch.samples] == pytest.approx([1, 1, -1, -1, -1, -1])


def test_cut_replies_are_trained_masked_or_charged() -> None:
    cut = episode("a", 0, 0.5)
    cut = Episode(**{**cut.__dict__, "calls": (call("a", 0, 16, "length"),)})
    whole = episode("b", 0, 0.1)

    def batch(rule: str):  # type: ignore[no-untyped-def]
        truncation = {"rule": rule, "buffer": 4, "penalty": 2.0}
        run = config(rollout={"max_new_tokens": 16, "truncation": truncation})
        return make_batch([cut, whole], run, "batch")

    assert [s.advantage for s in batch("train").samples] == pytest.approx([1, -1])
    masked = batch("mask")
    assert [len(s.response_ids) for s in masked.samples] == [3] and masked.masked == 1
    assert masked.samples[0].advantage == pytest.approx(-1)  # the cut one is still its baseline
    assert [s.advantage for s in batch("penalise").samples] == pytest.approx([-1, 1])


def test_groups_without_spread_and_failed_groups_are_dead() -> None:
    members = [
        episode("a", 0, 0.5), episode("b", 0, 0.5),
        episode("c", 1, 0.1), episode("d", 1, 0.9),
        episode("e", 2, 0.1, status="env_error"), episode("f", 2, 0.9),
        episode("g", 3, 0.1, status="aborted"),
        episode("h", 4, 0.0), episode("i", 4, 0.0),  # all of them failed
    ]  # fmt: skip
    assert dead_groups(members, config()) == {0, 2, 3, 4}


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 3), st.integers(0, 9))
def test_minibatches_show_every_sample_once_a_pass(
    count: int, parts: int, passes: int, seed: int
) -> None:
    made = minibatches(range(count), parts * passes, passes, seed)
    assert len(made) == passes * min(parts, count)
    sizes = [len(part) for part in made]
    assert max(sizes) - min(sizes) <= 1
    for p in range(passes):
        each = made[p * len(made) // passes : (p + 1) * len(made) // passes]
        assert sorted(x for part in each for x in part) == list(range(count))
    assert made == minibatches(range(count), parts * passes, passes, seed)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"logprobs": (-0.5,)}, RecordError, "3 ids but 1 log-probs"),
        ({"logprobs": ()}, RecordError, "3 ids but 0 log-probs"),
        ({"response_ids": (1,)}, RecordError, "1 ids but 3 log-probs"),
        ({"tokenizer_hash": "0123456789abcdef"}, RecordError, "tokenizer 0123456789ab"),
        ({"temperature": 0.7}, RecordError, "temperature 0.7, the run trains at 1"),
        ({"constrained": True}, ConfigError, "grammar-constrained"),
    ],
)
def test_records_that_do_not_fit_the_run_are_refused_by_name(
    change: dict[str, object], kind: type[Exception], words: str
) -> None:
    record = CallRecord(**{**call("g3-1.0", 4).__dict__, **change})  # type: ignore[arg-type]
    with pytest.raises(kind, match=f"call 4 of episode g3-1.0: .*{words}") as caught:
        check_call(record, config(), "fedcba9876543210")
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


def test_a_sample_of_unequal_lengths_cannot_be_made() -> None:
    with pytest.raises(RecordError, match="2 ids but 1 log-probs"):
        Sample((1,), (2, 3), (-1.0,))
    assert Sample((1,), (2, 3), ()).length == 3  # imitated: none at all

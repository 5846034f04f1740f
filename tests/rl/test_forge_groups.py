"""Members, groups and what a pool makes of them after a restart: no processes, no torch."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.forge.groups import Group, Groups, Known, known_members
from rl.forge.messages import (
    Ended,
    Failed,
    MessageError,
    Ready,
    Run,
    Step,
    decode,
    encode,
    episode_name,
    parse_episode,
)
from rl.types import EpisodeStatus
from rl.window import Frontier, Window


def groups_of(
    slots: int,
    window: int,
    size: int = 2,
    attempts: int = 3,
    known: Known = Known(),
    start: Frontier = Frontier(),
    total: int = 10**6,
) -> Groups:
    return Groups(Window[Group](slots, window, start), size, total, attempts, known)


def test_members_are_run_in_the_order_of_their_groups_and_new_attempts_first() -> None:
    groups = groups_of(3, 3)
    groups.admit()
    assert [groups.next() for _ in range(3)] == [(0, 0, 0), (0, 1, 0), (1, 0, 0)]
    assert not groups.died(0, 1, 0, charge=True)
    assert groups.next() == (0, 1, 1)
    assert groups.next() == (1, 1, 0)


def test_a_group_is_finished_when_all_its_members_are() -> None:
    groups = groups_of(2, 1)
    groups.admit()
    groups.ended(0, 0, 0, "done")
    assert groups.window.take() is None
    groups.ended(0, 1, 0, "timeout")
    taken = groups.window.take()
    assert taken == (0, Group(0, ("g0-0.0", "g0-1.0"), ("done", "timeout")))
    assert not taken[1].failed
    assert Group(1, ("a", "b"), ("env_error", "aborted")).failed


def test_news_of_an_attempt_that_is_not_the_current_one_is_ignored() -> None:
    groups = groups_of(1, 1, size=1)
    groups.admit()
    groups.died(0, 0, 0, charge=False)
    groups.ended(0, 0, 0, "done")  # the old attempt's word came late
    assert groups.window.take() is None
    assert not groups.died(0, 0, 0, charge=True)
    groups.ended(0, 0, 1, "done")
    groups.ended(0, 0, 1, "env_error")
    taken = groups.window.take()
    assert taken is not None and taken[1].episodes == ("g0-0.1",)
    assert taken[1].statuses == ("done",)


def test_only_charged_deaths_use_up_a_member() -> None:
    groups = groups_of(1, 1, size=1, attempts=2)
    groups.admit()
    for attempt in range(5):
        assert not groups.died(0, 0, attempt, charge=False)
    assert not groups.died(0, 0, 5, charge=True)
    assert groups.died(0, 0, 6, charge=True)


def test_no_group_beyond_the_runs_last_one_is_admitted() -> None:
    groups = groups_of(8, 8, size=1, total=3, start=Frontier(0, (2,)))
    groups.admit()
    assert groups.window.running == (0, 1)
    for index in (0, 1):
        assert not groups.exhausted
        groups.ended(index, 0, 0, "done")
        assert groups.window.take() is not None
    assert groups.exhausted


def test_what_the_pool_has_of_a_group_is_not_run_again() -> None:
    """Group 0 was consumed; 1 is whole; of 2 one member is; 3 was never begun."""
    groups = groups_of(
        4,
        4,
        total=4,
        start=Frontier(1),
        known=Known(
            {(1, 0): (0, "done"), (1, 1): (2, "done"), (2, 1): (0, "done")},
            {(1, 0): 1, (1, 1): 3, (2, 0): 4, (2, 1): 1},
        ),
    )
    groups.admit()
    taken = groups.window.take()
    assert taken == (1, Group(1, ("g1-0.0", "g1-1.2"), ("done", "done")))
    assert [groups.next() for _ in range(4)] == [(2, 0, 4), (3, 0, 0), (3, 1, 0), None]


def test_results_of_a_newer_policy_than_the_checkpoints_do_not_count() -> None:
    known = known_members(
        ["g0-0.0", "g0-1.0", "g0-1.1", "g1-0.0", "title-maker"],
        [
            ("g0-0.0", "done", 3),
            ("g0-1.0", "done", 2),
            ("g0-1.1", "timeout", 3),
            ("g1-0.0", "done", 4),
            ("title-maker", "done", 0),
        ],
        version=3,
    )
    assert known.ended == {(0, 0): (0, "done"), (0, 1): (1, "timeout")}
    assert known.attempts == {(0, 0): 1, (0, 1): 2, (1, 0): 1}


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.0, 0.4]))
def test_whatever_dies_every_group_is_consumed_once_and_in_reach_of_the_window(
    seed: int, slots: int, size: int, death: float
) -> None:
    """Random deaths, endings and restarts from the last frontier, with the pool as it was."""
    rng = random.Random(seed)
    width = rng.randint(1, slots)
    pool: dict[tuple[int, int], tuple[int, EpisodeStatus]] = {}
    used: Counter[tuple[int, int]] = Counter()
    consumed: list[int] = []
    saved = Frontier()
    kept = 0
    groups = groups_of(slots, width, size)
    running: list[tuple[int, int, int]] = []
    for _ in range(300):
        groups.admit()
        while len(running) < 3 and (found := groups.next()) is not None:
            running.append(found)
            used[found[:2]] = max(used[found[:2]], found[2] + 1)
        if running:
            group, member, attempt = running.pop(rng.randrange(len(running)))
            if rng.random() < death:
                groups.died(group, member, attempt, charge=False)
            else:
                pool[group, member] = (attempt, "done")
                groups.ended(group, member, attempt, "done")
        while (taken := groups.window.take()) is not None:
            assert taken[0] <= min(set(range(len(consumed) + 1)) - set(consumed)) + width - 1
            consumed.append(taken[0])
            groups.window.release(1)
        if rng.random() < 0.1:
            saved, kept = groups.window.frontier(), len(consumed)
        if rng.random() < 0.05:  # the supervisor is killed: back to the checkpoint
            del consumed[kept:]
            running = []
            known = Known(dict(pool), dict(used))
            groups = groups_of(slots, width, size, known=known, start=saved)
    assert len(set(consumed)) == len(consumed)
    head = groups.window.frontier().head
    assert set(range(head)) <= set(consumed)
    assert all(index < head + width for index in consumed)


def test_messages_survive_the_pipe_and_nothing_else_does() -> None:
    for message in (
        Run(3, 0, 1, 2, 2**62, "http://127.0.0.1:1"),
        Ended(3, 0, 1, None, "the gateway is away"),
        Ready(("a", "b"), ("mle", "maths"), 3, 4, "w", {"loss": float("inf")}, "cpu"),
        Step(
            step=1,
            groups=(("g0-0.0",),),
            dropped=(("g1-0.0",),),
            frontier={"head": 2, "taken": [4]},
            tasks=("a",),
            domains=("mle",),
            last=True,
            metrics={"x": 1.0},
        ),
        Failed(5, "disk full"),
    ):
        assert decode(encode(message)) == message
    for line in (b"", b"warning: hello", b'{"run": {}}', b'{"jump": {}}', b"[1]", b'{"a":1,"b":2}'):
        with pytest.raises(MessageError, match="is no message"):
            decode(line)


def test_episode_names_round_trip() -> None:
    assert parse_episode(episode_name(12, 3, 4)) == (12, 3, 4)
    for name in ("s1-g0-0", "g1-2", "g-1.0", "12-3.4", "g1-2.x", ""):
        assert parse_episode(name) is None

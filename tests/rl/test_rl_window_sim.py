"""The simulator: traces worked out by hand, a clock that ticks, and what holds of any run."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.window import lag_bound
from rl.window_sim import WORKLOADS, Setup, draw, simulate

# Three slots, one group a step of one second. Group 0 takes 4 s, all others 1 s.
SLOW_FIRST = [4.0] + [1.0] * 20


@pytest.mark.parametrize(
    ("window", "order", "steps_s", "lags", "idle_s"),
    [
        # all wait for group 0
        (1, [0, 1, 2, 3], (5, 6, 7, 8), [0, 1, 2, 2], 4),
        # 1 overtakes at 1 s; 2 and 3 (admitted at 2 s) are done, but beyond: idle until 4 s
        (2, [1, 0, 2, 3], (2, 5, 6, 7), [0, 1, 2, 2], 3),
        # 1 and 2 overtake; 3 is beyond until group 0 is taken
        (3, [1, 2, 0, 3], (2, 3, 5, 6), [0, 1, 2, 2], 2),
    ],
)
def test_traces_by_hand(window, order, steps_s, lags, idle_s):
    trace = simulate(SLOW_FIRST, Setup(3, window, 1, train_s=1.0), 4)
    assert [take.index for take in trace.takes] == order
    assert trace.steps_s == steps_s
    assert trace.lags == lags
    assert trace.idle_s == idle_s
    assert trace.makespan_s == steps_s[-1]
    assert trace.steps_a_second == 4 / steps_s[-1]
    assert trace.idle_share == idle_s / steps_s[-1]
    slow = next(take for take in trace.takes if take.index == 0)
    assert (slow.admitted_s, slow.ended_s, slow.before) == (0, 4, window - 1)


def test_a_deadline_ends_a_group_by_hand():
    """Group 0 would take 4 s, and ends at 2 s: 1 overtakes at 1 s, then all in order."""
    trace = simulate(SLOW_FIRST, Setup(3, 2, 1, train_s=1.0, deadline_s=2.0), 4)
    assert [take.index for take in trace.takes] == [1, 0, 2, 3]
    assert trace.steps_s == (2, 3, 4, 5)
    assert trace.takes[1].ended_s == 2


def test_an_untrained_group_frees_its_slot_at_once_by_hand():
    """1 is taken at 1 s and belongs to no step; 3 starts in its slot then, not after a step."""
    trace = simulate(SLOW_FIRST, Setup(3, 3, 1, train_s=1.0), 3, untrained={1})
    assert [take.index for take in trace.takes] == [1, 2, 0, 3]
    assert [take.trained for take in trace.takes] == [False, True, True, True]
    assert trace.takes[3].admitted_s == 1
    # 2 at 1 s; 4 (admitted at 2 s) and 3 are beyond until 0 ends at 4 s
    assert trace.steps_s == (2, 5, 6)
    assert trace.lags == [0, 1, 2]


def test_fewer_workers_than_slots_by_hand():
    """Two workers: 0 until 4 s; 1, 2, 3 in turn. A group's lag counts from its start."""
    trace = simulate(SLOW_FIRST, Setup(4, 4, 1, train_s=0.5, workers=2), 4)
    assert [take.index for take in trace.takes] == [1, 2, 3, 0]
    assert [take.taken_s for take in trace.takes] == [1, 2, 3, 4]
    assert trace.steps_s == (1.5, 2.5, 3.5, 4.5)
    assert trace.lags == [0, 1, 1, 3]  # 2 began at 1 s under version 0, 3 at 2 s under version 1


def ticking(durations, slots, size, per_step, train, steps, dropped):
    """The same by the report's rules and a clock of whole seconds, one state a group."""
    state, left, began = {}, {}, {}
    head = following = active = batch = clock = 0
    busy, ends, order, lags = None, [], [], []
    while True:
        if busy == clock:
            ends.append(clock)
            active -= per_step
            batch, busy = 0, None
        for j in state:
            if state[j] == "run" and left[j] == clock:
                state[j] = "done"
        moved = True
        while moved and len(ends) < steps:
            moved = False
            while active < slots:
                state[following], left[following] = "run", clock + durations[following]
                began[following] = len(ends)
                if durations[following] == 0:
                    state[following] = "done"
                following, active, moved = following + 1, active + 1, True
            while head < following and head not in state:
                head += 1
            inside = range(head, min(head + size, following))
            ready = [j for j in inside if state.get(j) == "done"]
            if busy is None and ready:
                del state[ready[0]]
                order.append(ready[0])
                moved = True
                if ready[0] in dropped:
                    active -= 1
                else:
                    lags.append(len(ends) - began[ready[0]])
                    batch += 1
                    if batch == per_step:
                        busy = clock + train
        if len(ends) == steps:
            return order, ends, lags
        clock += 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_a_ticking_clock(data):
    slots = data.draw(st.integers(1, 9))
    per_step = data.draw(st.integers(1, slots))
    size = data.draw(st.integers(1, slots))
    train, steps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    rng = random.Random(data.draw(st.integers(0, 2**20)))
    durations = [rng.choice([0, 1, 1, 2, 3, 17]) for _ in range(400)]
    share = data.draw(st.sampled_from([0.0, 0.3]))
    dropped = {i for i in range(400) if rng.random() < share}
    order, ends, lags = ticking(durations, slots, size, per_step, train, steps, dropped)
    trace = simulate(durations, Setup(slots, size, per_step, train), steps, dropped)
    assert [take.index for take in trace.takes] == order
    assert list(trace.steps_s) == ends
    assert trace.lags == lags
    assert max(lags) <= lag_bound(slots, size, per_step)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("size", [1, 19, 64])
def test_the_mean_lag_is_that_of_the_buffer(workload, size):
    """Full slots: N/P − 1 versions on average, whatever the window; only the spread is its work.

    Exactly: the versions at which P groups a step are taken, less those at which slots were filled.
    """
    steps, slots, per_step = 60, 64, 16
    trace = simulate(draw(workload, 1100, 3), Setup(slots, size, per_step, 0.25), steps)
    taken = {take.index for take in trace.takes}
    admitted_under = [max(0, (i - slots) // per_step + 1) for i in range(1100)]
    expected = per_step * sum(range(steps)) - sum(admitted_under[i] for i in taken)
    assert sum(trace.lags) == expected
    assert sum(trace.lags[-640:]) / 640 == pytest.approx(slots / per_step - 1, abs=0.15)


def test_a_window_is_worth_nothing_without_spread_and_something_with_it():
    def seconds(durations, size):
        return simulate(durations, Setup(64, size, 16, 0.25), 50).makespan_s

    even = [1.0] * 1000
    assert seconds(even, 1) == seconds(even, 19) == seconds(even, 64)
    for workload in WORKLOADS:
        drawn = draw(workload, 1000, 0)
        assert seconds(drawn, 1) > seconds(drawn, 19) > seconds(drawn, 64)


def test_draws_have_mean_one_and_are_repeatable():
    for workload in WORKLOADS:
        assert draw(workload, 50, 7) == draw(workload, 50, 7) != draw(workload, 50, 8)
    drawn = draw("lognormal", 20000, 1)
    assert sum(drawn) / 20000 == pytest.approx(1.0, abs=0.05)
    logs = [math.log(x) for x in drawn]
    assert sum((x + 0.5) ** 2 for x in logs) / 20000 == pytest.approx(1.0, abs=0.05)
    mixed = draw("mixture", 20000, 1)
    assert sum(x > 1 for x in mixed) / 20000 == pytest.approx(0.05, abs=0.01)
    assert max(mixed) == pytest.approx(10 * min(mixed))
    assert sum(mixed) / 20000 == pytest.approx(1.0, abs=0.05)
    heavy = draw("pareto", 20000, 1)
    assert min(heavy) == pytest.approx(1 / 3, abs=0.01)
    assert sum(x > 4 / 3 for x in heavy) / 20000 == pytest.approx(4**-1.5, abs=0.01)


def test_wrong_use_is_an_error():
    with pytest.raises(ValueError, match="never fill a step"):
        Setup(4, 2, 5, 1.0)
    with pytest.raises(ValueError, match="deadline_s"):
        Setup(4, 2, 2, 1.0, deadline_s=0.0)
    with pytest.raises(ValueError, match="workers"):
        Setup(4, 2, 2, 1.0, workers=0)
    with pytest.raises(ValueError, match="10 groups give 5 of 6 steps"):
        simulate([1.0] * 10, Setup(4, 2, 2, 1.0), 6)
    with pytest.raises(ValueError, match="1 ≤ window ≤ slots"):
        simulate([1.0] * 10, Setup(4, 5, 2, 1.0), 6)

"""The windowed FIFO: Fig. 5's trace, the lag bound (held and reached), restart at any point."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.window import Frontier, Window, lag_bound, window_size


def test_the_trace_of_figure_5():
    window = Window[str](8, 4)
    taken = []
    for _ in range(30):
        while (index := window.admit()) is not None:
            if index != 7:
                window.finish(index, f"group {index}")
        found = window.take()
        if found is None:
            break
        taken.append(found[0])
        window.release(1)
    assert taken == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert (window.head, window.blocked_done, window.running) == (7, 7, (7,))
    window.finish(7, "at last")
    assert window.take() == (7, "at last")
    assert window.take() == (11, "group 11")  # the window slid over all that was taken


@pytest.mark.parametrize(("order", "size"), [("fifo", 1), ("windowed", 19), ("greedy", 64)])
def test_sizes(order, size):
    assert window_size(order, 64) == size
    assert window_size("windowed", 1) == 1


class Report:
    """The report's rules as plainly as they are given: a state a group, indices, a head."""

    def __init__(self, slots, size):
        self.slots, self.size = slots, size
        self.next = self.head = self.active = 0
        self.state = {}

    def admit(self):
        if self.active == self.slots:
            return None
        self.state[self.next] = "run"
        self.next, self.active = self.next + 1, self.active + 1
        return self.next - 1

    def take(self):
        while self.head < self.next and self.head not in self.state:
            self.head += 1
        for j in range(self.head, min(self.head + self.size - 1, self.next - 1) + 1):
            if self.state.get(j) == "done":
                del self.state[j]
                return j
        return None


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.data())
def test_every_call_does_what_the_report_says(slots, data):
    size = data.draw(st.integers(1, slots))
    window, report, held, taken = Window[str](slots, size), Report(slots, size), 0, []
    actions = st.sampled_from(["admit", "finish", "take", "release"])
    for action in data.draw(st.lists(actions, min_size=20, max_size=120)):
        if action == "admit":
            assert window.admit() == report.admit()
        elif action == "finish" and window.running:
            index = data.draw(st.sampled_from(window.running))
            report.state[index] = "done"
            window.finish(index, f"result of {index}")
        elif action == "take":
            index = report.take()
            assert window.take() == (None if index is None else (index, f"result of {index}"))
            held += index is not None
            taken += [] if index is None else [index]
        elif action == "release" and held:
            count = data.draw(st.integers(1, held))
            window.release(count)
            report.active, held = report.active - count, held - count
        assert window.active == report.active <= slots
        assert window.running == tuple(sorted(j for j, s in report.state.items() if s == "run"))
        # none lost, none twice
        assert len(set(taken)) == len(taken)
        assert set(taken) | set(report.state) == set(range(window.next))
        assert set(taken) == set(range(window.head)) | set(window.frontier().taken)
        assert window.overtaken == len(window.frontier().taken) <= size - 1
        assert window.head_age <= slots + size - 2


@pytest.mark.parametrize(
    ("order", "served"), [("fifo", "abcd"), ("windowed", "bacd"), ("greedy", "bcda")]
)
def test_the_three_orders(order, served):
    """One slow group and three quick ones: a is done when the trainer can get nothing else."""
    slots = 4
    window = Window[str](slots, window_size(order, slots, share=0.5))
    indices = {name: window.admit() for name in "abcd"}
    for name in "bcd":
        window.finish(indices[name], name)
    got = ""
    while len(got) < slots:
        found = window.take()
        if found is None:
            window.finish(indices["a"], "a")
        else:
            got += found[1]
    assert got == served


def test_a_deadline_is_a_result():
    """A group past its deadline is finished like any other, and no longer holds the others up."""
    window = Window[str](4, 1)
    for _ in range(4):
        window.admit()
    for index in (1, 2, 3):
        window.finish(index, "done")
    assert window.take() is None
    assert (window.blocked_done, window.running) == (3, (0,))
    window.finish(0, "timeout")
    assert [window.take() for _ in range(4)] == [(0, "timeout"), *((i, "done") for i in (1, 2, 3))]
    with pytest.raises(ValueError, match="not running"):
        window.finish(0, "too late")  # its real end, after the deadline


def test_a_group_without_variance_frees_its_slot_before_the_step():
    window = Window[str](2, 1)
    assert [window.admit(), window.admit(), window.admit()] == [0, 1, None]
    window.finish(0, "all equal")
    assert window.take() == (0, "all equal")
    assert window.admit() is None  # taken, and still in use
    window.release(1)
    assert window.admit() == 2
    window.finish(1, "kept")
    assert window.take() == (1, "kept")  # the head passed group 0 as it passes any other
    assert window.frontier() == Frontier(2)


def drive(slots, size, per_step, seed, slow=0.2):
    """Random durations; returns, for each group, how many groups were taken between its admission
    and its own turn, and how many versions its policy was behind."""
    rng = random.Random(seed)
    window = Window[None](slots, size)
    admitted, ends, bypass, lags = {}, {}, {}, {}
    taken = version = held = 0
    for clock in range(4000):
        while (index := window.admit()) is not None:
            admitted[index] = (taken, version)
            ends[index] = clock + rng.choice([0, 1, 2]) + (rng.random() < slow) * rng.randrange(60)
        for index in window.running:
            if ends[index] <= clock:
                window.finish(index, None)
        found = window.take()
        if found is None:
            continue
        before, began = admitted[found[0]]
        bypass[found[0]], lags[found[0]] = taken - before, version - began
        taken, held = taken + 1, held + 1
        if held == per_step:
            window.release(held)
            version, held = version + 1, 0
    return bypass, lags


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_bound_holds(data):
    per_step = data.draw(st.integers(1, 6))
    slots = per_step * data.draw(st.integers(1, 4)) + data.draw(st.integers(0, 5))
    size = data.draw(st.integers(1, slots))
    bypass, lags = drive(slots, size, per_step, data.draw(st.integers(0, 2**20)))
    assert len(bypass) > slots
    assert max(bypass.values()) <= slots + size - 2
    assert max(lags.values()) <= lag_bound(slots, size, per_step)


@pytest.mark.parametrize(("slots", "size"), [(8, 4), (8, 1), (5, 5), (64, 19)])
def test_the_bound_is_reached(slots, size):
    """The last of N that are admitted together is slow, and all others are fast."""
    window = Window[None](slots, size)
    first = [window.admit() for _ in range(slots)]
    slow = first[-1]
    for index in first[:-1]:
        window.finish(index, None)
    before = 0
    while (found := window.take()) is not None:
        assert found[0] != slow
        before += 1
        window.release(1)
        while (index := window.admit()) is not None:
            window.finish(index, None)
    assert before == slots + size - 2
    window.finish(slow, None)
    assert window.take() == (slow, None)


@pytest.mark.parametrize(("staleness", "per_step", "size"), [(3, 16, 19), (1, 3, 4), (0, 4, 1)])
def test_the_bound_in_versions_is_reached(staleness, per_step, size):
    """As above, counted in steps: N = (S + 1) P slots, S + ⌈(W − 1) / P⌉ versions."""
    slots = (staleness + 1) * per_step
    window, version, held = Window[None](slots, size), 0, 0
    slow = [window.admit() for _ in range(slots)][-1]
    for index in range(slow):
        window.finish(index, None)
    while window.take() is not None:
        held += 1
        if held == per_step:
            window.release(held)
            version, held = version + 1, 0
        while (index := window.admit()) is not None:
            window.finish(index, None)
    assert version == lag_bound(slots, size, per_step)
    assert version == staleness + -(-(size - 1) // per_step)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 9), st.integers(1, 9))
def test_a_restart_takes_every_group_once(seed, slots, size):
    rng = random.Random(seed)
    window, taken, durable = Window[int](slots, min(size, slots)), [], (Frontier(), 0)
    for _ in range(400):
        action = rng.random()
        if action < 0.35:
            window.admit()
        elif action < 0.65 and window.running:
            index = rng.choice(window.running)
            window.finish(index, index)
        elif action < 0.9:
            if (found := window.take()) is not None:
                assert found[0] == found[1]
                taken.append(found[0])
                window.release(1)
        elif action < 0.95:
            durable = (Frontier.from_dict(window.frontier().to_dict()), len(taken))
        else:  # killed: what was taken after the checkpoint is taken again
            window = Window[int](slots, window.window, durable[0])
            del taken[durable[1] :]
    assert len(set(taken)) == len(taken)
    frontier = window.frontier()
    assert set(taken) == set(range(frontier.head)) | set(frontier.taken)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 5), st.integers(0, 3))
def test_the_bound_holds_over_restarts(seed, per_step, staleness):
    """Killed at any time, a run goes on from its last step; finished groups come back with the
    version that they began under, running ones are begun again."""
    rng = random.Random(seed)
    slots = per_step * (staleness + 1)
    size = rng.randint(1, slots)
    window, version, held = Window[int](slots, size), 0, []
    began, pool, saved, lags = {}, {}, (Frontier(), 0), []
    for _ in range(1500):
        while (index := window.admit()) is not None:
            if index in pool:
                window.finish(index, pool[index])
            else:
                began[index] = version
        if window.running and rng.random() < 0.7:
            index = rng.choice(window.running[-3:] if rng.random() < 0.8 else window.running)
            pool[index] = began[index]
            window.finish(index, began[index])
        if (found := window.take()) is not None:
            held.append(version - found[1])
        if len(held) == per_step:
            lags += held
            window.release(per_step)
            version, held = version + 1, []
            saved = (window.frontier(), version)
        if rng.random() < 0.01:
            frontier, version = saved
            pool = {index: v for index, v in pool.items() if v <= version}
            window, held = Window[int](slots, size, Frontier.from_dict(frontier.to_dict())), []
    assert len(lags) > 10 * per_step
    assert 0 <= min(lags) <= max(lags) <= lag_bound(slots, size, per_step)


def test_a_frontier_survives_json():
    window = Window[None](6, 4)
    for index in [window.admit() for _ in range(6)]:
        if index != 1:
            window.finish(index, None)
    assert [window.take()[0] for _ in range(4)] == [0, 2, 3, 4]
    frontier = window.frontier()
    assert frontier == Frontier(1, (2, 3, 4))
    assert Frontier.from_dict(json.loads(json.dumps(frontier.to_dict()))) == frontier
    again = Window[None](6, 4, frontier)
    assert [again.admit() for _ in range(4)] == [1, 5, 6, 7]
    for wrong in ({"head": 3, "taken": [3]}, {"head": 3, "taken": [1]}, {"head": -1, "taken": []}):
        with pytest.raises(ValueError, match="oldest group not yet taken"):
            Frontier.from_dict(wrong)


def test_wrong_use_is_an_error():
    with pytest.raises(ValueError, match="1 ≤ window ≤ slots"):
        Window[None](4, 5)
    window = Window[None](2, 1)
    with pytest.raises(ValueError, match="not running"):
        window.finish(0, None)
    with pytest.raises(ValueError, match="0 are held"):
        window.release(1)

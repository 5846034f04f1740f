"""The windowed FIFO: Fig. 5's trace, the lag bound (held and reached), restart at any point."""

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


def test_wrong_use_is_an_error():
    with pytest.raises(ValueError, match="1 ≤ window ≤ slots"):
        Window[None](4, 5)
    window = Window[None](2, 1)
    with pytest.raises(ValueError, match="not running"):
        window.finish(0, None)
    with pytest.raises(ValueError, match="0 are held"):
        window.release(1)

"""What `benchmarks.async_rl` makes of a run: times worked out by hand, over a real pool."""

import json
import random

import pytest

from benchmarks.async_rl import covered, figures, measure, tool_intervals
from benchmarks.serve_common import BenchmarkError
from rl.pool import Pool
from rl.types import CallRecord, RewardRecord


def call(episode, index, start, end, tokens=4):
    ids = tuple(range(1, tokens + 1))
    return CallRecord(
        episode, 0, index, (1, 2), ids, (-1.0,) * tokens, ((0, tokens, 0),), "stop", start, end
    )


def test_covered_counts_each_second_once():
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 9)], 0.5, 7) == 2.5 + 2
    assert covered([], 0, 1) == covered([(2, 3)], 0, 1) == covered([(-3, -1)], 0, 1) == 0
    rng = random.Random(0)
    for _ in range(50):
        drawn = [(a, a + rng.randrange(6)) for a in (rng.randrange(-5, 40) for _ in range(9))]
        naive = sum(any(a <= t < b for a, b in drawn) for t in range(30))
        assert covered(drawn, 0, 30) == naive


def test_scripts_run_between_calls_and_after_the_last():
    calls = [call("e", 1, 14.0, 15.0), call("e", 0, 10.0, 11.0)]
    assert tool_intervals(calls, 5.0) == [(11.0, 14.0), (15.0, 17.0)]
    assert tool_intervals(calls, 0.0) == [(11.0, 14.0), (15.0, 15.0)]
    assert tool_intervals([], 5.0) == []


def write_run(folder, starts, episodes, waits=1.0):
    folder.mkdir()
    rows = [
        {"t": t, "perf/wait_batch_s": waits, "perf/sync_s": 0.5, "perf/update_s": 1.0, "lag/max": 1}
        for t in starts
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Pool(folder / "pool.sqlite") as pool:
        for name, start, end, tool_s in episodes:
            pool.add_call(call(name, 0, start, end))
            pool.add_reward(RewardRecord(name, 1.0, t_tool=tool_s))


def test_stages_and_figures_by_hand(tmp_path):
    # every 10 s: 4 s of generation in two overlapping calls, 3 s of scripts after them
    episodes = [
        (f"g{k}-{m}.0", 10.0 * k + m, 10.0 * k + 3 + m, 2.0) for k in range(9) for m in (0, 1)
    ]
    write_run(tmp_path / "turns", [10.0 * k for k in range(9)], episodes, waits=7.0)
    turns = measure("in_turns", tmp_path / "turns", 2, 1)
    assert (turns["steps"], turns["step_s"]) == (5, 10.0)
    assert (turns["generate_s"], turns["execute_s"]) == (4.0, 3.0)
    assert turns["train_s"] == 10 - 7 - 0.5
    assert turns["tok_s"] == pytest.approx(0.8)
    write_run(tmp_path / "ahead", [5.0 * k for k in range(9)], episodes, waits=1.0)
    ahead = measure("async", tmp_path / "ahead", 2, 2)
    found = figures([turns, ahead], bound=2)
    assert found["async_vs_sync"] == 2.0
    assert found["possible"] == 10 / 4
    assert found["overlap_efficiency"] == pytest.approx(2.0 / 2.5)
    assert found["trainer_idle_share"] == 1.0 / 5
    with pytest.raises(BenchmarkError, match="ask for more steps"):
        measure("async", tmp_path / "ahead", 5, 2)

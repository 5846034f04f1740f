"""Real workers and a real trainer under the loop of `benchmarks.window_processes`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.serve_common import BenchmarkError
from benchmarks.window_processes import Fleet
from rl.window import lag_bound
from rl.window_sim import Setup, simulate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fleet():
    with Fleet(6) as found:
        yield found


@pytest.mark.parametrize(
    ("setup", "untrained"),
    [
        (Setup(6, 1, 2, 0.5), frozenset()),
        (Setup(6, 3, 2, 0.5, workers=5), frozenset()),
        (Setup(4, 2, 2, 0.5, 6.0), frozenset({1, 4})),
    ],
)
def test_processes_keep_every_rule(fleet, setup, untrained):
    durations = [12.0, 1.0, 3.0, 2.0, 5.0, 4.0] + [3.0, 1.0, 2.0, 4.0] * 3
    real = fleet.run(durations, setup, 4, 0.05, untrained)
    indices = [take.index for take in real.takes]
    assert len(set(indices)) == len(indices)
    assert [take.version for take in real.takes if take.trained] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [take.trained for take in real.takes] == [i not in untrained for i in indices]
    assert max(real.lags) <= lag_bound(setup.slots, setup.window, 2)
    assert max(take.before for take in real.takes) <= setup.slots + setup.window - 2
    if setup.window == 1:  # the only order that does not depend on how busy the machine is
        expected = simulate(durations, setup, 4, untrained)
        assert indices == [take.index for take in expected.takes]
        assert real.makespan_s >= 0.999 * expected.makespan_s
    # nothing ends before its time
    for take in real.takes:
        held_s = take.ended_s - take.admitted_s
        assert held_s >= 0.999 * min(durations[take.index], setup.deadline_s)
    assert list(real.steps_s) == sorted(real.steps_s)
    assert 0 < real.idle_share < 1


def test_a_worker_that_ends_is_an_error_and_no_process_stays():
    before = set(psutil.Process().children())
    with pytest.raises(BenchmarkError, match="has ended"), Fleet(2) as fleet:
        worker = max(set(psutil.Process().children()) - before, key=lambda p: p.pid)
        worker.kill()
        fleet.run([30.0, 30.0], Setup(2, 1, 2, 1.0), 1, 1.0)
    assert set(psutil.Process().children()) <= before


def test_workers_end_with_their_parent():
    code = (
        "import time; from benchmarks.window_processes import Fleet\n"
        "with Fleet(3):\n    print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        children = psutil.Process(parent.pid).children()
        assert len(children) == 4
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(timeout=10)
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == 4
    assert not alive

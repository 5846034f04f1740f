"""The scorer: one pool for all workers over a socket, and scripts that survive its death."""

from __future__ import annotations

import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from forge_runs import run_config
from gateway_fakes import until as until_true

from agent_tools.sandbox import Limits, SandboxError, ScriptJob, ScriptPool, ScriptResult
from rl.config import dump_config
from rl.errors import InfraError
from rl.forge.child import PULSE_LIMIT_S, PULSE_S, AliveLock, Child
from rl.forge.messages import Failed, Message, Pong, Ready
from rl.forge.places import Places
from rl.forge.scorer import Scorer
from rl.forge.scorer_client import SCORER, ScorerPool, split_address
from rl.rollout import CachingPool

until = partial(until_true, seconds=60)


class Stub:
    """Answers when it is told to; `jobs` are those that came."""

    missing = ("no network namespace: none here",)

    def __init__(self) -> None:
        self.jobs: list[tuple[ScriptJob, Future[ScriptResult]]] = []

    def submit(self, job: ScriptJob) -> Future[ScriptResult]:
        if len(job.outputs) > 2:
            raise SandboxError("a script may have at most 2 outputs")
        self.jobs.append((job, Future()))
        return self.jobs[-1][1]


class Served:
    """A scorer over a stub, in a thread; the address may outlive it."""

    def __init__(self) -> None:
        self.stub = Stub()
        self.address = f"selfevo-test-{secrets.token_hex(8)}/{secrets.token_hex(8)}"
        self.begin()

    def begin(self) -> None:
        self.stub = Stub()
        pool: ScriptPool = CachingPool(self.stub)  # type: ignore[arg-type, assignment]
        self.scorer = Scorer(pool, self.address)
        threading.Thread(target=self.scorer.serve, daemon=True).start()

    def come(self, count: int) -> list[tuple[ScriptJob, Future[ScriptResult]]]:
        until(lambda: len(self.stub.jobs) >= count)
        return self.stub.jobs


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.scorer.close()


def test_equal_scripts_of_two_workers_run_once_and_come_back_exactly(served: Served) -> None:
    limits = Limits(cpu_seconds=0.5, wall_seconds=9.0, output_bytes=7)
    job = ScriptJob("print('\ud800 ü')\n", Path("data"), ("a.csv", "b"), limits)
    result = ScriptResult("ok", 0, "\udcff ü\n", "", {"a.csv": b"\x00\xff\n", "b": b""}, 0.25, 1.5)
    with ScorerPool(served.address) as one, ScorerPool(served.address) as two:
        assert one.missing == two.missing == Stub.missing
        first = one.submit(job)
        ((came, answer),) = served.come(1)
        assert came == ScriptJob(job.code, Path("data").absolute(), job.outputs, limits)
        second, other = two.submit(job), two.submit(ScriptJob("other", Path("data"), ("b",)))
        ((_, answer), (_, refusal)) = served.come(2)
        answer.set_result(result)
        assert first.result(10) == second.result(10) == result
        refusal.set_exception(SandboxError("inputs folder data cannot be read"))
        with pytest.raises(SandboxError, match="inputs folder data cannot be read"):
            other.result(10)
        with pytest.raises(SandboxError, match="at most 2"):
            one.run([ScriptJob("x", Path("data"), ("a", "b", "c"))])
        late = two.submit(ScriptJob("late", Path("data"), ()))
        served.come(3)[2][1].set_exception(OSError("no memory"))
        with pytest.raises(InfraError, match="no memory"):
            late.result(10)
        assert len(served.stub.jobs) == 3
        left = one.submit(ScriptJob("never answered", Path("data")))
    with pytest.raises(InfraError, match="was closed"):
        left.result(10)
    with pytest.raises(SandboxError, match="is closed"):
        one.submit(job)


def test_who_has_not_the_key_is_not_heard(served: Served) -> None:
    for said in (b'{"key": "guess"}\n', b"{}\n", b"\xff\n", b'{"key": ' + b"x" * 500):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(20)
            stranger.connect(split_address(served.address)[0])
            stranger.sendall(said)
            with suppress(ConnectionResetError):  # it was closed with our words unread
                assert stranger.recv(100) == b""
    assert served.stub.jobs == []


@pytest.fixture
def real(tmp_path: Path) -> Iterator[tuple[Child, ScorerPool]]:
    """A scorer process and a worker's pool, before either is there."""
    config = run_config(tmp_path / "none", sandbox={"kind": "process", "workers": 1})
    Places(tmp_path).config.write_text(dump_config(config))
    lock = AliveLock(tmp_path / "alive.lock")
    address = f"selfevo-test-{secrets.token_hex(8)}/{secrets.token_hex(8)}"
    command = [sys.executable, "-m", "rl.forge.scorer", str(tmp_path)]
    child = Child("scorer", tmp_path, lambda: command, lock, piped=True, restarts=5,
                  environment={SCORER: address})  # fmt: skip
    with ScorerPool(address) as pool:
        yield child, pool
    child.stop()
    lock.close()


def test_a_script_that_a_dead_scorer_was_running_runs_in_the_next(
    real: tuple[Child, ScorerPool], tmp_path: Path
) -> None:
    """By SIGTERM, whose end of the sandbox must not become the script's result."""
    child, pool = real
    (tmp_path / "inputs").mkdir()
    got: list[Message] = []

    def told(kind: type[Message]) -> bool:
        child.flush()
        got.extend(child.messages())
        return any(isinstance(message, kind | Failed) for message in got)

    def begin() -> None:
        got.clear()
        until(lambda: child.start_if_due(time.monotonic()))
        until(lambda: told(Ready))
        assert got == [Ready()], child.tail()
        child.up()

    code = "import time; time.sleep(2); print('done')"
    job = ScriptJob(code, tmp_path / "inputs", (), Limits(wall_seconds=30))
    running, waiting = pool.submit(job), pool.submit(ScriptJob("1/0", tmp_path / "inputs", ()))
    begin()
    assert isinstance(pool.missing, tuple)
    time.sleep(0.5)  # the script runs
    child.check_pulse(child.since + PULSE_S + 1)
    until(lambda: told(Pong))
    assert got[1:] == [Pong(1, 2, 0)]
    child.alive_by(Pong(1, 2, 0))
    assert not running.done() and child.pid is not None
    child._process.terminate()  # type: ignore[union-attr]
    until(lambda: child.ended() is not None)
    child.bury(0.0)
    begin()
    assert running.result(60).stdout == "done\n"
    assert "ZeroDivisionError" in waiting.result(60).stderr
    # one that stands still is killed
    child.check_pulse(now := time.monotonic() + PULSE_S)
    child.check_pulse(now + PULSE_LIMIT_S + 1)
    until(lambda: child.ended() is not None)

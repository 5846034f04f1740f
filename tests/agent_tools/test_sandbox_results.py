"""What a caller learns about a script: status, exit code, last line, files, the same each time."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sandbox_support

from agent_tools.sandbox import Limits, ScriptJob, ScriptResult, WarmPool, make_pool
from agent_tools.sandbox.link import WorkerGoneError
from agent_tools.sandbox.workers import checked_status, shown

Run = Callable[..., ScriptResult]
PATIENT = Limits(cpu_seconds=3, wall_seconds=40, memory_mb=256)


@pytest.fixture(scope="module", params=["warm", "cold"])
def pool(request: pytest.FixtureRequest) -> Iterator[WarmPool]:
    with (
        sandbox_support.plain_python() as python,
        make_pool("bubblewrap", 1, python=python, cold=request.param == "cold") as made,
    ):
        yield made


@pytest.fixture
def run(pool: WarmPool, tmp_path: Path) -> Run:
    (tmp_path / "train.csv").write_text("id\n1\n")

    def go(code: str, *outputs: str, limits: Limits = PATIENT) -> ScriptResult:
        return pool.run([ScriptJob(textwrap.dedent(code), tmp_path, outputs, limits)])[0]

    return go


def test_fraction_of_a_second_is_a_limit_too(run: Run) -> None:
    result = run("while True: pass", limits=Limits(cpu_seconds=0.1, wall_seconds=30))
    assert result.status == "timeout"
    assert 0.05 < result.cpu_s < 0.4


def test_out_of_memory_is_said_as_python_says_it(run: Run) -> None:
    result = run("block = bytearray(10**10)")
    assert (result.status, result.exit_code) == ("memory", 1)
    assert result.last_line == "MemoryError"


def test_errors_and_exits(run: Run) -> None:
    failed = run("def f(): return 1 / 0\nf()")
    assert failed.last_line == "ZeroDivisionError: division by zero"
    assert "worker" not in failed.stderr
    assert "return 1 / 0" in failed.stderr
    assert run("x = (").last_line.startswith("SyntaxError")
    assert run("import sys; sys.exit(3)").exit_code == 3
    assert run("import sys; sys.exit('why')").last_line == "why"
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").status == "killed"
    assert run("import ctypes; ctypes.string_at(0)").status == "killed"
    assert run("print('\x1b[31mred\\x07')").stdout == "[31mred\n"
    assert run("x = '\ud800'").status == "error"


def test_what_is_bought_at_exit_still_counts(run: Run) -> None:
    result = run("""
        import atexit, threading
        atexit.register(print, "at exit")
        threading.Thread(target=print, args=("thread",)).start()
        print("main")
        open("a", "wb").write(b"bytes \\x00")
    """, "a")  # fmt: skip
    assert sorted(result.stdout.split("\n")) == ["", "at exit", "main", "thread"]
    assert result.files == {"a": b"bytes \x00"}


def test_random_state_is_the_same_every_time(run: Run) -> None:
    code = "import random; print(random.random(), hash('text'))"
    first = run(code)
    assert first.status == "ok"
    run("import random; random.random()")
    assert run(code).stdout == first.stdout


def test_cpu_of_what_its_room_took_along_is_counted(run: Run) -> None:
    result = run(
        """
        import os, time
        for _ in range(2):
            if os.fork() == 0:
                os.setsid()
                while True: pass
        time.sleep(60)
        """,
        limits=Limits(cpu_seconds=0.6, wall_seconds=40),
    )
    assert result.status == "timeout"
    assert result.cpu_s > 0.5


def test_answer_that_is_not_made_as_agreed_is_no_answer() -> None:
    good = {"status": "ok", "exit_code": 0, "stdout": "", "stderr": "", "cpu_s": 0, "wall_s": 0.1}
    assert checked_status(good) == "ok"
    assert checked_status({**good, "exit_code": None}) == "ok"
    for change in ({"status": "great"}, {"status": None}, {"stdout": 1}, {"cpu_s": "1"}):
        with pytest.raises(WorkerGoneError):
            checked_status({**good, **change})
    with pytest.raises(WorkerGoneError):
        checked_status({"status": "ok"})


def test_terminal_controls_are_not_shown() -> None:
    assert shown("a\x1b[1m\x9b31m\x7f\tb\n") == "a[1m31m\tb\n"


def test_only_the_own_inputs_are_there(run: Run, pool: WarmPool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "secret.csv").write_text("answer-of-another-competition")
    job = ScriptJob("print(open('secret.csv').read())", other, (), PATIENT)
    assert pool.run([job])[0].stdout == "answer-of-another-competition\n"
    (other / "secret.csv").unlink()
    assert run("import os; print(os.path.exists('secret.csv'))").stdout == "False\n"

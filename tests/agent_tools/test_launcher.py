"""The local launcher with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from agent_tools.errors import UserError
from agent_tools.launcher import Job, JobSpec, LocalLauncher
from agent_tools.launcher.supervisor import explain

REPO = Path(__file__).resolve().parents[2]


def spec(tmp_path: Path, code: str, *, limit: float = 60.0, env: dict[str, str] | None = None):
    return JobSpec(
        argv=(sys.executable, "-c", code),
        cwd=tmp_path,
        env=env or {},
        run_dir=tmp_path / "run",
        wall_limit_s=limit,
    )


@pytest.fixture
def launcher(tmp_path):
    made = LocalLauncher(tmp_path / "jobs", grace_s=1.0)
    yield made
    run_dir = tmp_path / "run"
    if run_dir.is_dir():
        made.cancel(Job("unused", run_dir))


def until(condition: Callable[[], object], seconds: float = 20.0) -> object:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return value


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def read_pid(path: Path) -> int:
    text = until(lambda: path.is_file() and path.read_text())
    return int(str(text))


def record_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run" / "job.json").read_text())


# Writes its pid and that of a grandchild in a session of its own whose parent has gone.
TREE = """
import os, time, pathlib
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        pathlib.Path("grandchild.tmp").write_text(str(os.getpid()))
        os.rename("grandchild.tmp", "grandchild")
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""


def test_a_job_runs_to_its_end_with_its_variables_and_logs(launcher, tmp_path):
    code = "import os, sys; print(os.environ['WORD']); print('bad', file=sys.stderr)"
    job = launcher.submit(spec(tmp_path, code, env={"WORD": "hello"}), "a")
    status = launcher.wait(job, 30)
    assert (status.state, status.exit_code, status.signal, status.reason) == (
        "done", 0, None, None,
    )  # fmt: skip
    assert launcher.logs(job) == ["hello"]
    assert launcher.logs(job, stream="stderr") == ["bad"]
    assert "hello" not in (tmp_path / "run" / "job.json").read_text()  # no variables on disk


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(6)", (6, None, "exit")),
        ("import os; os.kill(os.getpid(), 9)", (None, "SIGKILL", "signal")),
        ("import os; os.kill(os.getpid(), 11)", (None, "SIGSEGV", "signal")),
    ],
)
def test_exit_codes_and_signals_are_told_apart(launcher, tmp_path, code, expected):
    status = launcher.wait(launcher.submit(spec(tmp_path, code), "a"), 30)
    assert status.state == "failed"
    assert (status.exit_code, status.signal, status.reason) == expected


def test_the_kernels_memory_kill_is_told_from_other_kills():
    assert explain(-9, None, 1).reason == "oom"
    assert explain(-9, None, 0).reason == "signal"
    assert explain(-9, "wall_limit", 1).reason == "wall_limit"
    assert explain(-15, "cancelled", 0).state == "cancelled"
    assert explain(1, None, 1).reason == "exit"
    assert explain(0, None, 0).state == "done"


def test_a_program_that_does_not_exist_is_a_failed_start(launcher, tmp_path):
    missing = JobSpec(("/no/such/program",), tmp_path, {}, tmp_path / "run", 5.0)
    status = launcher.wait(launcher.submit(missing, "a"), 30)
    assert (status.state, status.reason) == ("failed", "start_failed")
    assert "/no/such/program" in status.detail


def test_the_wall_limit_kills_grandchildren_that_left_the_session(launcher, tmp_path):
    job = launcher.submit(spec(tmp_path, TREE, limit=1.5), "a")
    grandchild = read_pid(tmp_path / "grandchild")
    status = launcher.wait(job, 30)
    assert (status.state, status.reason) == ("failed", "wall_limit")
    assert gone(grandchild)


def test_what_a_finished_job_leaves_behind_is_ended(launcher, tmp_path):
    code = TREE.rsplit("time.sleep", 1)[0] + "\nwhile not os.path.exists('grandchild'): pass"
    job = launcher.submit(spec(tmp_path, code), "a")
    assert launcher.wait(job, 30).state == "done"
    assert gone(read_pid(tmp_path / "grandchild"))


def test_cancel_is_idempotent_and_kills_a_job_that_ignores_sigterm(launcher, tmp_path):
    code = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\n" + TREE
    job = launcher.submit(spec(tmp_path, code), "a")
    grandchild = read_pid(tmp_path / "grandchild")
    first = launcher.cancel(job)
    assert (first.state, first.signal, first.reason) == ("cancelled", "SIGKILL", "cancelled")
    assert gone(grandchild)
    assert launcher.cancel(job) == first
    assert launcher.submit(spec(tmp_path, code), "a") == job  # still one job
    assert launcher.status(job) == first


def test_cancel_lets_the_job_save_its_state(launcher, tmp_path):
    code = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *a: (print('saved', flush=True), sys.exit(143)))\n"
        "print('up', flush=True); time.sleep(600)"
    )
    job = launcher.submit(spec(tmp_path, code), "a")
    until(lambda: launcher.logs(job) == ["up"])
    status = launcher.cancel(job)
    assert (status.state, status.exit_code) == ("cancelled", 143)
    assert launcher.logs(job) == ["up", "saved"]
    again = launcher.submit(spec(tmp_path, code), "a", restart=True)
    until(lambda: launcher.logs(again)[-1:] == ["up"])
    assert launcher.status(again).attempt == 2


def test_logs_are_readable_while_the_job_runs(launcher, tmp_path):
    code = "import time\nfor i in range(100): print(i, flush=True)\ntime.sleep(600)"
    job = launcher.submit(spec(tmp_path, code), "a")
    until(lambda: launcher.logs(job, lines=2) == ["98", "99"])
    assert launcher.status(job).state == "running"
    assert launcher.wait(job, 0.1).finished is False


def test_the_same_key_is_one_job_for_two_processes_at_once(launcher, tmp_path):
    code = "open('ran', 'a').write('x'); import time; time.sleep(600)"
    submit = (
        "import sys; from pathlib import Path\n"
        "from agent_tools.launcher import JobSpec, LocalLauncher\n"
        f"spec = JobSpec((sys.executable, '-c', {code!r}), Path({str(tmp_path)!r}), {{}}, "
        f"Path({str(tmp_path / 'run')!r}), 60.0)\n"
        f"sys.stdin.readline()\n"
        f"print(LocalLauncher(Path({str(tmp_path / 'jobs')!r})).submit(spec, 'a').id)"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", submit], cwd=REPO, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]  # fmt: skip
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    ids = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert len(ids) == 1
    until(lambda: (tmp_path / "ran").is_file())
    time.sleep(0.3)
    assert (tmp_path / "ran").read_text() == "x"


def test_the_job_outlives_the_process_that_submitted_it(launcher, tmp_path):
    submit = (
        "import sys; from pathlib import Path\n"
        "from agent_tools.launcher import JobSpec, LocalLauncher\n"
        f"spec = JobSpec((sys.executable, '-c', 'import time; time.sleep(600)'), "
        f"Path({str(tmp_path)!r}), {{}}, Path({str(tmp_path / 'run')!r}), 60.0)\n"
        f"LocalLauncher(Path({str(tmp_path / 'jobs')!r})).submit(spec, 'a')\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", submit], cwd=REPO, timeout=60)
    same = spec(tmp_path, "import time; time.sleep(600)")
    job = launcher.submit(same, "a")
    status = launcher.status(job)
    assert (status.state, status.attempt) == ("running", 1)


def test_kill_9_of_everything_then_the_same_key_starts_it_again_once(launcher, tmp_path):
    code = "open('ran', 'a').write('x')\n" + TREE
    job = launcher.submit(spec(tmp_path, code), "a")
    orphan = read_pid(tmp_path / "grandchild")
    before = record_of(tmp_path)
    os.kill(before["supervisor_pid"], signal.SIGKILL)
    until(lambda: gone(before["pid"]))  # the kernel ends the job with its supervisor
    lost = launcher.status(job)
    assert (lost.state, lost.reason) == ("failed", "lost")

    (tmp_path / "grandchild").unlink()
    assert launcher.submit(spec(tmp_path, code), "a") == job
    assert launcher.submit(spec(tmp_path, code), "a") == job
    read_pid(tmp_path / "grandchild")
    status = launcher.status(job)
    assert (status.state, status.attempt) == ("running", 2)
    assert (tmp_path / "ran").read_text() == "xx"
    assert gone(orphan)  # what the first attempt left is not running beside the second


def test_a_job_killed_before_its_supervisor_started_is_started(launcher, tmp_path):
    job = launcher.submit(spec(tmp_path, "print('x')"), "a")
    launcher.wait(job, 30)
    # What a submitter leaves that is killed between its first write and the supervisor's.
    (tmp_path / "run" / "job.json").write_text(json.dumps({"id": job.id, "state": "queued"}))
    assert launcher.status(job).reason == "lost"
    launcher.submit(spec(tmp_path, "print('x')"), "a")
    assert launcher.wait(job, 30).state == "done"


def test_a_reused_pid_is_not_taken_for_the_job_nor_killed(launcher, tmp_path):
    job = launcher.submit(spec(tmp_path, "print('x')"), "a")
    launcher.wait(job, 30)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        record = record_of(tmp_path)
        record.update(
            state="running", pid=stranger.pid, supervisor_pid=stranger.pid,
            exit_code=None, supervisor_created=record["supervisor_created"] - 100.0,
        )  # fmt: skip
        (tmp_path / "run" / "job.json").write_text(json.dumps(record))
        assert launcher.status(job).reason == "lost"
        assert launcher.cancel(job).reason == "lost"
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_job_from_before_a_reboot_is_lost(launcher, tmp_path):
    job = launcher.submit(spec(tmp_path, "print('x')"), "a")
    launcher.wait(job, 30)
    record = record_of(tmp_path)
    record.update(state="running", boot_id="another boot", exit_code=None)
    (tmp_path / "run" / "job.json").write_text(json.dumps(record))
    status = launcher.status(job)
    assert (status.state, status.reason) == ("failed", "lost")
    assert "rebooted" in status.detail


def test_one_key_or_one_run_directory_cannot_serve_two_commands(launcher, tmp_path):
    job = launcher.submit(spec(tmp_path, "print(1)"), "a")
    launcher.wait(job, 30)
    with pytest.raises(UserError, match="another command"):
        launcher.submit(spec(tmp_path, "print(2)"), "a")
    with pytest.raises(UserError, match="another run directory"):
        launcher.submit(spec(tmp_path, "print(1)"), "b")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"argv": ()}, "argv"),
        ({"cwd": Path("/no/folder")}, "/no/folder"),
        ({"wall_limit_s": 0}, "0"),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_is_written(launcher, tmp_path, change, word):
    good = spec(tmp_path, "print(1)")
    with pytest.raises(UserError, match=word):
        launcher.submit(JobSpec(**{**good.__dict__, **change}), "a")
    assert not (tmp_path / "run").exists()

"""kill -9 anywhere, checkpoints deleted, resume: everything once, as in an undisturbed campaign."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from selfevo_driver import Sessions
from selfevo_lab import new_lab, point_at
from selfevo_outcome import signature

from agent_tools.errors import UserError
from selfevo import loop
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, read_view
from selfevo.store import read_events

DRIVER = Path(__file__).with_name("selfevo_driver.py")


def drive(lab: Path, action: str, *point: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(DRIVER), action, str(lab), "rules", *point],
        stderr=subprocess.PIPE,
        env={**os.environ, **env},
    )


def reverting_lab(path: Path) -> Path:
    """A lab whose first kept change fails its confirmation: every kind of act in one round."""
    new_lab(path)
    (path / "fluke").touch()
    point_at(path, "auto", confirm_seeds="2")
    return path


@pytest.mark.real  # for its length
def test_killed_at_every_point(tmp_path: Path) -> None:
    """SIGKILL once at each edge of every kind of event, blob, snapshot, git command, job start
    and graph checkpoint, wherever it is called from; the database is deleted every third time."""
    calm, lab = reverting_lab(tmp_path / "calm"), reverting_lab(tmp_path / "lab")
    record, action, deaths = tmp_path / "points", "start", 0
    with Sessions() as sessions:
        assert sessions.run(calm, "start", rounds=1) == 0
        while (status := sessions.run(lab, action, record=str(record), rounds=1)) != 0:
            assert status == -signal.SIGKILL, lab.with_suffix(".log").read_text()[-2000:]
            deaths += 1
            assert deaths < 500, "no progress"
            log = lab / "runs/c1/events.jsonl"
            begun = log.exists() and log.stat().st_size
            action = "resume" if begun else "start"
            if not begun:  # no event yet: nothing to resume, and `run` would choose the name c2
                shutil.rmtree(lab / "runs", ignore_errors=True)
            if deaths % 3 == 0:
                (lab / "runs/c1/checkpoints.sqlite").unlink(missing_ok=True)
            elif deaths % 3 == 1 and begun:  # the machine died within a write
                with log.open("ab") as file:
                    file.write(b'{"v":1,"seq":')
    points = record.read_text().splitlines()
    assert deaths == len(points) == len(set(points)) > 90
    for what in ("pr.merge", "pr.revert", "memory", "confirm", "job.submit", "job.done", "gate"):
        assert {f"event {what} before", f"event {what} after"} <= set(points)
    for what in ("merge in keep._merge", "revert in confirm._revert", "commit in reflect._append"):
        assert {f"git {what} before", f"git {what} after"} <= set(points)
    assert {"snapshot before", "snapshot after"} <= set(points)
    assert {"supervisor before", "supervisor after", "launcher job.json after"} <= set(points)
    assert signature(lab) == signature(calm)
    assert read_view(lab / "runs/c1").prs[1].state == "reverted"


def test_the_whole_tree_killed_during_training(lab: Path, undisturbed: dict[str, Any]) -> None:
    process = drive(lab, "start", DOUBLE_STEP_S="0.2")
    metrics = lab / "runs/c1/jobs/r1-candidate-s1/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in tree:
        one.kill()
    process.communicate(timeout=30)
    psutil.wait_procs(tree, timeout=30)
    assert metrics.read_text().count("\n") < 5
    database = lab / "runs/c1/checkpoints.sqlite"
    database.unlink()
    resumed = drive(lab, "resume")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors.decode()
    assert signature(lab) == undisturbed
    starts = (metrics.parent / "starts.log").read_text().splitlines()
    assert len(starts) == 2  # started, and started again: from its checkpoint, in its folder


def test_a_damaged_checkpoint_database_is_set_aside(lab: Path, commands: Commands) -> None:
    process = drive(lab, "start", "gate", "after")
    process.communicate(timeout=120)
    database = lab / "runs/c1/checkpoints.sqlite"
    database.write_bytes(b"rubbish" * 1000)
    assert loop.resume(lab, None, lambda line: None, commands)[0] == 0
    assert read_view(lab / "runs/c1").rounds[1].verdict == "accept"


def test_a_second_run_refuses_with_pid_and_host(lab: Path, commands: Commands) -> None:
    process = drive(lab, "start", DOUBLE_STEP_S="0.3")
    deadline = time.monotonic() + 60
    log = lab / "runs/c1/events.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    try:
        host = os.uname().nodename
        for act in (
            lambda: loop.start(lab, RunOptions(agent="rules"), lambda line: None, commands),
            lambda: loop.resume(lab, None, lambda line: None, commands),
        ):
            with pytest.raises(UserError, match=rf"pid {process.pid} on {host}") as caught:
                act()
            assert caught.value.exit_code == 2
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.communicate(timeout=30)
    assert not (lab / "runs/c2").exists()
    code, _ = loop.resume(lab, None, lambda line: None, commands)  # the lock died with its owner
    assert code == 0


def test_sigterm_saves_and_resume_goes_on(lab: Path, commands: Commands) -> None:
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), "cli", "run", str(lab), "--agent", "rules"],
        stderr=subprocess.PIPE,
        env={**os.environ, "DOUBLE_STEP_S": "0.3"},
    )
    metrics = lab / "runs/c1/jobs/r0-control-s0/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and b"selfevo resume" in errors
    last = read_events(lab / "runs/c1/events.jsonl")[0][-1]
    assert last.kind == "session.end" and last.data["reason"] == "interrupted"
    assert loop.resume(lab, None, lambda line: None, commands)[0] == 0
    assert len([j for j in read_view(lab / "runs/c1").jobs.values() if j.kind == "train"]) == 4

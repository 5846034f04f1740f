"""kill -9 anywhere, checkpoints deleted, resume: everything once, as in an undisturbed campaign."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from selfevo_lab import model_lab

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


def git(lab: Path, *args: str) -> list[str]:
    return subprocess.run(
        ["git", "-C", str(lab), *args], check=True, capture_output=True, text=True
    ).stdout.splitlines()


def signature(lab: Path) -> dict[str, Any]:
    """What must be equal: rounds, jobs, PRs, memory entries, steps, commits."""
    folder = lab / "runs/c1"
    view = read_view(folder)
    jobs = sorted((job.kind, job.id, job.run, job.state) for job in view.jobs.values())
    steps = {
        path.parent.name: [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in folder.glob("jobs/r*/metrics.jsonl")
    }
    notes = git(lab, "show", "selfevo/c1/incumbent:memory/NOTES.md")
    return {
        "rounds": {n: r.verdict for n, r in view.rounds.items()},
        "jobs": jobs,
        "steps": steps,
        "prs": [(p.number, p.branch, p.state, len(p.commits)) for p in view.prs.values()],
        "memory": [line for line in notes if line.startswith("## ")],
        "lines": [entry["line"] for entry in view.memory],
        "state": view.state,
        "branches": git(lab, "branch", "--format=%(refname:short)"),
        "commits": git(lab, "log", "--format=%s", "--topo-order", "selfevo/c1/incumbent"),
        "scores": sorted((s.run, s.score.score) for s in view.scores.values()),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    lab = model_lab(tmp_path_factory.mktemp("undisturbed") / "lab")
    process = drive(lab, "start")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    return signature(lab)


POINTS = (
    ("start", "job.submit.intent", "after"),
    ("resume", "job.submit", "before"),
    ("resume", "eval.scores", "before"),
    ("resume", "round.start", "after"),
    ("resume", "tool.call", "after"),
    ("resume", "pr.open.intent", "after"),
    ("resume", "pr.open", "before"),
    ("resume", "gate", "after"),
    ("resume", "pr.merge", "before"),
    ("resume", "memory", "before"),
    ("resume", "campaign.end", "before"),
)


def test_killed_at_every_kind_of_point(lab: Path, undisturbed: dict[str, Any]) -> None:
    for number, (action, kind, when) in enumerate(POINTS):
        process = drive(lab, action, kind, when)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, (kind, when, errors.decode())
        if number % 2:
            (lab / "runs/c1/checkpoints.sqlite").unlink(missing_ok=True)
    process = drive(lab, "resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert signature(lab) == undisturbed


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


def test_sigterm_saves_and_resume_goes_on(lab: Path, commands: Commands, tmp_path: Path) -> None:
    script = tmp_path / "cli.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(DRIVER.parent)!r})\n"
        "from selfevo import arms, cli\n"
        f"arms.Commands.__init__.__defaults__ = (({sys.executable!r}, "
        f"{str(DRIVER.with_name('selfevo_double.py'))!r}, 'train'), "
        f"({sys.executable!r}, {str(DRIVER.with_name('selfevo_double.py'))!r}, 'evaluate'), "
        "*arms.Commands.__init__.__defaults__[2:3], False)\n"
        f"sys.argv = ['selfevo', 'run', {str(lab)!r}, '--agent', 'rules']\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
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

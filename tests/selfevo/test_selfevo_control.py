"""watch, pause and stop, beside a real process that runs the campaign."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from selfevo_driver import end
from selfevo_outcome import violations

from selfevo import cli, loop, watch
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, read_view
from selfevo.lab import campaigns, init_lab
from selfevo.store import read_events

DRIVER = Path(__file__).with_name("selfevo_driver.py")
PATIENCE_S = 120


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    init_lab(tmp_path / "lab")
    return tmp_path / "lab"


@pytest.fixture
def drive() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run `selfevo ARGS` in a process of its own, over the fast compute plane."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str | Path, step_s: float = 0.2) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, str(DRIVER), "cli", *map(str, args)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "DOUBLE_STEP_S": str(step_s)},
            )
        )
        return started[-1]

    yield start
    end(started, PATIENCE_S)


def until(there: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metrics(lab: Path, job: str = "r0-control-s0") -> Path:
    return lab / f"runs/c1/jobs/{job}/metrics.jsonl"


def rows(lab: Path, job: str = "r0-control-s0") -> int:
    path = metrics(lab, job)
    return path.read_text().count("\n") if path.exists() else 0


def starts(lab: Path, job: str = "r0-control-s0") -> int:
    return len((metrics(lab, job).with_name("starts.log")).read_text().splitlines())


def selfevo(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    capsys.readouterr()
    before = sys.argv
    sys.argv = ["selfevo", *map(str, args)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_pause_lets_the_job_end_and_resume_goes_on(
    lab: Path,
    commands: Commands,
    drive: Callable[..., subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = drive("run", lab, "--agent", "rules")
    until(lambda: rows(lab) >= 1)
    code, told, _ = selfevo(capsys, "pause", lab)
    assert code == 0 and "pauses after r0-control-s0 (at step " in told
    assert "asked to pause before" in selfevo(capsys, "pause", lab)[1]
    out, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 4, errors
    assert "paused by request" in errors and "selfevo resume" in out
    view = read_view(lab / "runs/c1")
    assert (view.state, view.stop_reason) == ("stopped", "paused")
    assert [(j.id, j.state) for j in view.jobs.values()] == [("r0-control-s0", "done")]
    assert view.human_acts == 1  # an intervention

    code, told, _ = selfevo(capsys, "pause", lab, "--json")
    record = json.loads(told)
    assert code == 0 and record["outcome"] == "idle" and record["jobs"] == []
    code, _, errors = selfevo(capsys, "watch", lab)
    assert code == 4 and errors == "paused: `selfevo resume` goes on\n"
    assert loop.resume(lab, None, lambda line: None, commands)[0] == 0
    assert starts(lab) == 1
    assert violations(lab, steps=5) == []
    assert [r.verdict for r in read_view(lab / "runs/c1").rounds.values()][1:] == [
        "accept",
        "no_proposal",
    ]


def test_stop_cancels_the_job_and_resume_takes_it_up_where_it_was(
    lab: Path,
    commands: Commands,
    drive: Callable[..., subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = drive("run", lab, "--agent", "rules", step_s=1.0)
    until(lambda: rows(lab) >= 2)
    code, told, _ = selfevo(capsys, "stop", lab)
    assert code == 0
    assert told == "campaign c1 is stopped; r0-control-s0 cancelled, state saved\n"
    assert process.wait(PATIENCE_S) == 143
    job = json.loads(metrics(lab).with_name("job.json").read_text())
    assert job["state"] == "cancelled" and not psutil.pid_exists(job["pid"])
    assert 2 <= rows(lab) < 5
    status = json.loads(selfevo(capsys, "status", lab, "--json")[1])
    assert (status["state"], status["reason"]) == ("stopped", "requested")

    code, told, _ = selfevo(capsys, "stop", lab)  # again: nothing is left to stop
    assert code == 0 and told == "campaign c1 is not running (requested)\n"
    assert read_view(lab / "runs/c1").human_acts == 1
    assert selfevo(capsys, "watch", lab)[0] == 143
    assert loop.resume(lab, None, lambda line: None, commands)[0] == 0
    assert starts(lab) == 2  # the same job, from its last checkpoint
    steps = [json.loads(line)["step"] for line in metrics(lab).read_text().splitlines()]
    view = read_view(lab / "runs/c1")
    assert steps == [1, 2, 3, 4, 5] and view.rounds[1].verdict == "accept"
    assert len([job for job in view.jobs.values() if job.kind == "train"]) == 4
    for command in ("stop", "pause"):
        code, told, _ = selfevo(capsys, command, lab)
        assert code == 0 and told == "campaign c1 is over (rounds)\n"


def test_stop_ends_the_jobs_of_a_loop_that_was_killed(
    lab: Path, drive: Callable[..., subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    process = drive("run", lab, "--agent", "rules", step_s=1.0)
    until(lambda: rows(lab) >= 1)
    process.kill()
    process.wait(PATIENCE_S)
    code, told, _ = selfevo(capsys, "pause", lab)
    assert code == 0 and "r0-control-s0 (at step" in told and "`selfevo stop` cancels it" in told
    code, _, errors = selfevo(capsys, "watch", lab)
    assert code == 5 and "its process is gone" in errors
    code, told, _ = selfevo(capsys, "stop", lab, "--json")
    assert code == 0 and json.loads(told)["jobs"] == ["r0-control-s0"]
    assert json.loads(metrics(lab).with_name("job.json").read_text())["state"] == "cancelled"


def test_stop_finds_a_job_whose_start_was_not_logged(
    lab: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop is killed between starting a job and writing that down."""
    command = [sys.executable, str(DRIVER), "start", str(lab), "rules", "job.submit", "before"]
    killed = subprocess.run(command, env={**os.environ, "DOUBLE_STEP_S": "1.0"}, timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL
    until(lambda: rows(lab) >= 1)
    code, told, _ = selfevo(capsys, "stop", lab)
    assert code == 0 and "r0-control-s0 cancelled, state saved" in told
    assert json.loads(metrics(lab).with_name("job.json").read_text())["state"] == "cancelled"
    assert loop.resume(lab, None, lambda line: None, commands)[0] == 0
    assert starts(lab) == 2 and violations(lab, steps=5) == []


def test_a_driver_of_another_campaign_or_host_is_left_alone(
    lab: Path, commands: Commands, drive: Callable[..., subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = RunOptions(agent="rules", review="always", rounds=1)
    assert loop.start(lab, options, lambda line: None, commands)[0] == 4
    process = drive("run", lab, "--agent", "rules", step_s=1.0)
    until((lab / "runs/c2/jobs/r0-control-s0/metrics.jsonl").exists)
    code, told, _ = selfevo(capsys, "stop", lab, "-c", "c1")
    assert code == 0 and told == "campaign c1 is not running (PR 1 waits for a review)\n"
    assert process.poll() is None
    assert selfevo(capsys, "watch", lab, "-c", "c1")[0] == 4
    owner = lab / "runs/owner.json"
    kept = owner.read_text()
    owner.write_text(json.dumps({**json.loads(kept), "host": "elsewhere"}))
    events = lab / "runs/c2/events.jsonl"
    log = events.read_bytes()
    events.write_bytes(log.replace(os.uname().nodename.encode(), b"elsewhere"))
    code, _, errors = selfevo(capsys, "stop", lab)
    assert code == 2 and "on elsewhere" in errors and errors.count("\n") == 1
    assert process.poll() is None
    events.write_bytes(log)
    owner.write_text(kept)


@pytest.mark.real  # for its length
def test_watch_follows_a_campaign_to_its_end(
    lab: Path, drive: Callable[..., subprocess.Popen[str]]
) -> None:
    runner = drive(
        "run", lab, "--agent", "rules", "--review", "always", "--rounds", "1", step_s=1.0
    )
    until(lambda: campaigns(lab))
    people, program = drive("watch", lab), drive("watch", lab, "--json")
    assert runner.wait(PATIENCE_S) == 4
    out, errors = people.communicate(timeout=PATIENCE_S)
    assert people.returncode == 4 and errors == "PR 1 waits: `selfevo pr review 1`\n"
    assert "round 1 of 1" in out and "    r0-control-s0: step " in out and "valid ▁" in out
    assert "gradient norm" in out  # the whole curve of a finished job
    out, _ = program.communicate(timeout=PATIENCE_S)
    records = [json.loads(line) for line in out.splitlines()]
    logged = read_events(lab / "runs/c1/events.jsonl")[0]
    told = [record for record in records if record["kind"] != "job.progress"]
    assert [record["seq"] for record in told] == [event.seq for event in logged]
    steps = [record for record in records if record["kind"] == "job.progress"]
    assert {"job", "step", "metrics"} <= set(steps[0]) and program.returncode == 4


def test_watch_of_a_finished_campaign_tells_it_and_ends(
    lab: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.start(lab, RunOptions(agent="rules", rounds=1), lambda line: None, commands)
    code, out, errors = selfevo(capsys, "watch", lab)
    assert code == 0 and errors == "" and out.rstrip().endswith("all rounds are done")
    assert "\x1b" not in out


def test_a_line_that_is_still_written_waits_for_its_end(tmp_path: Path) -> None:
    whole = b'{"v":1,"seq":1,"ts":1,"campaign":"c","round":0,"kind":"phase","actor":"system",'
    rest = b'"cause":null,"data":{}}\n'
    log = tmp_path / "events.jsonl"
    log.write_bytes(whole)
    tail = watch.Tail(log)
    assert list(tail.read()) == []
    with log.open("ab") as file:
        file.write(rest)
    assert [event.seq for event in tail.read()] == [1]
    assert list(tail.read()) == []

"""What the control plane itself costs: `python -m benchmarks.loop --json`

A campaign of 1,000 rounds over everything of the loop that is ours (graph, event log, git, guard,
gate, memory, report), with a scripted model in place of an endpoint and jobs that end at once in
this process. Every round looks at a digest and opens one pull request; now and then one is kept or
rejected. Half-way the process that runs it is killed with SIGKILL, and `resume_s` is measured.

Figures: `mb_1000_rounds` (all that a thousand rounds write, without the jobs' own run directories),
`bytes_a_round`, `resume_s` (process start to the first node of the campaign at its end),
`help_s` (`selfevo --help`), `round_s_first` and `round_s_last` (median seconds of the first and the
last hundred rounds, model and jobs left out), `growth` (their ratio), `overhead_s` (mean seconds a
round in our nodes, with the real launcher's time to start four jobs) and `overhead_share` (of the
proposal's round in the recorded campaign of runs/example).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agent_tools.errors import InfraError, UserError
from agent_tools.launcher import Job, JobSpec, JobStatus, LocalLauncher
from benchmarks.common import ROOT, emit, report
from selfevo import campaign, graph
from selfevo import report as writer
from selfevo.agent_prompts import call_message
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, create, open_campaign, read_view
from selfevo.events import Event
from selfevo.lab import check_lab, init_lab, locked
from selfevo.llm import Endpoint
from selfevo.store import read_events
from tests.selfevo import selfevo_double

EXAMPLE = ROOT / "runs" / "example"
ROUNDS = 1000
JOBS_A_ROUND = 4  # two train seeds, trained and measured
REPEATS = 5
WALL_LIMIT_S = 3600
#: What a job writes into its run directory; everything else of the lab is the control plane's.
JOB_FILES = ("jobs", "evals")
PARTS = (
    "events.jsonl",
    "view.snapshot",
    "blobs",
    "checkpoints.sqlite",
    "arms",
    "report",
    "other",
    "git",
)


@dataclass
class InstantLauncher:
    """Runs a job to its end inside `submit`; `spent` is the time that the jobs took."""

    folder: Path
    spent: float = 0.0
    codes: dict[str, int] = field(default_factory=dict)

    def submit(self, spec: JobSpec, key: str, *, restart: bool = False) -> Job:
        started = time.perf_counter()
        spec.run_dir.mkdir(parents=True, exist_ok=True)
        work = {"train": selfevo_double.train, "evaluate": selfevo_double.evaluate}
        name, *arguments = spec.argv
        self.codes[key] = work[name](arguments)
        self.spent += time.perf_counter() - started
        return Job(key, spec.run_dir)

    def status(self, job: Job) -> JobStatus:
        code = self.codes.get(job.id, 0)
        return JobStatus("done" if code == 0 else "failed", exit_code=code)

    def logs(
        self, job: Job, lines: int = 50, stream: Literal["stdout", "stderr"] = "stdout"
    ) -> list[str]:
        return []

    def cancel(self, job: Job) -> JobStatus:
        return self.status(job)


class InstantCommands(Commands):
    """The double's functions as commands; the trainer's dry run is a program that agrees."""

    def dry_run_argv(self, config: Path) -> tuple[str, ...]:
        return ("true",)


class ScriptedModel(Endpoint):
    """Looks at the digest, then proposes an edit that no earlier round has made."""

    def chat(self, request: Mapping[str, Any]) -> dict[str, Any]:
        messages = request["messages"]
        round_ = int(request["seed"]) % 1000 or 1000
        if messages[-1]["role"] != "tool":
            message = call_message("run_digest", {"run": "control-s0"})
        else:
            message = call_message("propose_edit", self.edit(round_))
        usage = {"prompt_tokens": 1500, "completion_tokens": 30}
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}

    def edit(self, round_: int) -> dict[str, Any]:
        if round_ % 100 == 50:  # mends the template's bad setting, later does nothing
            return {"key": "optim.lr", "direction": "decrease", "why": "validity falls"}
        if round_ % 100 == 60:  # destroys the policy again
            return {"key": "optim.lr", "direction": "increase", "why": "learns slowly"}
        value = round(1e-4 * round_, 7)
        edit = {"key": "optim.weight_decay", "direction": "increase", "why": f"try {round_}"}
        return {**edit, "value": min(value, 0.0999)}


def commands() -> InstantCommands:
    return InstantCommands(
        train=("train",), evaluate=("evaluate",), check_machine=False, launcher=InstantLauncher
    )


def quiet(line: str) -> None:
    pass


def drive(lab: Path, rounds: int, kill_after: int = 0) -> None:
    """Start a campaign, or go on with it; SIGKILL to this process when round `kill_after` ends."""
    campaign.POLL_S = 0.0
    with locked(lab, "benchmark"):
        if (lab / "runs/c1/events.jsonl").exists():
            c = open_campaign(lab, "c1", quiet, commands())
        else:
            c = create(lab, check_lab(lab), RunOptions(rounds=rounds), quiet, commands())
        launcher = c.launcher
        assert isinstance(launcher, InstantLauncher)
        c.endpoint = ScriptedModel(c.config.agent, c.folder)
        before = 0.0

        def note(event: Event) -> None:
            nonlocal before
            if event.kind != "round.end":
                return
            row = {"round": event.round, "job_s": launcher.spent - before}
            before = launcher.spent
            with (lab / "job_seconds.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if event.round == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

        c.store.listeners.append(note)
        graph.run(c, "benchmark")
        writer.write(c.folder)
        c.close()


def in_process(lab: Path, rounds: int, kill_after: int = 0) -> int:
    """`drive` in a process of its own; its exit status."""
    code = f"from benchmarks.loop import drive; drive(Path({str(lab)!r}), {rounds}, {kill_after})"
    done = subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path; {code}"],
        cwd=ROOT,
        env={**os.environ, "DOUBLE_STEP_S": "0"},
        timeout=WALL_LIMIT_S,
    )
    return done.returncode


# ------------------------------------------------------------------ figures


def round_seconds(folder: Path, lab: Path) -> list[dict[str, float]]:
    """Per round: wall time, what the model and the jobs took, and the rest, which is ours."""
    jobs = {}
    for line in (lab / "job_seconds.jsonl").read_text().splitlines():
        row = json.loads(line)
        jobs[row["round"]] = float(row["job_s"])
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    model: dict[int, float] = {}
    for event in read_events(folder / "events.jsonl")[0]:
        starts.setdefault(event.round, event.ts)
        ends[event.round] = event.ts
        if event.kind == "agent.reply":
            model[event.round] = model.get(event.round, 0.0) + float(event.data["seconds"])
    rows = []
    for n in sorted(starts):
        if n and n in jobs:
            wall = ends[n] - starts[n]
            waits = model.get(n, 0.0) + jobs[n]
            rows.append({"round": n, "wall_s": wall, "waits_s": waits, "own_s": wall - waits})
    return rows


def written_bytes(lab: Path, folder: Path) -> dict[str, int]:
    """Bytes by part, run directories of jobs left out."""
    sizes = dict.fromkeys(PARTS, 0)
    sizes["git"] = _tree_bytes(lab / ".git")
    for path in folder.iterdir():
        if path.name in JOB_FILES or path.name == "worktrees":
            continue
        name = path.name if path.name in PARTS else "other"
        name = "report" if path.name.startswith("report.") else name
        name = "checkpoints.sqlite" if path.name.startswith("checkpoints.") else name
        sizes[name] += _tree_bytes(path)
    return sizes


def _tree_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def resume_seconds(lab: Path) -> float:
    """From the start of a process to the first step of the campaign that it goes on with."""
    code = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from benchmarks import loop\n"
        "from selfevo import graph\n"
        "graph.NODES['stop'] = lambda c: os._exit(0)\n"
        f"loop.drive(Path({str(lab)!r}), 0)\n"
    )
    return best(lambda: _run([sys.executable, "-c", code]))


def help_seconds() -> float:
    return best(lambda: _run([str(Path(sys.executable).with_name("selfevo")), "--help"]))


def launch_seconds(folder: Path) -> float:
    """What the real launcher takes to start a job, in seconds (median)."""
    launcher = LocalLauncher(folder / "jobs")
    spent = []
    for i in range(REPEATS):
        spec = JobSpec(("true",), folder, {}, folder / "jobs" / str(i), 60.0)
        started = time.perf_counter()
        job = launcher.submit(spec, f"k{i}")
        spent.append(time.perf_counter() - started)
        launcher.wait(job, 60.0, poll_s=0.05)
    return statistics.median(spent)


def best(measure: Callable[[], float]) -> float:
    """The median of `REPEATS` tries."""
    return statistics.median(measure() for _ in range(REPEATS))


def _run(argv: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return time.perf_counter() - started


def recorded_round_seconds() -> float:
    """Wall time of the recorded campaign's round that had a proposal."""
    view = read_view(EXAMPLE)
    return min(r.ended - r.started for r in view.rounds.values() if r.pr is not None)


def measure(rounds: int, workdir: Path) -> dict[str, Any]:
    lab = workdir / "lab"
    init_lab(lab)
    folder = lab / "runs/c1"
    before = _tree_bytes(lab / ".git")
    killed = in_process(lab, rounds, kill_after=rounds // 2)
    if killed != -signal.SIGKILL or in_process(lab, rounds) != 0:
        raise InfraError(f"the campaign in {lab} did not run to its end")
    view = read_view(folder)
    if view.state != "done" or view.round != rounds:
        raise InfraError(f"the campaign in {lab} ended in round {view.round} of {rounds}")
    rows = round_seconds(folder, lab)
    sizes = written_bytes(lab, folder)
    sizes["git"] -= before
    a_round = sum(sizes.values()) / rounds
    # the log is cut where the last round begins, so that there is something to resume
    _cut_before_end(folder)
    edge = max(1, rounds // 10)
    own = [row["own_s"] for row in rows]
    first, last = statistics.median(own[:edge]), statistics.median(own[-edge:])
    launch = launch_seconds(workdir)
    overhead = statistics.fmean(own) + JOBS_A_ROUND * launch
    recorded = recorded_round_seconds()
    figures = {
        "overhead_share": overhead / recorded,
        "bytes_a_round": a_round,
        "mb_1000_rounds": a_round * 1000 / 1e6,
        "resume_s": resume_seconds(lab),
        "help_s": help_seconds(),
        "round_s_first": first,
        "round_s_last": last,
        "growth": last / first,
        "overhead_s": overhead,
        "launch_s": launch,
        "recorded_round_s": recorded,
        "rounds": rounds,
    }
    parts = [{"part": name, "bytes": size} for name, size in sizes.items()]
    blocks = [
        {"rounds": f"{i + 1}-{i + edge}", "own_s": statistics.median(own[i : i + edge])}
        for i in range(0, len(own), edge)
    ]
    verdicts = Counter(r.verdict for n, r in view.rounds.items() if n)
    return report("loop", figures, [*parts, *blocks, dict(verdicts)], ("langgraph", "GitPython"))


def _cut_before_end(folder: Path) -> None:
    """Take the log back to the end of its last round but one, as after a kill there."""
    log = folder / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if b'"kind":"round.end"' in line)
    log.write_bytes(b"".join(lines[: last + 1]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    workdir = Path(tempfile.mkdtemp(prefix="loop-"))
    try:
        emit(measure(args.rounds, workdir), args.json)
    except (InfraError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a campaign came to, in a form that two campaigns can be compared by."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from selfevo.campaign import read_view


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
        "branches": git(lab, "branch", "--list", "selfevo/*", "--format=%(refname:short)"),
        "commits": git(lab, "log", "--format=%s", "--topo-order", "selfevo/c1/incumbent"),
        "scores": sorted((s.run, s.score.score) for s in view.scores.values()),
    }


def violations(lab: Path, steps: int) -> list[str]:
    """What is there twice, or not at all: jobs, PRs, memory entries, commits, optimiser steps."""
    folder = lab / "runs/c1"
    view = read_view(folder)
    found = []
    for run, jobs in view.jobs_of_run.items():
        if [job.state for job in jobs] != ["done"]:
            found.append(f"run {run} has jobs {[(job.id, job.state) for job in jobs]}")
    folders = [job.folder for job in view.jobs.values()]
    there = [f"{kind}/{p.name}" for kind in ("jobs", "evals") for p in folder.glob(f"{kind}/r*")]
    if sorted(folders) != sorted(there):
        found.append(f"run directories {sorted(there)} for jobs {sorted(folders)}")
    for path in folder.glob("jobs/r*/metrics.jsonl"):
        done = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        if done != list(range(1, steps + 1)):
            found.append(f"{path.parent.name} spent steps {done}, its budget is {steps}")
    proposed = sorted(pr.round for pr in view.prs.values())
    if len(proposed) != len(set(proposed)) or list(view.prs) != list(range(1, len(proposed) + 1)):
        found.append(f"PRs {list(view.prs)} in rounds {proposed}")
    rounds = [n for n in view.rounds if n]
    notes = git(lab, "show", "selfevo/c1/incumbent:memory/NOTES.md")
    entries = [line.split(":")[0] for line in notes if line.startswith("## ")]
    if entries != [f"## c1 r{n}" for n in rounds] or len(view.memory) != len(rounds):
        found.append(f"memory entries {entries} for rounds {rounds}")
    subjects = git(lab, "log", "--format=%s", "selfevo/c1/incumbent")
    if len(subjects) != len(set(subjects)):
        found.append(f"a commit was made twice: {subjects}")
    if view.state != "done":
        found.append(f"the campaign ended as {view.state}")
    return found

"""evaluate: measure every trained seed on the held-out competitions."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from agent_tools.errors import InfraError
from selfevo import arms, jobs
from selfevo.arms import RunRequest
from selfevo.campaign import Campaign
from selfevo.medals import COUNTS, measure, parse_scores
from selfevo.nodes.launch import training
from selfevo.store import canonical, sha256


def run(c: Campaign) -> str:
    """Evaluation jobs of the round, then one eval.scores event a seed; round 0 ends here."""
    measure_runs(c, training(c))
    return "stop" if c.view.round == 0 else "gate"


def measure_runs(c: Campaign, trained: Sequence[RunRequest]) -> None:
    """Measure every training run that ended: done ones by a job, diverged ones score 0."""
    asked = c.evaluation.model_dump(mode="json", exclude={"train_seeds"}, exclude_none=True)
    eval_id = sha256(canonical(asked))[:8]
    runnable = []
    for run_ in trained:
        job = c.view.job_of(run_.run)
        state = job.state if job is not None else "failed"
        name = f"eval/{run_.run.removeprefix('train/')}/{eval_id}"
        request = replace(run_, run=name, kind="eval")
        if state == "diverged":
            _diverged(c, request)
        elif state == "done":
            runnable.append(request)
    jobs.run_all(c, runnable)
    for request in runnable:
        _scores(c, request)


def _scores(c: Campaign, request: RunRequest) -> None:
    if request.run in c.view.scores:
        return
    job = c.view.job_of(request.run)
    assert job is not None
    if job.state != "done":
        if request.role == "control":
            raise InfraError(
                f"the evaluation {job.id} failed ({job.reason}); see "
                f"{c.run_dir(job.folder) / 'stderr.log'}, then "
                f"`selfevo resume {shlex.quote(str(c.lab))}`"
            )
        return
    path = c.run_dir(job.folder) / "scores.jsonl"
    rows = parse_scores(path.read_text(encoding="utf-8"), str(path))
    found = measure(rows, request.seed)
    if found is None:
        if request.role == "control":
            raise InfraError(
                f"every script of {job.id} failed for reasons of the machine; see "
                f"{path}, then `selfevo resume {shlex.quote(str(c.lab))}`"
            )
        return
    c.emit(
        "eval.scores",
        {
            "key": f"scores/{request.run}",
            "run": request.run,
            "arm": request.arm,
            "job": job.id,
            "parent": arms.parent_id(request.parent),
            "seed": request.seed,
            "index": request.index,
            "role": request.role,
            "score": found.score.score,
            "sampling_var": found.score.sampling_var,
            "samples": found.score.samples,
            "infra": found.score.infra,
            "competitions": found.competitions,
            "medals": found.medals,
            "valid_share": found.valid_share,
            "diverged": False,
            "evaluator": job.result.get("evaluator", ""),
            "rows": c.store.blob(path.read_bytes()),
        },
    )


def _diverged(c: Campaign, request: RunRequest) -> None:
    """A run that a non-finite loss or a stop rule ended has no policy to measure: it scores 0."""
    if request.run in c.view.scores:
        return
    c.emit(
        "eval.scores",
        {
            "key": f"scores/{request.run}",
            "run": request.run,
            "arm": request.arm,
            "job": "",
            "parent": arms.parent_id(request.parent),
            "seed": request.seed,
            "index": request.index,
            "role": request.role,
            "score": 0.0,
            "sampling_var": 0.0,
            "samples": 0,
            "infra": 0,
            "competitions": {},
            "medals": {**dict.fromkeys(COUNTS, 0), "scripts": 0},
            "valid_share": 0.0,
            "diverged": True,
            "rows": None,
        },
    )

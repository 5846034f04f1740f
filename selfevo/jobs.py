"""Driving jobs: submit what a round needs, a few at a time, and log how each ended."""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Sequence
from typing import Any

from agent_tools.errors import InfraError, UserError
from agent_tools.launcher import Job, JobSpec, JobStatus
from selfevo import arms, campaign
from selfevo.arms import RunRequest, read_json
from selfevo.campaign import Campaign
from selfevo.gate import FRESH
from selfevo.views import JobView

CURVE_KEYS = (
    "reward/mle/mean",
    "rollout/valid_frac",
    "policy/entropy",
    "policy/grad_norm",
    "loss/cispo/weight_max",
    "rollout/timeout_frac",
    "rollout/truncated_frac",
    "optim/lr",
)
CURVE_POINTS = 120
MIN_FREE = 16_000_000  # bytes; a job that fails with less than this is not to blame


def pump(c: Campaign, requests: Sequence[RunRequest]) -> bool:
    """Look at every requested run once: log what ended, submit what fits. True when all ended."""
    running = 0
    for request in requests:
        job = c.view.job_of(request.run)
        if job is not None and job.state == "submitted":
            running += 0 if _settle(c, job) else 1
    open_ = [request for request in requests if not _ended(c, request)]
    for request in open_:
        job = c.view.job_of(request.run)
        if job is not None and job.state == "submitted":
            continue
        if running >= c.config.launcher.parallel:
            break
        _submit(c, request)
        running += 1
    return not open_


def run_all(c: Campaign, requests: Sequence[RunRequest]) -> None:
    """Run until every request has ended, telling progress. The wall limit is the launcher's."""
    while not pump(c, requests):
        for request in requests:
            job = c.view.job_of(request.run)
            if job is not None and job.state == "submitted":
                _progress(c, job)
        time.sleep(campaign.POLL_S)


def resubmit(c: Campaign) -> None:
    """After a restart: make sure that every job without an outcome in the log really is there.

    `submit` with the same key finds a living job, and starts a lost one again in its folder; one
    that the machine failed while nobody looked (a full disk) is started again as well.
    """
    for job in list(c.view.jobs.values()):
        if job.state == "submitted":
            data = c.view.outcomes[job.key]
            status = c.launcher.status(Job(str(data["launcher_id"]), c.run_dir(job.folder)))
            stopped = status.state == "cancelled"  # by `selfevo stop`: it goes on where it was
            _start(c, data, restart=stopped or status.exit_code == arms.INFRA)


def _ended(c: Campaign, request: RunRequest) -> bool:
    job = c.view.job_of(request.run)
    if job is None or job.state == "submitted":
        return False
    if job.state in ("done", "diverged"):
        return True
    # a failure is tried again in this session (machine faults), or by a person's `resume`
    runs = c.view.jobs_of_run[request.run]
    tries = sum(1 for j in runs if j.session == c.view.sessions)
    machine = arms.worth_retrying(job.exit_code, job.reason.split(":")[0])
    return tries >= (arms.MAX_TRIES if machine else 1)


def _submit(c: Campaign, request: RunRequest) -> None:
    tries = len(c.view.jobs_of_run.get(request.run, ()))
    test = "confirm-" if request.index >= FRESH else ""
    base = f"r{c.view.round}-{test}{request.role}-s{request.index % FRESH}"
    taken = {job.id for job in c.view.jobs.values() if job.kind == request.kind}
    name, n = base, 2
    while name in taken:
        name, n = f"{base}-{n}", n + 1
    folder = f"{'jobs' if request.kind == 'train' else 'evals'}/{name}"
    data: dict[str, Any] = {
        "job": name,
        "run": request.run,
        "kind": request.kind,
        "role": request.role,
        "arm": request.arm,
        "parent": arms.parent_id(request.parent),
        "parent_path": request.parent,
        "seed": request.seed,
        "index": request.index,
        "folder": folder,
    }
    key = f"{request.run}#{tries + 1}"
    intent = c.view.intents.get(key)
    if intent is not None:  # killed between intent and outcome: same folder, same name
        data = {k: v for k, v in intent.items() if k != "key"}
    # one that `selfevo stop` cancelled there goes on where it was
    stopped = read_json(c.run_dir(data["folder"]) / "job.json").get("state") == "cancelled"
    restart = intent is not None and stopped
    c.once("job.submit", key, data, lambda: _start(c, {**data, "key": key}, restart=restart))


def _start(c: Campaign, data: dict[str, Any], *, restart: bool = False) -> dict[str, Any]:
    run_dir = c.run_dir(data["folder"])
    env = {"PYTHONUNBUFFERED": "1"}
    if c.config.launcher.threads:
        env["OMP_NUM_THREADS"] = str(c.config.launcher.threads)
    spec = JobSpec(
        argv=_argv(c, data),
        cwd=c.folder,
        env=env,
        run_dir=run_dir,
        wall_limit_s=c.config.budget.job_wall_s,
    )
    job = c.launcher.submit(spec, data["key"], restart=restart)
    return {"launcher_id": job.id}


def _argv(c: Campaign, data: dict[str, Any]) -> tuple[str, ...]:
    run_dir = c.run_dir(data["folder"])
    arm = c.arm_folder(data["arm"])
    if data["kind"] == "train":
        config = run_yaml(c, data["arm"], data["job"])
        text = arms.run_config(
            (arm / "train.yaml").read_text(encoding="utf-8"),
            c.config.budget,
            suite=c.config.suite,
            parent=data["parent_path"],
            seed=data["seed"],
            scaffold=_scaffold(c, data["arm"]),
            group=c.name,
            name=data["job"],
        )
        if not config.exists() or config.read_text(encoding="utf-8") != text:
            config.write_text(text, encoding="utf-8")
        return c.commands.train_argv(config, run_dir)
    checkpoint = trained_checkpoint(c, data["arm"], data["parent"], data["index"])
    return c.commands.evaluate_argv(
        checkpoint, arm, c.view.info["suite"], c.evaluation, c.config.budget, run_dir
    )


def run_yaml(c: Campaign, arm: str, job: str) -> Any:
    """Where the RUN.yaml of a training job is written."""
    return c.arm_folder(arm) / f"{job}.yaml"


def _scaffold(c: Campaign, arm: str) -> Any:
    return c.arm_folder(arm) / "scaffold"


def trained(c: Campaign, arm: str, parent: str, index: int) -> JobView | None:
    """The last training job of (arm, parent, seed index)."""
    jobs = c.view.jobs_of_arm.get((arm, "train"), ())
    found = [job for job in jobs if (job.parent, job.index) == (parent, index)]
    return found[-1] if found else None


def trained_checkpoint(c: Campaign, arm: str, parent: str, index: int) -> Any:
    """Folder of the checkpoint that a finished training job left."""
    job = trained(c, arm, parent, index)
    name = job.result.get("checkpoint") if job is not None else None
    if job is None or not name:
        raise InfraError(
            f"seed {index} of arm {arm} left no checkpoint; see its stderr.log, then "
            "`selfevo resume`"
        )
    return c.run_dir(job.folder) / str(name)


def _settle(c: Campaign, job: JobView) -> bool:
    """Log the outcome of a job that has ended; False while it runs."""
    run_dir = c.run_dir(job.folder)
    handle = Job(str(c.view.outcomes[job.key]["launcher_id"]), run_dir)
    status = c.launcher.status(handle)
    if not status.finished:
        return False
    if status.reason == "lost" and not (run_dir / "result.json").is_file():
        # its supervisor was killed: the same key goes on in the same folder
        restarts = c.progress.get(f"lost/{job.key}", "")
        if len(restarts) < arms.MAX_TRIES:
            c.progress[f"lost/{job.key}"] = restarts + "x"
            _start(c, c.view.outcomes[job.key])
            return False
    if status.exit_code == arms.INFRA and shutil.disk_usage(c.folder).free < MIN_FREE:
        raise InfraError(
            f"no space left for {job.id} in {c.folder}; free some, then "
            f"`selfevo resume {shlex.quote(str(c.lab))}`"
        )
    state, reason = arms.outcome(job.kind, run_dir, status.state, status.exit_code, _reason(status))
    detail = ""
    if state == "failed":
        lines = [line for line in c.launcher.logs(handle, 20, "stderr") if line.strip()]
        detail = lines[-1][:300] if lines else ""
    c.emit(
        "job.done",
        {
            "job_key": job.key,
            "job": job.id,
            "kind": job.kind,
            "state": state,
            "reason": reason,
            "detail": detail,
            "exit_code": status.exit_code,
            "signal": status.signal,
            "result": arms.summary(run_dir, job.kind),
            "curves": curves(c, job) if job.kind == "train" else None,
        },
    )
    return True


def _reason(status: JobStatus) -> str:
    if status.state == "done" or status.reason in (None, "exit"):
        return ""
    return f"{status.reason}: {status.detail}" if status.detail else str(status.reason)


def curves(c: Campaign, job: JobView) -> str | None:
    """Blob of the run's curves, {key: [[step, value], …]}, so that views need no run directory."""
    from agent_tools.wandb_logs import read_run  # a resume needs none

    try:
        history = read_run(c.run_dir(job.folder))
    except UserError:
        return None  # the job died before its first line
    found: dict[str, list[list[float]]] = {}
    for key in CURVE_KEYS:
        points = history.series(key)
        stride = max(1, math.ceil(len(points) / CURVE_POINTS))
        kept = [[step, value] for step, value in points[::stride] if math.isfinite(value)]
        if kept:
            found[key] = kept
    return c.store.json_blob(found)


def _progress(c: Campaign, job: JobView) -> None:
    """One line when a running job has come further; not logged."""
    run_dir = c.run_dir(job.folder)
    if job.kind == "train":
        row = arms.last_metrics(run_dir)
        if "step" not in row:
            return
        parts = [f"step {row['step']}/{c.config.budget.steps}"]
        for key, label in (("reward/mle/mean", "reward"), ("rollout/valid_frac", "valid")):
            if isinstance(row.get(key), (int, float)):
                parts.append(f"{label} {row[key]:.2f}")
    else:
        scores = run_dir / "scores.jsonl"
        if not scores.is_file():
            return
        done = scores.read_bytes().count(b"\n")
        parts = [f"{done} scripts graded"]
    line = f"    {job.id}: {'  '.join(parts)}"
    if c.progress.get(job.id) != line:
        c.progress[job.id] = line
        if job.kind == "train":
            c.say(line)

"""One round of the loop with asynchronous jobs: `python -m benchmarks.gpu_loop --json`

Makes a lab, starts `selfevo run --rounds 1` in it, and measures what the jobs did. Each training
job is a supervisor with workers, gateway, engine and trainer; with `--engine vllm --device cuda`
vLLM and the trainer share one card, and weights go through its memory.

    python -m benchmarks.gpu_loop --json                                  two cores, our own engine
    python -m benchmarks.gpu_loop --json --engine vllm --device cuda      one card and 16 cores

Needs no virtual environment: every child runs under this very interpreter, with our PYTHONPATH.
Scripts of the policy run under SELFEVO_SCRIPT_PYTHON on the data in SELFEVO_DATA; the sandbox is
bubblewrap where it starts, else plain processes (`--sandbox` chooses).

`--work DIR` keeps lab and runs; asked again with it, a round that was cut off goes on. After
`--minutes` the round is stopped (its state is saved) and the exit code is 3. `--out DIR` gets
gpu_loop.json, and logs.tar.gz with every log and record, whatever happened.

Figures (of all training jobs together unless they say otherwise):

    wall_s                   the whole round, models' starts included; of the last session where
                             `sessions` is above 1
    before_*, after_*        of the control and of what the round leaves: mean percentile, share of
                             valid scripts and of scripts with a medal, held-out competitions
    tok_s                    response tokens a second, from a job's first call to its last step
    step_s                   from a job's first call to its last step, a step
    generate_s, execute_s    of it: at least one call, one script ran (both run at once, and beside
                             the training)
    wait_batch_s, update_s   of it, but for the first step: the trainer waited for groups, trained
                             and saved
    sync_s                   of it: new weights went to the engine
    start_s                  until a job's engine, gateway, workers and trainer are all there
    lr0_kl, lr0_kl_max       k3 between trainer and engine before the first update, nats a token
    engine_corr              correlation of their log-probs there
    card_peak_gb             of the card's memory, above what was in use before
    trainer_gb               the most that a trainer's allocator held

The exit code is 1 if anything did not end right: a job, a group consumed twice or never, a damaged
record, a policy lag over its bound, a process left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from agent_tools.errors import InfraError
from agent_tools.git_configs import LabRepo, edit_yaml
from agent_tools.launcher.supervisor import JOB_MARK
from agent_tools.sandbox import ScriptJob, make_pool
from benchmarks.async_rl import covered, from_pool
from benchmarks.common import ROOT, emit, report
from benchmarks.gpu_card import CardUse, watched
from rl.config import RunConfig, load_config
from rl.forge.messages import parse_episode
from rl.forge.places import GroupLog, Places
from rl.pool import Pool
from rl.run_dir import RunDir
from rl.window import lag_bound, window_size
from selfevo import text
from selfevo.campaign import read_view
from selfevo.config import TRAIN_CONFIG
from selfevo.doctor_checks import SCRIPT
from selfevo.installed import version_of
from selfevo.lab import init_lab
from selfevo.medals import before_after
from selfevo.memory import gate_line
from selfevo.records import JobView
from selfevo.views import CampaignView

Row = dict[str, Any]
Gather = Callable[[list[float]], float]
STOP_S = 60.0
UNFINISHED = 3
MODULES = (
    "selfevo.cli",
    "selfevo.graph",
    "selfevo.report",
    "openai",
    "wandb",
    "agent_tools.wandb_logs",
    "rl.forge.run",
    "rl.forge.supervisor",
    "rl.forge.worker",
    "rl.forge.trainer",
    "rl.gateway.__main__",
    "rl.evaluate",
    "rl.wandb_log",
    "model.serve",
)
LOGS = ("*.log", "*.jsonl", "*.json", "*.yaml", "*.md", "*.html")
STAGES = ("wait_batch", "update", "sync")


class LoopError(Exception):
    """The round cannot start, in words for people."""


# ------------------------------------------------------------------ before


def check_imports() -> None:
    """The modules of every process of the round, under this interpreter; LoopError if one fails."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", code, *MODULES],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        fault = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise LoopError(f"{sys.executable}: {fault}; put what is missing on PYTHONPATH")


def environment() -> dict[str, str]:
    """Of every child: ours, with this checkout first on the path."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }


def sandbox_kind(asked: str, folder: Path) -> str:
    """`bubblewrap` if a script runs in it here, else `process`; or what was asked for."""
    inputs = folder / "inputs"
    inputs.mkdir(exist_ok=True)
    for kind in ("bubblewrap", "process") if asked == "auto" else (asked,):
        try:
            with make_pool(kind, 1) as pool:
                result = pool.run([ScriptJob(SCRIPT, inputs)])[0]
        except InfraError as error:
            reason = str(error)
            continue
        if result.status == "ok":
            return kind
        reason = f"a script ended as {result.status}: {result.last_line}"
    raise LoopError(f"sandbox {kind}: {reason}")


def make_lab(lab: Path, args: argparse.Namespace, sandbox: str) -> None:
    """The template with asynchronous jobs, in the size that the command line gives."""
    init_lab(lab, healthy=args.healthy, rollouts=args.engine)
    train, settings, measuring = lab / TRAIN_CONFIG, lab / "selfevo.yaml", lab / "configs/eval.yaml"
    edit_yaml(train, "sandbox.kind", sandbox)
    edit_yaml(train, "sandbox.workers", args.sandboxes)
    if args.sync:
        edit_yaml(train, "forge.sync", args.sync)
    with train.open("a", encoding="utf-8") as file:
        file.write(f"device: {args.device}\n")
    edit_yaml(settings, "budget.steps", args.steps)
    edit_yaml(settings, "budget.scripts_per_step", args.scripts)
    edit_yaml(settings, "budget.job_wall_s", float(args.job_wall))
    edit_yaml(settings, "launcher.parallel", args.parallel)
    edit_yaml(measuring, "samples", args.samples)
    changed = [TRAIN_CONFIG, "selfevo.yaml", "configs/eval.yaml"]
    LabRepo(lab).commit(changed, "Size the round", worktree=lab)


# ------------------------------------------------------------------ the round


def play(lab: Path, args: argparse.Namespace, log: Path) -> int | None:
    """`selfevo run`, or `resume` where a round was cut off; None if the time was up."""
    begun = next(iter((lab / "runs").glob("*/events.jsonl")), None)
    words = ["resume", str(lab)] if begun else ["run", str(lab), "--rounds", "1"]
    words += [] if begun else ["--agent", args.agent, "--seed", str(args.seed)]
    variables = environment()
    if args.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "selfevo.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=variables,
        )
        try:
            return process.wait(60 * args.minutes)
        except subprocess.TimeoutExpired:
            stop = [sys.executable, "-m", "selfevo.cli", "stop", str(lab)]
            subprocess.run(stop, stdout=out, stderr=out, env=variables, timeout=STOP_S)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return None


def leftovers(folder: Path) -> list[str]:
    """Processes that carry the mark of a job of this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(JOB_MARK, "")
            if mark.partition(":")[2].startswith(str(folder)):
                found.append(" ".join(process.cmdline())[:120] or process.name())
        except psutil.Error:
            continue
    return found


# ------------------------------------------------------------------ after


def faults_of(name: str, run_dir: Path, config: RunConfig) -> list[str]:
    """What is wrong with a training job that ended; [] for a right one."""
    found: list[str] = []
    steps, size = config.budget.steps, config.groups_per_step
    rows, lines = RunDir(run_dir).rows(), GroupLog(Places(run_dir).groups).lines()
    numbers = list(range(1, len(rows) + 1))
    if [row["step"] for row in rows] != numbers or [line["step"] for line in lines] != numbers:
        found.append(f"{name}: rows and groups are not those of steps 1 … {len(rows)}")
    consumed: Counter[int] = Counter()
    slots = (config.forge.steps_ahead + 1) * size
    width = window_size(config.forge.order, slots, config.forge.window_share)
    bound = lag_bound(slots, width, size)
    with Pool(Places(run_dir).pool_of(config), create=False) as pool:
        if damaged := pool.stats().damaged:
            found.append(f"{name}: damaged: {', '.join(damaged)}")
        for line in lines:
            for group in [*line["trained"], *line["dropped"]]:
                consumed.update({parsed[0] for e in group if (parsed := parse_episode(e))})
    if consumed != Counter(range(steps * size)):
        found.append(f"{name}: consumed {dict(consumed)}, not each of {steps * size} groups once")
    lag = max((row.get("lag/max", 0.0) for row in rows), default=0.0)
    if lag > bound:
        found.append(f"{name}: policy lag {lag:g} over its bound {bound}")
    return found


def job_row(job: JobView, run_dir: Path, config: RunConfig) -> Row:
    """Figures of one training job."""
    rows = RunDir(run_dir).rows()
    calls, scripts, ends = from_pool(Path(Places(run_dir).pool_of(config)))
    said = (run_dir / "stdout.log").read_text(encoding="utf-8", errors="replace")
    starts = re.findall(r"^(\S+) is ready after ([\d.]+) s", said, re.M)
    row: Row = {
        "job": job.id,
        "seed": job.seed,
        "lr": config.optim.lr,
        "wall_s": round(job.ended - job.started, 1),
        "steps": len(rows),
        "scripts": config.budget.steps * config.budget.scripts_per_step,
        "tokens": sum(tokens for _, tokens in ends),
        "start_s": {name: float(seconds) for name, seconds in starts},
        "reward": [round(r["reward/mle/mean"], 4) for r in rows if "reward/mle/mean" in r],
    }
    row["sessions"] = sum(name == "trainer" for name, _ in starts)
    if calls and rows and row["sessions"] == 1:  # else the times hold a pause
        first, last = min(start for start, _ in calls), float(rows[-1]["t"])
        row["tok_s"] = row["tokens"] / max(last - first, 1e-9)
        row["generate_s"] = covered(calls, first, last) / len(rows)
        row["execute_s"] = covered(scripts, first, last) / len(rows)
        row["step_s"] = (last - first) / len(rows)
        later = rows[1:] or rows  # the first waits for the processes to start
        for stage in STAGES:
            row[f"{stage}_s"] = statistics.fmean(r.get(f"perf/{stage}_s", 0.0) for r in later)
    if rows:
        row["lr0_kl"] = rows[0].get("mismatch_kl/lr0_mean")
        row["lr0_kl_max"] = rows[0].get("mismatch_kl/lr0_max")
        row["engine_corr"] = rows[0].get("engine/logprob_corr")
        row["matched_tokens"] = rows[0].get("engine/matched_tokens")
        row["max_lag"] = max(r.get("lag/max", 0.0) for r in rows)
        row["dropped_groups"] = sum(r.get("group/dropped", 0.0) for r in rows)
        if (gb := max((r.get("perf/trainer_gpu_gb", 0.0) for r in rows), default=0.0)) > 0:
            row["trainer_gb"] = gb
    return row


def medals_of(view: CampaignView) -> Row:
    """The two rows of `selfevo run`'s last table: the start's, and the kept arm's."""
    pair, figures = before_after(view), Row()
    for name, row in zip(("before", "after"), pair or (), strict=False):
        figures[f"{name}_percentile"] = row.percentile
        figures[f"{name}_valid"] = row.valid_share
        figures[f"{name}_medals"] = row.share
    return figures


def outcome(
    lab: Path, code: int | None, use: CardUse, wall_s: float
) -> tuple[Row, list[Row], list[str], Row]:
    """(figures, rows, what is wrong, what was said) of the round as it stands."""
    folder = next(iter(sorted((lab / "runs").glob("c*/events.jsonl")))).parent
    view = read_view(folder)
    wrong = [] if code == 0 else [f"selfevo ended with {'a stop' if code is None else code}"]
    if code == 0 and view.state != "done":
        wrong.append(f"the campaign is {view.state}")
    rows: list[Row] = []
    for job in view.jobs.values():
        if job.state != "done":
            wrong.append(f"{job.kind} {job.id}: {job.state} {job.reason}")
            continue
        if job.kind == "train":
            run_dir = folder / job.folder
            config = load_config(run_dir / "config.resolved.yaml")
            rows.append(job_row(job, run_dir, config))
            wrong += faults_of(job.id, run_dir, config)
    wrong += [f"left behind: {command}" for command in leftovers(folder)]
    figures: Row = {
        "wall_s": round(wall_s, 1),
        "jobs": len(rows),
        "sessions": view.sessions,
        **medals_of(view),
    }
    sums: dict[str, Gather] = {
        "tok_s": statistics.fmean,
        "start_s": max,
        "lr0_kl": max,
        "lr0_kl_max": max,
    }
    more: dict[str, Gather] = {
        "engine_corr": min,
        "max_lag": max,
        "trainer_gb": max,
        "dropped_groups": sum,
    }
    means: dict[str, Gather] = {
        f"{stage}_s": statistics.fmean for stage in ("generate", "execute", *STAGES, "step")
    }
    for key, gather in {**sums, **more, **means}.items():
        values = [_number(row[key]) for row in rows if row.get(key) is not None]
        if values:
            figures[key] = gather(values)
    if use.samples:
        figures["card_peak_gb"] = use.peak - use.before
        figures["card_busy"] = use.busy
        figures |= {f"card_{role}_gb": gb for role, gb in sorted(use.by_role.items())}
    gate = view.rounds[1].gate if 1 in view.rounds else None
    proposal = view.rounds[1].proposal if 1 in view.rounds else None
    figures["verdict"] = view.rounds[1].verdict if 1 in view.rounds else None
    said: Row = {
        "gate": gate,
        "gate_line": gate_line(gate) if gate else None,
        "proposal": proposal,
        "medals": text.medal_change(view),
    }
    return figures, rows, wrong, said


def _number(value: Any) -> float:
    return float(max(value.values(), default=0.0)) if isinstance(value, Mapping) else float(value)


def pack(work: Path, out: Path) -> None:
    """Every log and record of `work` as logs.tar.gz; weights and pools stay."""
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        for path in sorted(work.rglob("*")):
            inside = path.relative_to(work)
            heavy = {"checkpoints", "worktrees", ".git"} & set(inside.parts)
            if path.is_file() and not heavy and any(path.match(kind) for kind in LOGS):
                archive.add(path, str(inside), recursive=False)


def complain(work: Path) -> None:
    """The ends of the logs that tell of a failure, on stderr."""
    kinds = ("round.log", "lab/runs/*/jobs/*/std*.log", "lab/runs/*/jobs/*/forge/*.log")
    for path in (path for kind in kinds for path in sorted(work.glob(kind))):
        words = path.read_text(encoding="utf-8", errors="replace")[-1500:]
        if words.strip():
            print(f"--- {path.relative_to(work)}\n{words}", file=sys.stderr)


# ------------------------------------------------------------------ command


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_loop")
    add = parser.add_argument
    add("--json", action="store_true")
    add("--engine", choices=("own", "vllm"), default="own")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of the trainer")
    add("--sync", choices=("file", "ipc"), help="default: ipc with vllm, else file")
    add("--healthy", action="store_true", help="start from the tuned learning rate")
    add("--agent", choices=("model", "rules", "random"), default="model")
    add("--sandbox", choices=("auto", "bubblewrap", "process"), default="auto")
    add("--sandboxes", type=int, help="of a job (default: 2 on cpu, 6 on cuda)")
    add("--parallel", type=int, help="jobs at a time (default: 1 on cpu, 2 on cuda)")
    add("--steps", type=int, default=5)
    add("--scripts", type=int, default=24, help="a step, in groups of 8")
    add("--samples", type=int, default=16, help="a held-out competition and seed")
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=8.5, help="then the round is stopped")
    add("--job-wall", type=float, default=420, help="seconds a job")
    add("--work", type=Path, help="lab and runs go here and stay; asked again, it goes on")
    add("--out", type=Path, help="gets gpu_loop.json and logs.tar.gz")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    args.parallel = args.parallel or (2 if cuda else 1)
    args.sandboxes = args.sandboxes or (6 if cuda else 2)
    return args


def run(args: argparse.Namespace, work: Path) -> tuple[Row, int]:
    """The round in `work`: (the result, exit code)."""
    check_imports()
    lab = work / "lab"
    sandbox = sandbox_kind(args.sandbox, work)
    if not (lab / "selfevo.yaml").is_file():
        make_lab(lab, args, sandbox)
    log, started = work / "round.log", time.monotonic()
    with watched() as use:
        code = play(lab, args, log)
    wall_s = time.monotonic() - started
    if not any((lab / "runs").glob("c*/events.jsonl")):
        raise LoopError(f"the round did not begin: {log.read_text()[-600:].strip()}")
    figures, rows, wrong, said = outcome(lab, code, use, wall_s)
    result = report(
        "gpu_loop",
        figures,
        rows,
        packages=("torch", "wandb", "langgraph", *(["vllm"] if args.engine == "vllm" else [])),
        engine=args.engine,
        device=args.device,
        sandbox=sandbox,
        settings={k: v for k, v in vars(args).items() if k not in ("work", "out", "json")},
        wrong=wrong,
        **said,
    )
    result["versions"]["selfevo"] = version_of("selfevo")
    unfinished = code is None
    return result, UNFINISHED if unfinished else int(bool(wrong))


def main() -> None:
    """One round; prints one object."""
    args = arguments()
    work = (args.work or Path(tempfile.mkdtemp(prefix="gpu-loop-"))).absolute()
    code = 1
    for folder in (work, args.out):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    try:
        if args.device == "cuda":
            import torch  # noqa: F401 - so that the hardware's GPU is named

        result, code = run(args, work)
        if args.out:
            (args.out / "gpu_loop.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        emit(result, args.json)
        for line in result["wrong"]:
            print(f"wrong: {line}", file=sys.stderr)
    except LoopError as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        if code:
            complain(work)
        if args.out:
            pack(work, args.out)
        if not args.work and code == 0:
            shutil.rmtree(work, ignore_errors=True)
        elif code:
            print(f"what was done is in {work}: --work {work} goes on with it", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

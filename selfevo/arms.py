"""Arms: what is trained and measured, under which cache key, and the jobs that do it.

An arm is the content of configs/train.yaml and scaffold/ at a commit. Every arm gets the same
parent checkpoint, train seeds and allowed budget; a run is cached by (arm, parent, budget, seed).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from agent_tools.config_text import parse_yaml
from agent_tools.launcher import Launcher, LocalLauncher
from selfevo.config import TRAIN_CONFIG, BudgetSection, EvalConfig, dump_yaml
from selfevo.gate import FRESH, Budget
from selfevo.llm import ServeCommand
from selfevo.store import canonical, sha256

FULL_ISOLATION = "require_full_isolation"  # key of the section `sandbox` of configs/train.yaml
DIVERGED = 6  # exit code of a run that a non-finite loss or a stop rule ended
INFRA = 5
MAX_TRIES = 2  # attempts a session at a job that the machine failed


@dataclass(frozen=True)
class Commands:
    """The command lines of the compute plane; tests put small programs here."""

    train: tuple[str, ...] = (sys.executable, "-m", "rl.train")
    evaluate: tuple[str, ...] = (sys.executable, "-m", "rl.evaluate")
    serve: ServeCommand = field(default_factory=ServeCommand)
    solve: tuple[str, ...] = (sys.executable, "-m", "agent_tools.mle_agent", "run")
    prepare: tuple[str, ...] = (sys.executable, "-m", "agent_tools.mle_bench", "prepare")
    check_machine: bool = True
    """Whether the suite's prepared data is looked for first; another plane may need none."""
    launcher: Callable[[Path], Launcher] = LocalLauncher
    """Where jobs run: makes a launcher that keeps its records in the given folder."""

    def train_argv(self, config: Path, run_dir: Path) -> tuple[str, ...]:
        return (*self.train, str(config), "--run-dir", str(run_dir), "--resume")

    def dry_run_argv(self, config: Path) -> tuple[str, ...]:
        return (*self.train, str(config), "--run-dir", str(config.parent / "dry"), "--dry-run")

    def evaluate_argv(
        self,
        checkpoint: Path,
        arm: Path,
        suite: str,
        settings: EvalConfig,
        budget: BudgetSection,
        out: Path,
    ) -> tuple[str, ...]:
        """`arm` is the folder of `write_arm`; its sandbox settings are those of its training."""
        sandbox = parsed((arm / "train.yaml").read_text("utf-8"), TRAIN_CONFIG).get("sandbox")
        sandbox = sandbox if isinstance(sandbox, dict) else {}
        return (
            *self.evaluate,
            "--checkpoint",
            str(checkpoint),
            "--split",
            settings.split,
            "--suite",
            suite,
            "--samples",
            str(settings.samples),
            "--temperature",
            str(settings.temperature),
            "--seed",
            str(settings.seed),
            "--max-new-tokens",
            str(budget.tokens_per_script),
            "--cpu-seconds",
            str(budget.cpu_seconds_per_script),
            "--sandbox",
            str(sandbox.get("kind", "bubblewrap")),
            "--workers",
            str(sandbox.get("workers", 2)),
            *(["--require-full-isolation"] if sandbox.get(FULL_ISOLATION) is True else []),
            "--scaffold",
            str(arm / "scaffold"),
            "--out",
            str(out),
            "--ledger",
            str(arm.parent.parent / "val_ledger.jsonl"),
            "--json",
        )


@dataclass(frozen=True)
class RunRequest:
    """One run that a round needs; `run` is its cache key."""

    run: str
    kind: str  # train | eval
    role: str  # control | candidate
    arm: str
    parent: str
    seed: int
    index: int


class ArmSource(Protocol):
    """Reads files of a commit (`agent_tools.git_configs.LabRepo`)."""

    def read_bytes(self, rev: str, path: str) -> bytes: ...

    def list_files(self, rev: str, prefix: str = "") -> list[str]: ...


def arm_files(repo: ArmSource, commit: str) -> dict[str, bytes]:
    """Content of the arm's files at a commit."""
    paths = [TRAIN_CONFIG, *repo.list_files(commit, "scaffold/")]
    return {path: repo.read_bytes(commit, path) for path in paths}


def arm_id(files: Mapping[str, bytes]) -> str:
    """Twelve hex digits that name the arm's content."""
    return sha256(canonical({path: sha256(raw) for path, raw in files.items()}))[:12]


def write_arm(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the arm's files into `folder` (train.yaml, scaffold/…); the same again is harmless."""
    for path, raw in files.items():
        target = folder / (path.removeprefix("configs/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != raw:
            target.write_bytes(raw)


def run_config(
    train: str,
    budget: BudgetSection,
    *,
    suite: str,
    parent: str,
    seed: int,
    scaffold: Path | None,
    group: str,
    name: str,
) -> str:
    """RUN.yaml of a training job: the arm's configuration under what the harness imposes."""
    data = parsed(train, TRAIN_CONFIG)
    wandb = data.get("wandb") if isinstance(data.get("wandb"), dict) else {}
    imposed: dict[str, Any] = {
        "seed": seed,
        "suite": suite,
        "model": {"checkpoint": parent},
        "budget": {
            "steps": budget.steps,
            "scripts_per_step": budget.scripts_per_step,
            "tokens_per_script": budget.tokens_per_script,
            "cpu_seconds_per_script": budget.cpu_seconds_per_script,
        },
        "scaffold": None if scaffold is None else str(scaffold),
        "wandb": {**(wandb or {}), "group": group, "name": name, "job_type": "train"},
    }
    return dump_yaml({**data, **imposed})


@lru_cache(maxsize=16)
def parsed(text: str, where: str) -> Mapping[str, Any]:
    """Configuration text as a mapping that nobody changes; YAML is slow, and texts recur."""
    return parse_yaml(text, where)


def budget_id(budget: BudgetSection) -> str:
    return sha256(canonical(budget.model_dump(mode="json", exclude={"campaign_hours"})))[:8]


def allowed_budget(run_yaml: str) -> Budget:
    """What a job's RUN.yaml allows it to spend."""
    budget = parsed(run_yaml, "RUN.yaml")["budget"]
    return Budget(
        budget["steps"] * budget["scripts_per_step"],
        budget["tokens_per_script"],
        budget["cpu_seconds_per_script"],
    )


def train_seed(campaign_seed: int, index: int) -> int:
    """Train seed number `index` of a campaign; no two campaigns share one (up to 1,000 each).

    Seeds of confirmations (indices from `FRESH`) count down from 2³¹ − 1.
    """
    if index >= FRESH:
        return 2**31 - 1 - (campaign_seed * 1000 + index - FRESH)
    return campaign_seed * 1000 + index


def parent_id(parent: str) -> str:
    """A short name of a parent checkpoint for keys: its own if short, else a hash."""
    plain = parent.isascii() and parent.replace("-", "").isalnum() and len(parent) <= 20
    return parent if plain else sha256(parent)[:12]


def requests_for(
    arms: Sequence[tuple[str, str]],
    indices: Sequence[int],
    *,
    parent: str,
    budget: str,
    campaign_seed: int,
) -> list[RunRequest]:
    """Training runs of (role, arm) × seed indices, control first; equal keys are asked for once."""
    found: dict[str, RunRequest] = {}
    for role, arm in arms:
        for index in indices:
            seed = train_seed(campaign_seed, index)
            run = f"train/{arm}/{parent_id(parent)}/{budget}/s{seed}"
            request = RunRequest(run, "train", role, arm, parent, seed, index)
            found.setdefault(request.run, request)
    return list(found.values())


# ------------------------------------------------------------------ run directories


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is none (the writer may not have come so far)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl, {} before the first; reads the file's tail only."""
    path = run_dir / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 16_384))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines[:-1]):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return {}


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that `checkpoints/latest` names, resolved; None if there is none."""
    link = run_dir / "checkpoints" / "latest"
    return link.resolve() if link.exists() else None


def summary(run_dir: Path, kind: str) -> dict[str, Any]:
    """What the log keeps of a finished job's result.json."""
    result = read_json(run_dir / "result.json")
    keys = (
        ("steps", "tokens", "seconds", "device", "versions")
        if kind == "train"
        else ("seconds", "infra_errors", "evaluator", "versions")
    )
    kept = {key: result[key] for key in keys if key in result}
    if kind == "train":
        checkpoint = latest_checkpoint(run_dir)
        if checkpoint is not None:
            kept["checkpoint"] = str(checkpoint.relative_to(run_dir.resolve()))
    return kept


def outcome(
    kind: str, run_dir: Path, state: str, exit_code: int | None, reason: str
) -> tuple[str, str]:
    """(state, reason) for the log, from what the launcher says: done, diverged or failed."""
    if kind == "train" and exit_code == DIVERGED:
        return "diverged", reason or "non-finite loss or stop rule"
    if (run_dir / "result.json").is_file():  # written last: the work is whole, however it ended
        return "done", ""
    if exit_code == 0 and state == "done":
        return "failed", "ended without result.json"
    return "failed", reason or f"exit code {exit_code}"


def worth_retrying(exit_code: int | None, reason: str | None) -> bool:
    """Machine faults are tried again; answers (exit 1, 2, 6), wall limits and cancels are not."""
    return exit_code == INFRA or reason in ("signal", "oom", "lost")

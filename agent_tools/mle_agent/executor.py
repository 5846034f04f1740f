"""Run scripts: many small ones in warm workers, or each in a container with MLE-bench's paths."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent_tools.errors import InfraError
from agent_tools.mle_agent.container import Container, collect
from agent_tools.sandbox import Limits, ScriptJob, ScriptPool, ScriptResult

SUBMISSION = "submission.csv"
_QUEUE_S = 900.0


@dataclass(frozen=True)
class Run:
    """One execution: the script, and the public folder that it finds."""

    code: str
    public: Path


class Executor(Protocol):
    """Executes scripts; results in the order of the runs, submissions in `files`."""

    def run(self, runs: Sequence[Run]) -> list[ScriptResult]: ...


class PoolExecutor:
    """Scripts find the public files beside them and write submission.csv there."""

    def __init__(self, pool: ScriptPool, limits: Limits) -> None:
        self._pool = pool
        self._limits = limits

    def run(self, runs: Sequence[Run]) -> list[ScriptResult]:
        jobs = [ScriptJob(code=r.code, inputs=r.public, limits=self._limits) for r in runs]
        patience = _QUEUE_S + len(jobs) * self._limits.wall
        results = []
        for future in [self._pool.submit(job) for job in jobs]:
            try:
                results.append(future.result(timeout=patience))
            except FutureTimeoutError:
                note = "the sandbox did not answer"
                results.append(ScriptResult("infra", None, "", note, {}, 0.0, 0.0))
        return results


class ContainerExecutor:
    """Each script in a new container: /home/data to read, /home/submission/submission.csv to write.

    environment    variables beside those of the container contract
    """

    def __init__(
        self,
        limits: Limits,
        environment: dict[str, str],
        python: Path | None = None,
        *,
        gpu: bool = False,
        require_full_isolation: bool = False,
    ) -> None:
        self._limits = limits
        self._environment = environment
        self._python = python
        self._gpu = gpu
        self._full = require_full_isolation

    def run(self, runs: Sequence[Run]) -> list[ScriptResult]:
        return [self._one(run) for run in runs]

    def _one(self, run: Run) -> ScriptResult:
        container = Container(
            run.public,
            self._limits,
            files={"code/solution.py": run.code},
            environment=self._environment,
            gpu=self._gpu,
            python=self._python,
            require_full_isolation=self._full,
        )
        with container as opened:
            try:
                done = opened.run("cd /home/code && python3 solution.py")
                files = collect(opened, keep=("submission",)) if done.status == "ok" else {}
            except InfraError as error:  # it opened, so this is the script's doing
                return ScriptResult("killed", None, "", str(error), {}, 0.0, 0.0)
        submission = files.get(f"submission/{SUBMISSION}")
        status, stderr = done.status, done.stderr
        if status == "ok" and submission is None:
            status, stderr = "error", f"{stderr}\nno /home/submission/{SUBMISSION}\n"
        return ScriptResult(
            status,
            done.exit_code,
            done.stdout,
            stderr,
            {SUBMISSION: submission} if submission is not None else {},
            done.cpu_s,
            done.wall_s,
        )

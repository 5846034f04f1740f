"""The Job protocol: what is run, how it stands, and what every launcher can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

State = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class JobSpec:
    """What to run.

    argv: program and arguments; cwd: working directory; env: variables added to (and replacing)
    the caller's; run_dir: made if missing, receives stdout.log, stderr.log and job.json;
    wall_limit_s: seconds after which the whole tree is killed, an attempt.
    """

    argv: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str]
    run_dir: Path
    wall_limit_s: float


@dataclass(frozen=True)
class Job:
    """A submitted job. `id` is derived from its key."""

    id: str
    run_dir: Path


@dataclass(frozen=True)
class JobStatus:
    """State of a job.

    state: queued until its process runs; reason, for failed and cancelled: "exit" (non-zero
    `exit_code`), "signal" (`signal` names it), "oom" (killed by the kernel for memory),
    "wall_limit", "start_failed" (the program could not run), "lost" (supervisor gone: killed, or
    the machine rebooted), "cancelled". attempt counts starts from 1; times are unix seconds.
    """

    state: State
    pid: int | None = None
    exit_code: int | None = None
    signal: str | None = None
    reason: str | None = None
    detail: str = ""
    attempt: int = 0
    started: float | None = None
    heartbeat: float | None = None
    ended: float | None = None

    @property
    def finished(self) -> bool:
        """Done, failed or cancelled."""
        return self.state in ("done", "failed", "cancelled")


class Launcher(Protocol):
    """Runs jobs that outlive the caller. The same key twice is one job.

    With `restart`, one that failed or was cancelled is started again in its run directory.
    """

    def submit(self, spec: JobSpec, key: str, *, restart: bool = False) -> Job: ...

    def status(self, job: Job) -> JobStatus: ...

    def logs(
        self, job: Job, lines: int = 50, stream: Literal["stdout", "stderr"] = "stdout"
    ) -> list[str]: ...

    def cancel(self, job: Job) -> JobStatus: ...

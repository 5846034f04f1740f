"""Jobs as local process trees, each under a small supervisor process of its own.

``submit`` starts ``supervisor.py`` in a new session. The supervisor holds an exclusive lock on
``<run_dir>/job.lock`` as long as it lives; that lock, and no pid, says whether a job is alive, so
neither a reused pid nor a rebooted machine can be mistaken for it. The lock is taken *before* the
supervisor starts and inherited by it: there is no moment in which a second ``submit`` could find
it free. ``<run_dir>/job.json`` is the supervisor's record, replaced atomically.

The same key is one job: ``<jobs_dir>/.keys/<hash>.json`` maps a key to its run directory, under a
file lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from agent_tools.errors import InfraError, UserError
from agent_tools.launcher.protocol import Job, JobSpec, JobStatus
from agent_tools.launcher.supervisor import JOB_MARK, kill_marked, write_json

START_TIMEOUT_S = 60.0
FULL = (errno.ENOSPC, errno.EDQUOT)
LOG_BYTES = 256 * 1024


@dataclass
class LocalLauncher:
    """Launcher of local jobs; any number of processes may use the same `jobs_dir`.

    grace_s: seconds between SIGTERM and SIGKILL when a job is cancelled or over its wall limit.
    """

    jobs_dir: Path
    grace_s: float = 10.0
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    def submit(self, spec: JobSpec, key: str, *, restart: bool = False) -> Job:
        """Start `spec`, or return the job that `key` already has.

        A job that was lost (its supervisor was killed) is started again in the same run directory,
        as the next attempt; with `restart` so is one that failed or was cancelled. Leftover
        processes of the earlier attempt are killed first. Raises `UserError` if the key or the
        run directory belongs to another command, `InfraError` if no supervisor can be started.
        """
        _check(spec)
        job_id = hashlib.sha256(key.encode()).hexdigest()[:16]
        run_dir = Path(spec.run_dir).absolute()
        keys = self.jobs_dir / ".keys"
        try:
            keys.mkdir(parents=True, exist_ok=True)
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            kind = InfraError if error.errno in FULL else UserError
            raise kind(f"cannot make {error.filename}: {error.strerror}") from error
        record_path = keys / f"{job_id}.json"
        identity = {"key": key, "argv": list(spec.argv), "run_dir": str(run_dir)}
        with _locked(keys / f"{job_id}.lock"):
            record = _read(record_path)
            if record and record != identity:
                raise UserError(
                    f"job key {key!r} belongs to another command ({record_path}): "
                    "use a new key for a new command"
                )
            owner = _read(run_dir / "job.json").get("id", job_id)
            if owner != job_id:
                raise UserError(f"{run_dir} belongs to job {owner}: use another run directory")
            write_json(record_path, identity, sync=True)
            job = Job(job_id, run_dir)
            with _job_lock(run_dir) as lock:
                if lock is None:
                    return job  # alive
                status = self._dead_status(job)
                again = status.reason == "lost" or (restart and status.state != "done")
                if status.finished and not again:
                    return job
                kill_marked(job_id, str(run_dir))
                self._start(spec, job, status.attempt + 1, lock)
        return job

    def status(self, job: Job) -> JobStatus:
        """State of a job now; reads two files and starts nothing."""
        self._reap()
        with _job_lock(job.run_dir, shared=True) as lock:
            alive = lock is None
        if alive:
            return _from_record(_read(job.run_dir / "job.json"))
        return self._dead_status(job)

    def wait(self, job: Job, timeout_s: float, poll_s: float = 0.25) -> JobStatus:
        """Status once the job has finished, or after `timeout_s` (then ``finished`` is False)."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status(job)
            left = deadline - time.monotonic()
            if status.finished or left <= 0:
                return status
            time.sleep(min(poll_s, left))

    def logs(
        self, job: Job, lines: int = 50, stream: Literal["stdout", "stderr"] = "stdout"
    ) -> list[str]:
        """The last lines (of the last 256 KiB) that the job has written so far."""
        try:
            with (job.run_dir / f"{stream}.log").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - LOG_BYTES))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return []
        return text.splitlines()[-lines:] if lines > 0 else []

    def cancel(self, job: Job) -> JobStatus:
        """End a job: SIGTERM to its process group, SIGKILL to its tree after the grace time.

        Returns once it has ended. Cancelling a finished job changes nothing.
        """
        deadline = time.monotonic() + self.grace_s + 20.0
        while True:
            status = self.status(job)
            if status.finished:
                if status.reason == "lost":
                    kill_marked(job.id, str(job.run_dir))
                return status
            if time.monotonic() > deadline:
                raise InfraError(
                    f"job {job.id} did not end ({job.run_dir}): look at its supervisor.log"
                )
            # Sent again while it lives: the first one may come before the supervisor listens.
            _signal_supervisor(job.run_dir)
            time.sleep(0.1)

    # -- inside ----------------------------------------------------------------------------------

    def _start(self, spec: JobSpec, job: Job, attempt: int, lock: int) -> None:
        now = time.time()
        record = {
            "id": job.id, "state": "queued", "attempt": attempt, "submitted": now,
            "argv": list(spec.argv), "cwd": str(spec.cwd), "wall_limit_s": spec.wall_limit_s,
            "grace_s": self.grace_s,
        }  # fmt: skip
        write_json(job.run_dir / "job.json", record, sync=True)
        env = {**os.environ, **spec.env, JOB_MARK: f"{job.id}:{job.run_dir}"}
        root = str(Path(__file__).resolve().parents[2])
        try:
            with (job.run_dir / "supervisor.log").open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "agent_tools.launcher.supervisor"],
                    cwd=root,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
        except OSError as error:
            raise InfraError(f"cannot start a supervisor for {job.run_dir}: {error}") from error
        self._children.append(child)
        # Secrets in the environment travel through a pipe: never on disk, never in argv.
        message = json.dumps({"record": record, "run_dir": str(job.run_dir), "env": env})
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(message.encode())
        deadline = time.monotonic() + START_TIMEOUT_S
        while _read(job.run_dir / "job.json").get("state") == "queued":
            if child.poll() is not None:
                raise InfraError(
                    f"the supervisor of {job.run_dir} ended at once: see supervisor.log there"
                )
            if time.monotonic() > deadline:
                return  # a slow machine: the supervisor has its orders and will go on
            time.sleep(0.01)

    def _dead_status(self, job: Job) -> JobStatus:
        """Status of a job whose supervisor does not live."""
        record = _read(job.run_dir / "job.json")
        status = _from_record(record)
        if not record or status.finished:
            return status
        rebooted = record.get("boot_id") not in (None, boot_id())
        return JobStatus(
            "failed",
            pid=status.pid,
            reason="lost",
            detail="the machine was rebooted" if rebooted else "its supervisor was killed",
            attempt=status.attempt,
            started=status.started,
            heartbeat=status.heartbeat,
            ended=status.heartbeat,
        )

    def _reap(self) -> None:
        # Supervisors that ended are our children: poll so that they do not stay as zombies.
        self._children = [child for child in self._children if child.poll() is None]


def boot_id() -> str:
    """Identifier of this boot of the machine; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _check(spec: JobSpec) -> None:
    if not spec.argv:
        raise UserError("the job has no command: give argv")
    if not Path(spec.cwd).is_dir():
        raise UserError(f"the job's working directory {spec.cwd} does not exist: make it first")
    if not spec.wall_limit_s > 0:
        raise UserError(f"wall_limit_s is {spec.wall_limit_s}: give a number of seconds above 0")


def _from_record(record: dict[str, object]) -> JobStatus:
    names = JobStatus.__dataclass_fields__
    known = {name: value for name, value in record.items() if name in names}
    return JobStatus(**{"state": "queued", **known})  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclusive lock among submitters of one key; held for the start of one supervisor only."""
    deadline = time.monotonic() + 2 * START_TIMEOUT_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InfraError(
                        f"another process holds {path} for too long: end it and try again"
                    ) from None
                time.sleep(0.02)
        yield  # closing the file releases the lock


@contextlib.contextmanager
def _job_lock(run_dir: Path, *, shared: bool = False) -> Iterator[int | None]:
    """The job's lock as a file descriptor, or None while a supervisor holds it.

    An exclusive taker waits a moment for readers, who hold a shared lock for microseconds.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    try:
        handle = os.open(run_dir / "job.lock", flags | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        yield -1  # never started: nobody can hold it
        return
    try:
        for pause in (0.0,) if shared else (0.0, 0.01, 0.05, 0.1):
            time.sleep(pause)
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield handle
            return
        yield None
    finally:
        os.close(handle)


def _signal_supervisor(run_dir: Path) -> None:
    """SIGTERM to the supervisor, if the pid of the record is still the same process."""
    record = _read(run_dir / "job.json")
    pid, created = record.get("supervisor_pid"), record.get("supervisor_created")
    if not isinstance(pid, int) or not isinstance(created, float):
        return
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < 1.0:
            process.send_signal(signal.SIGTERM)

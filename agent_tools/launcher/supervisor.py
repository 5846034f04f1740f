"""The process that stands between the launcher and a job: ``python -m …supervisor``.

It reads its orders as JSON from standard input, starts the job in a session of its own, kills the
whole tree at the wall limit or on SIGTERM, and writes how the job ended to ``job.json``. It is the
subreaper of the tree: descendants that detach (setsid, double fork) become its children and are
found and killed. If it is killed itself, the kernel kills the job (PR_SET_PDEATHSIG); deeper
descendants carry a mark in their environment by which the next attempt finds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

JOB_MARK = "SELFEVO_JOB"
HEARTBEAT_S = 2.0
POLL_S = 0.2
LEFTOVER_GRACE_S = 2.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Ending:
    """How a job ended, as it stands in ``job.json``."""

    state: str
    exit_code: int | None
    signal: str | None
    reason: str | None
    detail: str = ""


def explain(code: int, stopped: str | None, oom_kills: int) -> Ending:
    """Tell apart how a job's main process ended.

    code: exit status, or minus the signal's number; stopped: why we ended it ("cancelled" or
    "wall_limit"), if we did; oom_kills: how many processes the kernel killed for memory meanwhile.
    """
    name = _signal_name(-code) if code < 0 else None
    exit_code = code if code >= 0 else None
    if stopped == "cancelled":
        return Ending("cancelled", exit_code, name, "cancelled")
    if stopped is not None:
        return Ending("failed", exit_code, name, stopped)
    if code == 0:
        return Ending("done", 0, None, None)
    if code == -signal.SIGKILL and oom_kills > 0:
        return Ending("failed", None, name, "oom", "the kernel killed it for memory")
    return Ending("failed", exit_code, name, "signal" if name else "exit")


def count_oom_kills() -> int:
    """Processes killed for memory so far: in our control group, else on the whole machine."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text("ascii").splitlines():
            number, controllers, group = line.split(":", 2)
            if number == "0":
                files = [f"/sys/fs/cgroup{group}/memory.events"]
            elif "memory" in controllers.split(","):
                files = [f"/sys/fs/cgroup/memory{group}/memory.oom_control"]
            else:
                continue
            for file in files:
                with contextlib.suppress(OSError):
                    found = re.search(r"^oom_kill (\d+)", Path(file).read_text("ascii"), re.M)
                    if found:
                        return int(found.group(1))
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text("ascii"), re.M)
        if found:
            return int(found.group(1))
    return 0


def write_json(path: Path, value: Mapping[str, object], *, sync: bool) -> None:
    """Replace a JSON file in one step; with `sync` it survives a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def kill_marked(job_id: str, run_dir: str) -> int:
    """SIGKILL every process that carries a job's mark in its environment; returns how many.

    Used when no supervisor lives that could know the tree.
    """
    mark = f"{job_id}:{run_dir}"
    killed = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.pid != os.getpid() and process.environ().get(JOB_MARK) == mark:
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=5.0)
    return len(killed)


class Supervisor:
    """Runs one attempt of one job to its end."""

    def __init__(self, record: dict[str, object], run_dir: Path, env: dict[str, str]) -> None:
        self.record = record
        self.run_dir = run_dir
        self.env = env
        self.cancelled = False

    def run(self) -> None:
        """Start the job, watch it, end its tree, and record how it ended."""
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "this kernel has no child subreaper")
        oom_before = count_oom_kills()
        started = time.time()
        try:
            pid = self._spawn()
        except OSError as error:
            detail = f"cannot run {self._argv()[0]}: {error.strerror or error}"
            self._finish(Ending("failed", None, None, "start_failed", detail), started)
            return
        me = psutil.Process()
        self.record.update(
            state="running", pid=pid, host=socket.gethostname(), boot_id=_boot_id(),
            created=psutil.Process(pid).create_time(), supervisor_pid=me.pid,
            supervisor_created=me.create_time(), started=started, heartbeat=started,
        )  # fmt: skip
        self._write(sync=True)
        code, stopped = self._watch(pid)
        self._end_leftovers()
        self._finish(explain(code, stopped, count_oom_kills() - oom_before), started)

    def _argv(self) -> list[str]:
        argv = self.record["argv"]
        assert isinstance(argv, list)
        return [str(word) for word in argv]

    def _seconds(self, name: str) -> float:
        value = self.record[name]
        assert isinstance(value, int | float)
        return float(value)

    def _spawn(self) -> int:
        parent = os.getpid()

        def die_with_parent() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)
            for signum in (signal.SIGINT, signal.SIGHUP):  # ignored here, not in the job
                signal.signal(signum, signal.SIG_DFL)

        with (
            (self.run_dir / "stdout.log").open("ab") as out,
            (self.run_dir / "stderr.log").open("ab") as err,
        ):
            job = subprocess.Popen(
                self._argv(),
                cwd=str(self.record["cwd"]),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # process group = job
                preexec_fn=die_with_parent,  # safe: this process has one thread
            )
        job.returncode = 0  # reaped by us, together with orphans
        return job.pid

    def _watch(self, pid: int) -> tuple[int, str | None]:
        """Until the main process has ended; returns its exit status and why we ended it, if so."""
        start = beat = time.monotonic()
        limit, grace = self._seconds("wall_limit_s"), self._seconds("grace_s")
        stopped: str | None = None
        kill_at = float("inf")
        handle = os.pidfd_open(pid)
        try:
            while (code := _reap(pid)) is None:
                now = time.monotonic()
                if stopped is None and (self.cancelled or now - start >= limit):
                    stopped = "cancelled" if self.cancelled else "wall_limit"
                    _kill_group(pid, signal.SIGTERM)
                    kill_at = now + grace
                if now >= kill_at:
                    _kill_group(pid, signal.SIGKILL)
                if now - beat >= HEARTBEAT_S:
                    beat = now
                    self.record["heartbeat"] = time.time()
                    self._write(sync=False)
                next_stop = kill_at if stopped else start + limit
                select.select([handle], [], [], max(0.0, min(POLL_S, next_stop - now)))
        finally:
            os.close(handle)
        return code, stopped

    def _end_leftovers(self) -> None:
        """End what the job left behind: descendants in any session, orphans included."""
        deadline = time.monotonic() + LEFTOVER_GRACE_S
        told: set[int] = set()
        while True:
            _reap(0)
            left = psutil.Process().children(recursive=True)
            if not left:
                return
            hard = time.monotonic() >= deadline
            for process in left:
                if hard or process.pid not in told:
                    told.add(process.pid)
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        process.send_signal(signal.SIGKILL if hard else signal.SIGTERM)
            if time.monotonic() >= deadline + 30.0:
                return  # in uninterruptible sleep: nothing more can be done
            time.sleep(0.02)

    def _finish(self, ending: Ending, started: float) -> None:
        now = time.time()
        self.record.update(
            state=ending.state, exit_code=ending.exit_code, signal=ending.signal,
            reason=ending.reason, detail=ending.detail, started=started, heartbeat=now, ended=now,
        )  # fmt: skip
        self._write(sync=True)

    def _write(self, *, sync: bool) -> None:
        write_json(self.run_dir / "job.json", self.record, sync=sync)

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        self.cancelled = True


def _reap(pid: int) -> int | None:
    """Collect ended children; the exit status of `pid` if it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            done, status = os.waitpid(-1, os.WNOHANG)
            if done == 0:
                break
            if done == pid:
                code = os.waitstatus_to_exitcode(status)
    return code


def _kill_group(pid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"  # a real-time signal


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def main() -> int:
    """Read the orders and run them; a launcher that died while giving them gave none."""
    try:
        orders = json.loads(sys.stdin.buffer.read())
    except ValueError:
        print("no complete orders on standard input", file=sys.stderr)
        return 2
    Supervisor(orders["record"], Path(orders["run_dir"]), orders["env"]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

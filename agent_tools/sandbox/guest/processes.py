"""What the worker does to processes: watch, count, kill and reap them."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class WorkerFault(Exception):
    """The worker can no longer promise a clean next script; its owner replaces it."""


class NotBegunError(WorkerFault):
    """A script could not be started: what failed is the sandbox and not the script."""


@dataclass(frozen=True)
class Usage:
    """CPU-seconds, resident bytes and number of processes and threads of the living tree."""

    cpu_s: float
    resident: int
    tasks: int


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _children_of(pid: int) -> list[int]:
    """Direct children, from the kernel's own list."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.scandir(f"/proc/{pid}/task"):
            found += map(int, Path(task.path, "children").read_text().split())
    return found


def _children_by_scan(root: int) -> list[int]:
    parent: dict[int, int] = {}
    for pid in _all_pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            stat_line = Path(f"/proc/{pid}/stat").read_text()
            parent[pid] = int(stat_line.rpartition(")")[2].split()[1])
    inside = {root}
    grown = True
    while grown:
        more = {pid for pid, up in parent.items() if up in inside} - inside
        inside |= more
        grown = bool(more)
    return sorted(inside - {root})


def descendants() -> list[int]:
    """Every process below this one. As process 1 of a namespace, that is every other process."""
    me = os.getpid()
    if me == 1:
        return [pid for pid in _all_pids() if pid != 1]
    if not Path(f"/proc/self/task/{me}/children").exists():
        return _children_by_scan(me)
    found: list[int] = []
    waiting = _children_of(me)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += _children_of(pid)
    return found


def usage(shared_pages: int, skip: int = 0) -> Usage:
    """What lives below this process, without the process `skip`.

    `shared_pages` are taken off each one's resident pages: a fork shares them with its template.
    """
    cpu_ticks, resident, tasks = 0, 0, 0
    for pid in descendants():
        if pid == skip:
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu_ticks += sum(map(int, fields[11:15]))  # utime stime cutime cstime
            tasks += int(fields[17])
            resident += max(0, int(fields[21]) - shared_pages)
    return Usage(cpu_ticks / TICK, resident * _PAGE, tasks)


def oom_kills() -> int:
    """Processes of this container that the kernel killed for memory; 0 where it does not tell."""
    for name in ("memory/memory.oom_control", "memory.events"):
        with contextlib.suppress(OSError):
            for line in Path("/sys/fs/cgroup", name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def kill_all(script_uid: int | None, keep: tuple[int, ...] = ()) -> None:
    """Kill and reap everything below this process except `keep`, also what left its session."""
    give_up = time.monotonic() + 3
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        living = [pid for pid in descendants() if pid not in keep]
        if not living:
            return
        if time.monotonic() > give_up:
            raise WorkerFault(f"processes {living[:5]} outlive SIGKILL")
        if os.getpid() == 1 and not keep:
            # One call for the whole namespace: no fork can slip between two of them.
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            if script_uid is not None and os.geteuid() == 0:
                _kill_user(script_uid)
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)


def _kill_user(uid: int) -> None:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        os._exit(0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # older kernels: the loop polls instead
        return None


def reap_until(pid: int) -> int | None:
    """Reap whatever has ended; the wait status of `pid` if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            ended, code = os.waitpid(-1, os.WNOHANG)
            if ended == 0:
                break
            if ended == pid:
                status = code
    return status


def cpu_since(before: resource.struct_rusage) -> float:
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime


def own_pages() -> tuple[int, int]:
    """Bytes of address space and resident pages of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[0]) * _PAGE, int(fields[1])

"""What the worker does to processes: watch, count, kill and reap them, and set their filters."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 36, 38, 2
_LIBC = ctypes.CDLL(None, use_errno=True)
TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class WorkerFault(Exception):
    """The worker can no longer promise a clean next script; its owner replaces it."""


def _prctl(option: int, value: int, pointer: Any = 0) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(value), pointer, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")


def install_filter(program: bytes) -> None:
    """Install a seccomp filter (array of struct sock_filter) on this process, for good."""
    buffer = ctypes.create_string_buffer(program, len(program))

    class _Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    header = _Program(len(program) // 8, ctypes.addressof(buffer))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(header))


def set_dumpable(on: bool) -> None:
    """Whether processes of the same user may open our memory and descriptors in /proc."""
    _prctl(_PR_SET_DUMPABLE, int(on))


def die_with_parent() -> None:
    """Get SIGKILL when the parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, as process 1 does by itself."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


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


def usage(shared_pages: int) -> Usage:
    cpu_ticks, resident, tasks = 0, 0, 0
    for pid in descendants():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu_ticks += sum(map(int, fields[11:15]))  # utime stime cutime cstime
            tasks += int(fields[17])
            resident += max(0, int(fields[21]) - shared_pages)
    return Usage(cpu_ticks / TICK, resident * _PAGE, tasks)


def kill_all(script_uid: int | None) -> None:
    """Kill and reap everything a script started, also what left its session."""
    give_up = time.monotonic() + 3
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        living = descendants()
        if not living:
            return
        if time.monotonic() > give_up:
            raise WorkerFault(f"processes {living[:5]} outlive SIGKILL")
        if os.getpid() == 1:
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

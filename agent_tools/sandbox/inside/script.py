"""The script's own process, from fork to exit: limits, user, filter, then the code."""

from __future__ import annotations

import atexit
import base64
import contextlib
import linecache
import os
import random
import resource
import signal
import sys
import threading
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

from agent_tools.sandbox.inside import processes

# Exit code by which a script's process says "MemoryError"; the owner sees 1.
OUT_OF_MEMORY = 113
# Descriptors of import folders (see `preload.open_unreachable_path`) live here.
PATH_FDS = range(700, 732)
_MOST_FDS = 1024


@dataclass(frozen=True)
class Settings:
    """How this worker was started; the owner fills it."""

    fd: int
    root: str
    scratch: list[str]
    uid: int | None
    user_processes: bool
    limited: bool
    filter: str | None


def _set_limits(limits: dict[str, float], settings: Settings, base_memory: int) -> None:
    def put(kind: int, soft: int, hard: int) -> None:
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))

    cpu = int(limits["cpu_seconds"]) + 1
    put(resource.RLIMIT_CPU, cpu, cpu + 1)
    put(resource.RLIMIT_CORE, 0, 0)
    put(resource.RLIMIT_FSIZE, *[int(limits["file_mb"]) << 20] * 2)
    put(resource.RLIMIT_NOFILE, 256, 256)
    memory = base_memory + (int(limits["memory_mb"]) << 20)
    put(resource.RLIMIT_AS, memory, memory)
    if settings.user_processes:
        tasks = int(limits["processes"]) + 1  # the worker is one of them
        put(resource.RLIMIT_NPROC, tasks, tasks)
    # The hard end of the CPU limit, to the millisecond; the parent also counts the children.
    signal.setitimer(signal.ITIMER_PROF, limits["cpu_seconds"])


def become_script(folder: str, temp: str, limits: dict[str, float], settings: Settings,
                   out: int, err: int, base_memory: int) -> None:  # fmt: skip
    os.setsid()
    os.dup2(err, 2)
    os.dup2(out, 1)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, PATH_FDS.start)
    os.closerange(PATH_FDS.stop, _MOST_FDS)
    os.chdir(folder)
    os.umask(0o077)
    os.environ["HOME"] = folder
    os.environ["TMPDIR"] = temp
    if settings.limited:
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        if settings.uid is not None:
            os.setgroups([])
            os.setresgid(settings.uid, settings.uid, settings.uid)
            os.setresuid(settings.uid, settings.uid, settings.uid)
        _set_limits(limits, settings, base_memory)
    processes.set_dumpable(True)
    processes.die_with_parent()
    if settings.filter is not None:
        processes.install_filter(base64.b64decode(settings.filter))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run_code(code: str, path: str) -> int:
    """Run the text as `__main__`; print its traceback without our frames; return an exit code."""
    sys.argv = [path]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    linecache.cache[path] = (len(code), None, code.splitlines(keepends=True), path)
    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = path
    sys.modules["__main__"] = module
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    exit_code = 0
    try:
        exec(compile(code, path, "exec"), module.__dict__)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            exit_code = (stop.code or 0) & 0xFF
        else:
            print(stop.code, file=sys.stderr)
            exit_code = 1
    except BaseException as error:  # noqa: BLE001 - a script may raise anything
        exit_code = OUT_OF_MEMORY if isinstance(error, MemoryError) else 1
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
        traceback.print_exception(type(error), error, frames)
    return exit_code


def finish_script() -> None:
    """What the interpreter does at exit: join threads, run exit functions, flush."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

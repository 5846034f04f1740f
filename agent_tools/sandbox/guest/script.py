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
from typing import Any

from agent_tools.sandbox.guest import kernel, landlock

# Exit code by which a script's process says "MemoryError"; the owner sees 1.
OUT_OF_MEMORY = 113
# Descriptors of import folders (see `preload.open_unreachable_path`) live here.
PATH_FDS = range(700, 732)
_MOST_FDS = 1024


@dataclass(frozen=True)
class Settings:
    """How this worker was started; the owner fills it.

    line            descriptor of the socket to the owner, or None: standard input and output
    root            the folder of scripts, or the work folder of a shell
    scratch         other writable folders; the first becomes TMPDIR
    uid             user that scripts become, as root outside namespaces
    user_processes  whether the kernel counts this user's processes for the sandbox alone
    limited         whether there are limits at all
    filter          the scripts' seccomp filter in base 64, or None
    rooms           whether every script gets namespaces of its own
    once            whether this worker serves one script: it loads only what that imports
    readable        folders for Landlock to leave readable, or None for no Landlock
    purpose         "scripts", "shell", or "probe": no packages, it only says what is missing
    """

    line: int | None
    root: str
    scratch: tuple[str, ...]
    uid: int | None = None
    user_processes: bool = False
    limited: bool = True
    filter: str | None = None
    rooms: bool = False
    once: bool = False
    readable: tuple[str, ...] | None = None
    purpose: str = "scripts"


@dataclass(frozen=True)
class Streams:
    """Ends of pipes that a script's process gets: where it prints, and where it says that it has
    begun, that is, that everything which keeps it in is in place."""

    out: int
    err: int
    begun: int

    def close(self) -> None:
        """Close the worker's copies."""
        for fd in (self.out, self.err, self.begun):
            os.close(fd)


def set_limits(limits: dict[str, Any], settings: Settings, base_memory: int) -> None:
    """The limits that hold for each process by itself, CPU aside."""

    def put(kind: int, value: int) -> None:
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            value = min(value, ceiling)
        resource.setrlimit(kind, (value, value))

    put(resource.RLIMIT_CORE, 0)
    put(resource.RLIMIT_FSIZE, int(limits["file_mb"]) << 20)
    put(resource.RLIMIT_NOFILE, int(limits["open_files"]))
    put(resource.RLIMIT_MSGQUEUE, 0)
    put(resource.RLIMIT_AS, base_memory + (int(limits["memory_mb"]) << 20))
    if settings.user_processes:
        # In a room the script's user namespace holds nothing else; elsewhere the worker counts too.
        put(resource.RLIMIT_NPROC, int(limits["processes"]) + (0 if settings.rooms else 1))


def _limit_cpu(seconds: float) -> None:
    whole = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole + 1))
    # The hard end of the CPU limit, to the millisecond; the worker also counts the children.
    signal.setitimer(signal.ITIMER_PROF, seconds)


def become_script(folder: str, temp: str, limits: dict[str, Any], settings: Settings,
                   streams: Streams, base_memory: int, ruleset: int | None) -> None:  # fmt: skip
    """Turn a fork of the worker into a script's process; says so on `streams.begun`."""
    os.setsid()
    kept = [streams.begun, *([ruleset] if ruleset is not None else [])]
    connect(streams.out, streams.err, *kept)
    os.chdir(folder)
    os.umask(0o077)
    os.environ["HOME"] = folder
    os.environ["TMPDIR"] = temp
    if settings.limited:
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        if ruleset is not None:
            kernel.no_new_privileges()
            landlock.restrict(ruleset)
            os.close(ruleset)
        if settings.uid is not None:
            os.setgroups([])
            os.setresgid(settings.uid, settings.uid, settings.uid)
            os.setresuid(settings.uid, settings.uid, settings.uid)
        set_limits(limits, settings, base_memory)
        _limit_cpu(limits["cpu_seconds"])
    kernel.set_dumpable(True)
    if not settings.rooms:  # in a room the keeper's end is everybody's
        kernel.die_with_parent()
    confine(settings)
    os.write(streams.begun, b"1")
    os.close(streams.begun)


def connect(out: int, err: int, *kept: int) -> None:
    """Standard streams from the arguments; every other descriptor but `kept` is closed."""
    os.dup2(err, 2)
    os.dup2(out, 1)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    start = 3
    for fd in sorted(kept):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, PATH_FDS.start)
    os.closerange(PATH_FDS.stop, _MOST_FDS)


def confine(settings: Settings) -> None:
    """Last steps: the filter, and signals as a program expects them."""
    if settings.filter is not None:
        kernel.install_filter(base64.b64decode(settings.filter))
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

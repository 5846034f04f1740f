"""Run one script: fork, watch, end, judge, open its outputs."""

from __future__ import annotations

import errno
import os
import resource
import select
import shutil
import signal
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent_tools.sandbox.guest import processes
from agent_tools.sandbox.guest.capture import Capture
from agent_tools.sandbox.guest.layout import lay_out
from agent_tools.sandbox.guest.processes import NotBegunError, WorkerFault
from agent_tools.sandbox.guest.rooms import Room, Rooms
from agent_tools.sandbox.guest.script import (
    OUT_OF_MEMORY,
    Settings,
    Streams,
    become_script,
    finish_script,
    run_code,
)

POLL_S = 0.02


class Place(Protocol):
    """Where a script runs: its folder by name, and by descriptor for this worker."""

    @property
    def folder(self) -> str: ...

    @property
    def folder_fd(self) -> int: ...


class Housing(Protocol):
    """Gives a script its place and takes it back."""

    porter: int  # a helper process of the housing, which is nobody's script; 0 for none

    def open(self, request: dict[str, Any], memory: int, groups: list[int]) -> Any: ...

    def fork(self, place: Any) -> int: ...

    def enter(self, place: Any) -> None:
        """In the fork, before anything else."""

    def end(self, place: Any, script: int, *, reaped: bool) -> float:
        """Kill everything of the script; CPU-seconds that this process's children do not show."""

    def close(self, place: Any) -> None: ...


@dataclass(frozen=True)
class _Folder:
    folder: str
    folder_fd: int


class SharedHousing:
    """Folders below one root, in the worker's own namespaces; cleaned after every script."""

    porter = 0

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._count = 0
        self._places = (settings.root, *settings.scratch)
        self._modes = {place: Path(place).stat().st_mode for place in self._places}

    def open(self, request: dict[str, Any], memory: int, groups: list[int]) -> _Folder:
        assert not groups, "control groups are for rooms"
        self._count += 1
        settings = self._settings
        folder = settings.root if settings.once else f"{settings.root}/{self._count}"
        try:
            made = lay_out(folder, request, memory) if settings.once else []
            if not settings.once:
                Path(folder).mkdir(0o700)
                made = [folder, *lay_out(folder, request, memory)]
            if settings.uid is not None:
                for path in made:
                    os.chown(path, settings.uid, settings.uid)
            return _Folder(folder, os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            raise NotBegunError(f"cannot lay out a script's folder: {error}") from error

    def fork(self, place: _Folder) -> int:
        return os.fork()

    def enter(self, place: _Folder) -> None:
        pass

    def end(self, place: _Folder, script: int, *, reaped: bool) -> float:
        processes.kill_all(self._settings.uid)
        return 0.0

    def close(self, place: _Folder) -> None:
        """Remove all that the script left; if that fails, the worker must not be used again."""
        os.close(place.folder_fd)
        if self._settings.once:
            return
        try:
            for path in self._places:
                for entry in os.scandir(path):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        Path(entry.path).unlink()
                # A script may own these folders: its marks on them would outlive it.
                mode = stat.S_IMODE(self._modes[path])
                if stat.S_IMODE(Path(path).stat().st_mode) != mode:
                    Path(path).chmod(mode)
                os.utime(path)
        except (OSError, RecursionError) as error:
            raise WorkerFault(f"cannot clean up after a script: {error}") from error


class Runner:
    """Runs scripts one after the other in the places of a housing."""

    def __init__(
        self, settings: Settings, housing: Rooms | SharedHousing, hangup_fd: int,
        ruleset: int | None,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._housing: Housing = housing
        self._hangup_fd = hangup_fd
        self._ruleset = ruleset
        self._base_memory = self._shared_pages = 0
        self._seen_cpu_s = 0.0

    def run(self, place: Room | _Folder, code: str, limits: dict[str, Any]) -> dict[str, Any]:
        """Run a script in its place to its end, and everything it started; what came of it.

        Raises NotBegunError where nothing of it ran.
        """
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        begun_read, begun_write = os.pipe()
        streams = Streams(out_write, err_write, begun_write)
        self._base_memory, self._shared_pages = processes.own_pages()
        self._seen_cpu_s = 0.0
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ooms = processes.oom_kills()
        start = time.monotonic()
        try:
            pid = self._housing.fork(place)
        except OSError as error:
            raise NotBegunError(f"no process for a script: {error}") from error
        if pid == 0:
            self._become(place, code, limits, streams)
        streams.close()
        captures = {fd: Capture(int(limits["output_bytes"])) for fd in (out_read, err_read)}
        try:
            verdict, status = self._watch(pid, start, before, limits, captures)
            elsewhere_s = self._housing.end(place, pid, reaped=status is not None)
            for fd, capture in captures.items():
                capture.drain(fd)
            begun = os.read(begun_read, 1) != b""
        finally:
            for fd in (out_read, err_read, begun_read):
                os.close(fd)
        wall_s = time.monotonic() - start
        # What dies with its room is counted by nobody: the last look knows it.
        cpu_s = max(processes.cpu_since(before) + elsewhere_s, self._seen_cpu_s)
        outcome, exit_code = judge(verdict, status, cpu_s, limits["cpu_seconds"])
        if outcome != "ok" and verdict is None and processes.oom_kills() > ooms:
            outcome = "memory"
        if not begun:
            raise NotBegunError(captures[err_read].text().strip() or "a script did not begin")
        return {
            "status": outcome,
            "exit_code": exit_code,
            "stdout": captures[out_read].text(),
            "stderr": captures[err_read].text(),
            "cpu_s": cpu_s,
            "wall_s": wall_s,
        }

    def _become(
        self, place: Room | _Folder, code: str, limits: dict[str, Any], streams: Streams
    ) -> None:
        """In the fork: never returns."""
        settings = self._settings
        exit_code = 1
        try:
            try:
                self._housing.enter(place)
                become_script(
                    place.folder, settings.scratch[0], limits, settings, streams,
                    self._base_memory, self._ruleset,
                )  # fmt: skip
            except (OSError, ValueError, ArithmeticError) as error:
                print(f"the sandbox cannot start a script: {error}", file=sys.stderr, flush=True)
                os._exit(1)  # without having said that it began
            exit_code = run_code(code, f"{place.folder}/script.py")
            finish_script()
        finally:
            os._exit(exit_code)

    def _watch(
        self, pid: int, start: float, before: resource.struct_rusage, limits: dict[str, Any],
        captures: dict[int, Capture],
    ) -> tuple[str | None, int | None]:  # fmt: skip
        """Follow the script until it ends or breaks a limit; returns (limit broken, wait status).

        The owner's end of the line is watched too: nobody left to answer means stop at once.
        """
        poller = select.poll()
        for fd in captures:
            os.set_blocking(fd, False)
            poller.register(fd, select.POLLIN)
        poller.register(self._hangup_fd, select.POLLHUP | select.POLLRDHUP)
        exit_fd = processes.open_pidfd(pid)
        if exit_fd is not None:
            poller.register(exit_fd, select.POLLIN)
        wall_end = start + limits["wall_seconds"]
        next_look = start + POLL_S
        step = POLL_S if exit_fd is not None else 0.004
        try:
            while True:
                now = time.monotonic()
                timeout = max(0.0, min(next_look, wall_end, now + step) - now)
                for fd, event in poller.poll(timeout * 1000 + 1):
                    if fd in captures:
                        captures[fd].drain(fd, most=1 << 20)
                        if event & select.POLLHUP and not event & select.POLLIN:
                            poller.unregister(fd)
                    elif fd == self._hangup_fd:
                        raise WorkerFault("the owner is gone")
                status = processes.reap_until(pid)
                if status is not None:
                    return None, status
                now = time.monotonic()
                if now >= wall_end:
                    return "timeout", None
                if self._settings.limited and now >= next_look:
                    next_look = now + POLL_S
                    broken = self._broken_limit(before, limits)
                    if broken:
                        return broken, None
        finally:
            if exit_fd is not None:
                os.close(exit_fd)

    def _broken_limit(self, before: resource.struct_rusage, limits: dict[str, Any]) -> str | None:
        use = processes.usage(self._shared_pages, skip=self._housing.porter)
        cpu_s = self._seen_cpu_s = processes.cpu_since(before) + use.cpu_s
        keepers = 1 if self._housing.porter else 0
        return broken_limit(limits, cpu_s, use.resident, use.tasks - keepers)


def broken_limit(limits: dict[str, Any], cpu_s: float, resident: int, tasks: int) -> str | None:
    """The status that a use over a limit earns, or None."""
    if cpu_s > limits["cpu_seconds"] + 1.5 / processes.TICK:
        return "timeout"
    if resident > int(limits["memory_mb"]) << 20:
        return "memory"
    return "killed" if tasks > limits["processes"] else None


def judge(
    verdict: str | None, wait_status: int | None, cpu_s: float, cpu_limit: float
) -> tuple[str, int | None]:
    """Status and exit code from the broken limit or the way the process ended."""
    if verdict is not None or wait_status is None:
        return verdict or "killed", None
    code = os.waitstatus_to_exitcode(wait_status)
    if code in (-signal.SIGPROF, -signal.SIGXCPU) or cpu_s > cpu_limit + 0.05:
        return "timeout", None
    if code == OUT_OF_MEMORY:
        return "memory", 1
    if code < 0:
        return "killed", code
    return ("ok" if code == 0 else "error"), code


def open_outputs(
    place: Place, names: list[str], most_bytes: int, owner: int, opened: list[int]
) -> str | None:
    """Open the outputs without following anything; returns what is wrong, if something is."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for name in names:
        try:
            fd = os.open(name, flags, dir_fd=place.folder_fd)
        except FileNotFoundError:
            return f"no {name} written"
        except OSError as error:
            if error.errno == errno.ELOOP:
                return f"{name} is a link: write an ordinary file"
            return f"{name} cannot be read: {error.strerror}"
        opened.append(fd)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is not an ordinary file"
        if found.st_uid != owner:
            return f"{name} belongs to another user"
        if found.st_size > most_bytes:
            return f"{name} has {found.st_size} bytes, more than {most_bytes >> 20} MiB"
    return None

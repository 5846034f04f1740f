"""The warm worker: imports numpy, pandas and scikit-learn once, then forks for each script.

It runs inside the sandbox and knows only the standard library and what it preloads; the owner
talks to it over one socket (see `pool.py`). It trusts nothing that a script leaves behind:
links are not followed, sizes are checked, every process is killed before outputs are read.

    python worker.pyz '{"fd": 5, "root": "/work", "scratch": ["/tmp"], "uid": null, ...}'
"""

from __future__ import annotations

import array
import base64
import contextlib
import errno
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent_tools.sandbox.inside import preload, processes
from agent_tools.sandbox.inside.processes import WorkerFault
from agent_tools.sandbox.inside.script import (
    OUT_OF_MEMORY,
    Settings,
    become_script,
    finish_script,
    run_code,
)

_POLL_S = 0.02


@dataclass
class _Capture:
    """Keeps the first and last half of `limit` bytes of a stream; the rest is dropped."""

    limit: int
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    total: int = 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self.limit // 2 - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        self.tail += data
        keep = self.limit - self.limit // 2
        if len(self.tail) > keep:
            del self.tail[:-keep]

    def text(self) -> str:
        cut = self.total - len(self.head) - len(self.tail)
        middle = f"\n[{cut} bytes cut]\n".encode() if cut else b""
        return (bytes(self.head) + middle + bytes(self.tail)).decode("utf-8", "replace")


class Worker:
    """Runs scripts one after the other, each in a fork and a folder of its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.socket = socket.socket(fileno=settings.fd)
        self.inputs: dict[str, int] = {}
        self.count = 0
        places = (settings.root, *settings.scratch)
        self.modes = {place: Path(place).stat().st_mode for place in places}
        self.base_memory, self.shared_pages = processes.own_pages()

    def serve(self) -> None:
        """Answer requests until the owner closes the socket."""
        while True:
            message = self._receive()
            if message is None:
                return
            request, fds = message
            for key in request["forget"]:
                os.close(self.inputs.pop(key))
            if fds:
                self.inputs[request["key"]] = fds[0]
            self._answer(request)

    # -- protocol: 4-byte length, then JSON; descriptors ride on the length

    def _receive(self) -> tuple[dict[str, Any], list[int]] | None:
        fds = array.array("i")
        head, ancillary, _flags, _address = self.socket.recvmsg(4, socket.CMSG_SPACE(4))
        if not head:
            return None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data)
        head += self._exactly(4 - len(head))
        body = self._exactly(struct.unpack("=I", head)[0])
        request: dict[str, Any] = json.loads(body)
        return request, list(fds)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise WorkerFault("the owner closed the socket inside a request")
            data += piece
        return bytes(data)

    def send(self, answer: dict[str, Any], fds: list[int]) -> None:
        """Send one answer with descriptors of the output files."""
        body = json.dumps(answer).encode()
        head = struct.pack("=I", len(body))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([head], rights)
        self.socket.sendall(body)

    # -- running

    def _answer(self, request: dict[str, Any]) -> None:
        self.count += 1
        folder = f"{self.settings.root}/{self.count}"
        temp = self.settings.scratch[0]
        limits: dict[str, float] = request["limits"]
        outputs: list[int] = []
        try:
            try:
                self._lay_out(folder, request)
            except OSError as error:
                raise WorkerFault(f"cannot lay out a script's folder: {error}") from error
            answer = self._run(folder, temp, request["code"], limits)
            if answer["status"] == "ok":
                problem = self._open_outputs(folder, request["outputs"], limits, outputs)
                if problem:
                    answer["status"] = "error"
                    answer["stderr"] += problem + "\n"
                    while outputs:
                        os.close(outputs.pop())
            self.send(answer, outputs)
        finally:
            for fd in outputs:
                os.close(fd)
        self._clean()

    def _lay_out(self, folder: str, request: dict[str, Any]) -> None:
        Path(folder).mkdir(0o700)
        memory = self.inputs[request["key"]]
        offset = 0
        made = [folder]
        for name in request["folders"]:
            Path(f"{folder}/{name}").mkdir(0o700)
            made.append(f"{folder}/{name}")
        for name, size in request["files"]:
            path = f"{folder}/{name}"
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            end = offset + size
            while offset < end:
                offset += os.sendfile(fd, memory, offset, end - offset)
            os.close(fd)
            made.append(path)
        script = f"{folder}/script.py"
        if script not in made:
            Path(script).write_text(request["code"], encoding="utf-8", errors="surrogatepass")
        if self.settings.uid is not None:
            for path in made:
                os.chown(path, self.settings.uid, self.settings.uid)

    def _run(self, folder: str, temp: str, code: str, limits: dict[str, float]) -> dict[str, Any]:
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            own_exit = 1
            try:
                become_script(
                    folder, temp, limits, self.settings, out_write, err_write, self.base_memory
                )
                own_exit = run_code(code, f"{folder}/script.py")
                finish_script()
            except OSError as error:
                os.write(2, f"the sandbox could not run the script: {error}\n".encode())
                own_exit = 1
            finally:
                os._exit(own_exit)
        os.close(out_write)
        os.close(err_write)
        streams = {
            out_read: _Capture(int(limits["output_bytes"])),
            err_read: _Capture(int(limits["output_bytes"])),
        }
        try:
            verdict, wait_status = self._watch(pid, start, before, limits, streams)
            processes.kill_all(self.settings.uid)
            for fd, capture in streams.items():
                _drain(fd, capture)
        finally:
            os.close(out_read)
            os.close(err_read)
        wall_s = time.monotonic() - start
        cpu_s = processes.cpu_since(before)
        status, exit_code = _judge(verdict, wait_status, cpu_s, limits["cpu_seconds"])
        return {
            "status": status,
            "exit_code": exit_code,
            "stdout": streams[out_read].text(),
            "stderr": streams[err_read].text(),
            "cpu_s": cpu_s,
            "wall_s": wall_s,
        }

    def _watch(
        self,
        pid: int,
        start: float,
        before: resource.struct_rusage,
        limits: dict[str, float],
        streams: dict[int, _Capture],
    ) -> tuple[str | None, int | None]:
        """Follow the script until it ends or breaks a limit; returns (limit broken, wait status).

        The owner's end of the socket is watched too: nobody left to answer means stop at once.
        """
        poller = select.poll()
        for fd in streams:
            os.set_blocking(fd, False)
            poller.register(fd, select.POLLIN)
        poller.register(self.socket, select.POLLHUP | select.POLLRDHUP)
        exit_fd = processes.open_pidfd(pid)
        if exit_fd is not None:
            poller.register(exit_fd, select.POLLIN)
        wall_end = start + limits["wall_seconds"]
        next_look = start + _POLL_S
        step = _POLL_S if exit_fd is not None else 0.004
        try:
            while True:
                now = time.monotonic()
                timeout = max(0.0, min(next_look, wall_end, now + step) - now)
                for fd, event in poller.poll(timeout * 1000 + 1):
                    if fd in streams:
                        _drain(fd, streams[fd], most=1 << 20)
                        if event & select.POLLHUP and not event & select.POLLIN:
                            poller.unregister(fd)
                    elif fd == self.socket.fileno():
                        raise WorkerFault("the owner is gone")
                status = processes.reap_until(pid)
                if status is not None:
                    return None, status
                now = time.monotonic()
                if now >= wall_end:
                    return "timeout", None
                if self.settings.limited and now >= next_look:
                    next_look = now + _POLL_S
                    broken = self._broken_limit(before, limits)
                    if broken:
                        return broken, None
        finally:
            if exit_fd is not None:
                os.close(exit_fd)

    def _broken_limit(self, before: resource.struct_rusage, limits: dict[str, float]) -> str | None:
        use = processes.usage(self.shared_pages)
        if processes.cpu_since(before) + use.cpu_s > limits["cpu_seconds"] + 1.5 / processes.TICK:
            return "timeout"
        if use.resident > int(limits["memory_mb"]) << 20:
            return "memory"
        return "killed" if use.tasks > limits["processes"] else None

    def _open_outputs(
        self, folder: str, names: list[str], limits: dict[str, float], opened: list[int]
    ) -> str | None:
        """Open the outputs without following anything; returns what is wrong, if something is."""
        owner = self.settings.uid if self.settings.uid is not None else os.geteuid()
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        for name in names:
            try:
                fd = os.open(f"{folder}/{name}", flags)
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
            if found.st_size > int(limits["file_mb"]) << 20:
                return f"{name} has {found.st_size} bytes, more than {limits['file_mb']} MiB"
        return None

    def _clean(self) -> None:
        """Remove all that the script left; if that fails, the worker must not be used again."""
        try:
            for place in (self.settings.root, *self.settings.scratch):
                for entry in os.scandir(place):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        Path(entry.path).unlink()
                # A script may own these folders: its marks on them would outlive it.
                mode = stat.S_IMODE(self.modes[place])
                if stat.S_IMODE(Path(place).stat().st_mode) != mode:
                    Path(place).chmod(mode)
                os.utime(place)
        except (OSError, RecursionError) as error:
            raise WorkerFault(f"cannot clean up after a script: {error}") from error


def _drain(fd: int, capture: _Capture, most: int = 1 << 26) -> None:
    with contextlib.suppress(BlockingIOError):
        while most > 0:
            data = os.read(fd, 1 << 16)
            if not data:
                return
            capture.add(data)
            most -= len(data)


def _judge(
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


def _filter_works(program: str) -> bool:
    """Whether this kernel takes the filter, tried in a process that ends at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(OSError):
            processes.install_filter(base64.b64decode(program))
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def main(argument: str) -> int:
    """Serve scripts until the owner goes; exit code 0, or 3 when the worker must be replaced."""
    settings = Settings(**json.loads(argument))
    if settings.uid is not None:
        preload.open_unreachable_path()
    if os.getpid() != 1:
        processes.adopt_orphans()
    # Scripts share our user: without this they could open our /proc/<pid>/mem.
    processes.set_dumpable(False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    versions = preload.preload()
    gc.collect()
    gc.freeze()
    missing: list[str] = []
    if settings.filter is not None and not _filter_works(settings.filter):
        settings = replace(settings, filter=None)
        missing.append("no seccomp filter: the kernel refuses it, so scripts may open sockets")
    try:
        worker = Worker(settings)
        worker.send({"ready": True, "versions": versions, "missing": missing}, [])
        worker.serve()
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the owner went while we were busy
    except WorkerFault as fault:
        print(f"sandbox worker: {fault}", file=sys.stderr)
        with contextlib.suppress(WorkerFault):
            processes.kill_all(settings.uid)
        return 3
    return 0

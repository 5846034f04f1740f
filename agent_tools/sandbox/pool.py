"""A pool of warm workers: one thread of the owner for each worker, one queue for all."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import queue
import socket
import stat
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent_tools.errors import InfraError
from agent_tools.paths import script_python
from agent_tools.sandbox.bubblewrap import WORK_BYTES, BubblewrapSandbox
from agent_tools.sandbox.instance import Instance, Sandbox, memory_file
from agent_tools.sandbox.process import ProcessSandbox
from agent_tools.sandbox.types import PoolKind, SandboxError, ScriptJob, ScriptResult

_START_S = 180.0
# After the wall limit a worker must have killed, cleaned and answered; else it is replaced.
_ANSWER_GRACE_S = 5.0
_KEPT_FOLDERS = 16
_MOST_OUTPUTS = 16
_MOST_ANSWER_BYTES = 256 << 20
_MEMORY_SLACK = 64 << 20
_CPU_SLACK_S = 0.3
_ADD_SEALS, _ALL_SEALS = 1033, 0x1 | 0x2 | 0x4 | 0x8  # linux/fcntl.h: seal, shrink, grow, write
_NOT_SHOWN = {n: None for n in range(32) if chr(n) not in "\n\t"} | {127: None}


class _WorkerGoneError(Exception):
    """The worker ended or does not answer."""


@dataclass(frozen=True)
class _Folder:
    """An inputs folder as one sealed anonymous file: nobody can change it any more."""

    key: str
    fd: int
    folders: tuple[str, ...]
    files: tuple[tuple[str, int], ...]


class _Inputs:
    """Reads each distinct inputs folder once; shared by the workers of a pool."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Any, ...], _Folder] = OrderedDict()
        self._count = 0

    def get(self, path: Path) -> tuple[_Folder, int]:
        """The folder as it is now, with a descriptor that the caller closes."""
        signature, folders, found = _list_files(path)
        with self._lock:
            kept = self._kept.get(signature)
            if kept is None:
                parts = [file.read_bytes() for _, file in found]
                self._count += 1
                fd = memory_file("inputs", b"".join(parts))
                fcntl.fcntl(fd, _ADD_SEALS, _ALL_SEALS)
                sizes = tuple((n, len(p)) for (n, _), p in zip(found, parts, strict=True))
                kept = self._kept[signature] = _Folder(f"{self._count}", fd, folders, sizes)
            self._kept.move_to_end(signature)
            while len(self._kept) > _KEPT_FOLDERS:
                os.close(self._kept.popitem(last=False)[1].fd)
            return kept, os.dup(kept.fd)

    def close(self) -> None:
        with self._lock:
            while self._kept:
                os.close(self._kept.popitem()[1].fd)


def _list_files(
    path: Path,
) -> tuple[tuple[Any, ...], tuple[str, ...], list[tuple[str, Path]]]:
    folders: list[str] = []
    files: list[tuple[str, Path]] = []
    marks: list[tuple[Any, ...]] = []
    total = 0
    waiting = [path]
    while waiting:
        here = waiting.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise SandboxError(
                f"inputs folder {here} cannot be read ({error.strerror}): "
                "prepare the competition data first"
            ) from error
        for entry in entries:
            name = str(Path(entry.path).relative_to(path))
            if entry.is_dir():
                folders.append(name)
                waiting.append(Path(entry.path))
            elif entry.is_file():
                seen = entry.stat()
                total += seen.st_size
                marks.append((name, seen.st_size, seen.st_mtime_ns, seen.st_ino))
                files.append((name, Path(entry.path)))
    if total > WORK_BYTES // 2:
        raise SandboxError(
            f"inputs folder {path} holds {total >> 20} MiB; the sandbox takes {WORK_BYTES >> 21}"
        )
    return (str(path), tuple(folders), *marks), tuple(folders), files


class _Worker:
    """The owner's side of one worker: starts it, asks it, replaces it."""

    def __init__(self, sandbox: Sandbox, slot: int) -> None:
        self._sandbox = sandbox
        self._slot = slot
        self._aborted = False
        self._instance: Instance | None = None
        self._known: OrderedDict[str, None] = OrderedDict()
        self.missing: tuple[str, ...] = ()

    def start(self) -> None:
        """Start the worker and wait until it is warm. Raises InfraError."""
        self._known.clear()
        instance = self._sandbox.start(self._slot)
        try:
            answer, _ = _receive(instance.socket, _START_S)
            if not answer.get("ready"):
                raise InfraError(f"sandbox worker {self._slot} spoke out of turn: {answer}")
        except _WorkerGoneError as error:
            with contextlib.suppress(Exception):
                instance.process.wait(2)
            log = instance.log_text()
            instance.stop()
            raise InfraError(self._sandbox.explain(log)) from error
        if instance.cgroup is not None:
            instance.base_memory = instance.cgroup.memory_bytes()
        self._instance = instance
        self.missing = tuple(answer["missing"])

    def abort(self) -> None:
        """End the running script, from another thread; the worker ends with it."""
        self._aborted = True
        instance = self._instance
        if instance is not None:
            with contextlib.suppress(OSError):
                instance.socket.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        if self._instance is not None:
            self._instance.stop()
            self._instance = None

    def run(self, job: ScriptJob, folder: _Folder, fd: int) -> ScriptResult:
        """Run a job; a worker that died is replaced and the job tried once more."""
        died = ""
        for _attempt in range(2):
            if self._instance is None:
                try:
                    self.start()
                except InfraError as error:
                    return _failed("infra", str(error))
            assert self._instance is not None
            try:
                return self._ask(self._instance, job, folder, fd)
            except TimeoutError:
                self.stop()
                return _failed("timeout", "the sandbox stopped a script past its wall limit")
            except _WorkerGoneError:
                died = self._instance.log_text()
                self.stop()
                if self._aborted:
                    return _failed("killed", "the sandbox pool was closed")
        last = died.splitlines()[-1] if died else "no message"
        return _failed("killed", f"the sandbox worker died twice under this script ({last})")

    def _ask(self, instance: Instance, job: ScriptJob, folder: _Folder, fd: int) -> ScriptResult:
        limits = job.limits
        group = instance.cgroup
        oom_before, cpu_before = 0, None
        if group is not None:
            # Lowering below what a big tmpfs still holds is refused; the rlimits hold meanwhile.
            with contextlib.suppress(OSError):
                group.set_limits(
                    memory_bytes=instance.base_memory + (limits.memory_mb << 20) + _MEMORY_SLACK,
                    tasks=limits.processes + 4,
                )
            oom_before, cpu_before = group.oom_kills(), group.cpu_s()
        new = folder.key not in self._known
        self._known[folder.key] = None
        self._known.move_to_end(folder.key)
        forget = []
        while len(self._known) > _KEPT_FOLDERS:
            forget.append(self._known.popitem(last=False)[0])
        request = {
            "key": folder.key,
            "forget": forget,
            "folders": folder.folders,
            "files": folder.files,
            "code": job.code,
            "outputs": job.outputs,
            "limits": {**asdict(limits), "wall_seconds": limits.wall},
        }
        _send(instance.socket, request, [fd] if new else [])
        answer, fds = _receive(instance.socket, limits.wall + _ANSWER_GRACE_S)
        try:
            files = _read_outputs(job, fds) if answer["status"] == "ok" else {}
        finally:
            for opened in fds:
                os.close(opened)
        status, stderr = answer["status"], answer["stderr"]
        if group is not None and status in ("killed", "error", "ok"):
            cpu_after = group.cpu_s()
            if status != "ok" and group.oom_kills() > oom_before:
                status = "memory"
            elif cpu_before is not None and cpu_after is not None:
                # Children whose parent ignores them vanish from the worker's count, not from here.
                extra = limits.cpu_seconds * 0.1 + _CPU_SLACK_S
                if cpu_after - cpu_before > limits.cpu_seconds + extra:
                    status, files = "timeout", {}
        return ScriptResult(
            status=status,
            exit_code=answer["exit_code"],
            stdout=answer["stdout"].translate(_NOT_SHOWN),
            stderr=stderr.translate(_NOT_SHOWN),
            files=files,
            cpu_s=answer["cpu_s"],
            wall_s=answer["wall_s"],
        )


def _failed(status: Any, reason: str) -> ScriptResult:
    return ScriptResult(status, None, "", reason + "\n", {}, 0.0, 0.0)


def _send(channel: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    body = json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        channel.settimeout(30)
        channel.sendmsg([struct.pack("=I", len(body))], rights)
        channel.sendall(body)
    except OSError as error:
        raise _WorkerGoneError from error


def _receive(channel: socket.socket, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
    """One message with its descriptors. Raises TimeoutError and _WorkerGoneError."""
    give_up = time.monotonic() + timeout_s
    fds = array.array("i")

    def left() -> float:
        remaining = give_up - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining

    def read(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            channel.settimeout(left())
            space = socket.CMSG_SPACE(4 * _MOST_OUTPUTS)
            piece, ancillary, _flags, _address = channel.recvmsg(
                size - len(data), space, socket.MSG_CMSG_CLOEXEC
            )
            if not piece:
                raise _WorkerGoneError
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(payload[: len(payload) // 4 * 4])
            data += piece
        return bytes(data)

    try:
        size = struct.unpack("=I", read(4))[0]
        if size > _MOST_ANSWER_BYTES:
            raise _WorkerGoneError
        body = read(size)
        message: dict[str, Any] = json.loads(body)
    except TimeoutError:
        for fd in fds:
            os.close(fd)
        raise
    except (OSError, ValueError) as error:
        for fd in fds:
            os.close(fd)
        raise _WorkerGoneError from error
    return message, list(fds)


def _read_outputs(job: ScriptJob, fds: list[int]) -> dict[str, bytes]:
    """The outputs' bytes; sizes and kinds are checked again on this side of the wall."""
    files: dict[str, bytes] = {}
    most = job.limits.file_mb << 20
    if len(fds) != len(job.outputs):
        raise _WorkerGoneError
    for name, fd in zip(job.outputs, fds, strict=True):
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise _WorkerGoneError
        files[name] = os.pread(fd, most, 0)
    return files


class WarmPool:
    """`ScriptPool` over any sandbox. Use it as a context manager, or call `close`."""

    def __init__(self, sandbox: Sandbox, workers: int) -> None:
        if workers < 1:
            raise SandboxError(f"sandbox workers = {workers}: must be at least 1")
        self._sandbox = sandbox
        self._inputs = _Inputs()
        self._jobs: queue.SimpleQueue[tuple[ScriptJob, Future[ScriptResult]] | None] = (
            queue.SimpleQueue()
        )
        self._closed = False
        self._workers = [_Worker(sandbox, slot) for slot in range(workers)]
        started: list[Future[None]] = [Future() for _ in range(workers)]
        # A thread starts its worker and lives as long: the kernel ends a worker whose starting
        # thread has ended.
        self._threads = [
            threading.Thread(target=self._serve, args=(worker, ready), daemon=True)
            for worker, ready in zip(self._workers, started, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for ready in started:
                ready.result(_START_S + 30)
        except BaseException:
            self.close()
            raise

    @property
    def missing(self) -> tuple[str, ...]:
        """Protections that this host does not give."""
        return (*self._sandbox.missing, *self._workers[0].missing)

    def run(self, jobs: Sequence[ScriptJob]) -> list[ScriptResult]:
        """Run all jobs; results in the same order."""
        return [future.result() for future in [self.submit(job) for job in jobs]]

    def submit(self, job: ScriptJob) -> Future[ScriptResult]:
        """Queue a job. Its future raises SandboxError for inputs that cannot be read."""
        if self._closed:
            raise SandboxError("this sandbox pool is closed: make a new one")
        if len(job.outputs) > _MOST_OUTPUTS:
            raise SandboxError(f"a script may have at most {_MOST_OUTPUTS} outputs")
        future: Future[ScriptResult] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Stop everything now: running scripts end as killed, queued jobs are cancelled."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting = self._jobs.get_nowait()
                    if waiting is not None:
                        waiting[1].cancel()
            for _ in self._threads:
                self._jobs.put(None)
            for worker in self._workers:
                worker.abort()
        for thread in self._threads:
            thread.join()
        self._inputs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self, worker: _Worker, ready: Future[None]) -> None:
        try:
            worker.start()
        except (InfraError, OSError, TimeoutError) as error:
            ready.set_exception(
                error if isinstance(error, InfraError) else InfraError(f"sandbox: {error}")
            )
            return
        ready.set_result(None)
        try:
            while (item := self._jobs.get()) is not None:
                job, future = item
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    folder, fd = self._inputs.get(job.inputs)
                    try:
                        result = worker.run(job, folder, fd)
                    finally:
                        os.close(fd)
                    future.set_result(result)
                except (SandboxError, OSError) as error:
                    future.set_exception(error)
        finally:
            worker.stop()


def make_pool(kind: PoolKind, workers: int, *, python: Path | None = None) -> WarmPool:
    """A pool of `workers` warm workers; returns when all are warm (about two seconds).

    kind     "bubblewrap" (isolated) or "process" (another user and limits only)
    python   the interpreter of the script environment; None is `agent_tools.paths.script_python`
    Raises InfraError with the repair where the host refuses, SandboxError for a wrong argument.
    """
    chosen = script_python() if python is None else Path(python)
    sandbox: Sandbox
    if kind == "bubblewrap":
        sandbox = BubblewrapSandbox(chosen)
    elif kind == "process":
        sandbox = ProcessSandbox(chosen)
    else:
        raise SandboxError(f"sandbox kind {kind!r}: use 'bubblewrap' or 'process'")
    return WarmPool(sandbox, workers)

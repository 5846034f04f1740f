"""A shell in a sandbox of its own, for tasks of many turns.

with open_shell("bubblewrap", inputs=folder) as shell:
    shell.run("ls -l")
    saved = shell.snapshot()
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from agent_tools.errors import InfraError
from agent_tools.sandbox.cgroups import Cgroup
from agent_tools.sandbox.engines import make_sandbox
from agent_tools.sandbox.inputs import Inputs
from agent_tools.sandbox.instance import Instance, Sandbox, memory_file
from agent_tools.sandbox.isolation import full_or_closed
from agent_tools.sandbox.link import WorkerGoneError
from agent_tools.sandbox.snapshot import MOST_BYTES, MOST_ENTRIES, check_snapshot
from agent_tools.sandbox.types import CommandResult, Limits, PoolKind, SandboxError, View
from agent_tools.sandbox.workers import (
    ANSWER_GRACE_S,
    START_S,
    checked_status,
    report_start,
    shown,
    start_instance,
    wire_limits,
)

_MOST_COMMAND = 1 << 20
_RECOVER_S = 5.0
_FILES_S = 120.0
_MEMORY_SLACK = 64 << 20
_TASK_SLACK = 4


class Shell:
    """One sandbox with a bash that keeps its state from command to command.

    `limits` hold for the whole sandbox (memory, processes, disk) and for each command (CPU, wall,
    output). It is not for two threads at once. Use it as a context manager, or call `close`.
    """

    def __init__(self, sandbox: Sandbox, limits: Limits, inputs: Path | None) -> None:
        self._limits = limits
        self._instance: Instance | None = None
        self._stop = threading.Event()
        ready: Future[tuple[Instance, dict[str, Any]]] = Future()
        # The kernel ends a worker whose starting thread has ended, so one thread stays for it.
        self._thread = threading.Thread(target=self._hold, args=(sandbox, ready), daemon=True)
        self._thread.start()
        self._instance, answer = ready.result(START_S + 30)
        self.missing: tuple[str, ...] = (*sandbox.missing, *answer["missing"])
        try:
            if self._instance.cgroup is not None:
                self._limit(self._instance.cgroup)
            if inputs is not None:
                self._put(inputs)
        except BaseException:
            self.close()
            raise

    @property
    def instance(self) -> Instance:
        """The sandbox behind the shell. Raises SandboxError once it is closed."""
        if self._instance is None or self._stop.is_set():
            raise SandboxError("this shell is closed: open a new one")
        return self._instance

    def run(
        self,
        command: str,
        *,
        cpu_seconds: float | None = None,
        wall_seconds: float | None = None,
        output_bytes: int | None = None,
    ) -> CommandResult:
        """Run a command as if typed; the limits are the shell's where they are not given.

        Raises SandboxError for a command that cannot be sent and InfraError where the sandbox is
        gone.
        """
        if "\0" in command or len(command) > _MOST_COMMAND:
            raise SandboxError("a command may hold no zero byte and at most a million characters")
        chosen = replace(
            self._limits,
            cpu_seconds=cpu_seconds or self._limits.cpu_seconds,
            wall_seconds=wall_seconds or self._limits.wall,
            output_bytes=output_bytes or self._limits.output_bytes,
        )
        group = self.instance.cgroup
        kills = group.oom_kills() if group is not None else 0
        request = {"do": "command", "command": command, "limits": wire_limits(chosen)}
        answer, _ = self._ask(request, (), chosen.wall + ANSWER_GRACE_S + _RECOVER_S, 0)
        try:
            status = checked_status(answer)
        except WorkerGoneError as error:
            self.close()
            raise InfraError("the shell's sandbox speaks nonsense: open a new one") from error
        if group is not None and status in ("error", "killed") and group.oom_kills() > kills:
            status = "memory"
        return CommandResult(
            status=status,
            exit_code=answer["exit_code"],
            stdout=shown(answer["stdout"]),
            stderr=shown(answer["stderr"]),
            cpu_s=answer["cpu_s"],
            wall_s=answer["wall_s"],
            state_kept=answer.get("state_kept") is True,
        )

    def snapshot(self, most_bytes: int = MOST_BYTES) -> bytes:
        """The work folder as a checked tar archive.

        Left out are pipes, sockets, devices, links to elsewhere and unreadable files. Raises
        SandboxError where it is too big.
        """
        request = {"do": "snapshot", "most_bytes": most_bytes, "most_entries": MOST_ENTRIES}
        _, blobs = self._ask(request, (), _FILES_S, 2 * most_bytes + (MOST_ENTRIES << 11))
        if len(blobs) != 1:
            raise InfraError("the sandbox sent no snapshot: open a new shell")
        check_snapshot(blobs[0], most_bytes)
        return blobs[0]

    def restore(self, data: bytes) -> None:
        """Replace the work folder by a snapshot; the shell and what it started end first.

        Raises SandboxError for an archive that must not be unpacked; nothing is touched then.
        """
        check_snapshot(data)
        fd = memory_file("snapshot", data)
        try:
            self._ask({"do": "restore"}, (fd,), _FILES_S, 0)
        finally:
            os.close(fd)

    def close(self) -> None:
        """End everything in the sandbox."""
        self._stop.set()
        self._thread.join()
        self._instance = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hold(self, sandbox: Sandbox, ready: Future[tuple[Instance, dict[str, Any]]]) -> None:
        if report_start(ready, lambda: start_instance(sandbox, 0, self._limits, "shell")):
            self._stop.wait()
            ready.result()[0].stop()

    def _limit(self, group: Cgroup) -> None:
        group.set_limits(
            memory_bytes=group.memory_bytes() + (self._limits.memory_mb << 20) + _MEMORY_SLACK,
            tasks=self._limits.processes + _TASK_SLACK,
        )

    def _put(self, inputs: Path) -> None:
        held = Inputs()
        folder, fd = held.get(inputs)
        try:
            request = {"do": "inputs", "folders": folder.folders, "files": folder.files}
            self._ask(request, (fd,), _FILES_S, 0)
        finally:
            os.close(fd)
            held.close()

    def _ask(
        self, request: dict[str, Any], fds: tuple[int, ...], timeout_s: float, most_bytes: int
    ) -> tuple[dict[str, Any], list[bytes]]:
        instance = self.instance
        try:
            instance.link.send(request, fds)
            answer, blobs = instance.link.receive(timeout_s, most_bytes)
        except (WorkerGoneError, TimeoutError) as error:
            log = instance.log_text().splitlines()
            self.close()
            raise InfraError(
                f"the shell's sandbox is gone ({log[-1] if log else 'no message'}): open a new one"
            ) from error
        if "error" in answer:
            raise SandboxError(f"the sandbox refused: {shown(str(answer['error']))}")
        return answer, blobs


def open_shell(
    kind: PoolKind = "bubblewrap",
    *,
    inputs: Path | None = None,
    limits: Limits | None = None,
    python: Path | None = None,
    view: View | None = None,
    require_full_isolation: bool = False,
) -> Shell:
    """Open a shell; `inputs` is a folder whose files appear in its work folder, `view` what it
    shows beside that.

    Raises as `make_pool`; the kind "process" has no shell.
    """
    if kind == "process":
        raise SandboxError("sandbox kind 'process' has no shell: use 'bubblewrap' or 'docker'")
    shell = Shell(make_sandbox(kind, python, view=view), limits or Limits(cpu_seconds=10), inputs)
    return full_or_closed(shell) if require_full_isolation else shell

"""A shell that stays: one bash process, fed a command at a time, watched as scripts are.

Variables, functions, the current folder and background processes last from command to command.
A command that breaks a limit loses its processes; the shell itself goes only if it does not come
back, and the next command then finds a new one in the same work folder.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_tools.sandbox.guest import processes, tree
from agent_tools.sandbox.guest.capture import Capture
from agent_tools.sandbox.guest.layout import lay_out
from agent_tools.sandbox.guest.processes import WorkerFault
from agent_tools.sandbox.guest.runner import POLL_S, broken_limit
from agent_tools.sandbox.guest.script import Settings, confine, connect, set_limits
from agent_tools.sandbox.guest.wire import Line

_COMMANDS, _STATUS = 8, 9
# Commands end with a zero byte. They see neither descriptor; bash's own copies close on exec.
_LOOP = """
while IFS= read -r -d '' -u 8 SANDBOX_COMMAND; do
  eval "$SANDBOX_COMMAND" 8<&- 9>&-
  printf '%d\\n' "$?" >&9
done
"""
_COME_BACK_S = 1.0
_BASH = "/bin/bash"


@dataclass
class _Shell:
    """The process and our ends of its pipes."""

    pid: int
    commands: int
    status: int
    out: int
    err: int

    def close(self) -> None:
        for fd in (self.commands, self.status, self.out, self.err):
            os.close(fd)


class ShellServer:
    """Answers requests: inputs, command, snapshot, restore."""

    def __init__(self, settings: Settings, line: Line) -> None:
        self._settings = settings
        self._line = line
        self._shell: _Shell | None = None
        self._base_memory, _ = processes.own_pages()

    def answer(self, request: dict[str, Any], fds: list[int]) -> None:
        """Do what a request asks and send the answer."""
        sent: list[int] = []
        answer: dict[str, Any] = {}
        try:
            if request["do"] == "inputs":
                lay_out(self._settings.root, request, fds[0])
            elif request["do"] == "command":
                answer = self._command(request["command"], request["limits"])
            elif request["do"] == "snapshot":
                fd, skipped = tree.pack(
                    self._settings.root, request["most_bytes"], request["most_entries"]
                )
                sent, answer = [fd], {"skipped": skipped}
            else:
                self._end()
                tree.unpack(self._settings.root, fds[0])
        except (tree.TreeError, OSError) as error:
            answer = {"error": str(error)}
        try:
            self._line.send(answer, sent)
        finally:
            for fd in (*sent, *fds):
                os.close(fd)

    def _command(self, command: str, limits: dict[str, Any]) -> dict[str, Any]:
        if self._shell is None:
            self._shell = self._start(limits)
        shell = self._shell
        captures = {fd: Capture(int(limits["output_bytes"])) for fd in (shell.out, shell.err)}
        ooms, cpu_before, start = processes.oom_kills(), self._cpu_s(), time.monotonic()
        text = command.encode("utf-8", "surrogateescape") + b"\0"
        verdict, code = self._watch(shell, text, limits, captures, cpu_before)
        if verdict is not None:
            code = self._recover(shell, captures)
        for fd, capture in captures.items():
            capture.drain(fd, most=1 << 20)
        wall_s = time.monotonic() - start
        cpu_s = max(0.0, self._cpu_s() - cpu_before)
        kept = code is not None
        if not kept:  # the shell ended, by the command's wish or by ours
            code = self._end(leaving=verdict is None)
        status = verdict or ("ok" if code == 0 else "error")
        if status == "error" and processes.oom_kills() > ooms:
            status = "memory"
        return {
            "status": status,
            "exit_code": code if verdict is None else None,
            "stdout": captures[shell.out].text(),
            "stderr": captures[shell.err].text(),
            "cpu_s": cpu_s,
            "wall_s": wall_s,
            "state_kept": kept,
        }

    def _start(self, limits: dict[str, Any]) -> _Shell:
        pipes = [os.pipe() for _ in range(4)]
        (command_r, command_w), (status_r, status_w), (out_r, out_w), (err_r, err_w) = pipes
        pid = os.fork()
        if pid == 0:
            try:
                self._become(command_r, status_w, out_w, err_w, limits)
            except OSError as error:
                os.write(2, f"the sandbox could not start {_BASH}: {error}\n".encode())
            finally:
                os._exit(127)
        for fd in (command_r, status_w, out_w, err_w):
            os.close(fd)
        for fd in (command_w, status_r, out_r, err_r):
            os.set_blocking(fd, False)
        return _Shell(pid, command_w, status_r, out_r, err_r)

    def _become(
        self, commands: int, status: int, out: int, err: int, limits: dict[str, Any]
    ) -> None:
        os.setsid()
        # Above all numbers in use first: a pipe may lie on 8 or 9 itself.
        high = [os.dup(fd) for fd in (commands, status)]
        while min(high) <= _STATUS:
            high = [os.dup(fd) for fd in high]
        connect(out, err, *high)
        for source, target in zip(high, (_COMMANDS, _STATUS), strict=True):
            os.dup2(source, target)
            os.close(source)
        os.chdir(self._settings.root)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write("1000")
        set_limits(limits, self._settings, self._base_memory)
        environment = {**os.environ, "HOME": self._settings.root}
        environment["TMPDIR"] = self._settings.scratch[0]
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        confine(self._settings)
        os.execve(_BASH, ["bash", "--noprofile", "--norc", "-c", _LOOP], environment)

    def _watch(
        self, shell: _Shell, text: bytes, limits: dict[str, Any], captures: dict[int, Capture],
        cpu_before: float,
    ) -> tuple[str | None, int | None]:  # fmt: skip
        """Feed the command and follow it; (limit broken, exit code), (None, None): it ended."""
        poller = select.poll()
        for fd in (*captures, shell.status):
            poller.register(fd, select.POLLIN)
        poller.register(shell.commands, select.POLLOUT)
        poller.register(self._line.hangup_fd, select.POLLHUP | select.POLLRDHUP)
        start = time.monotonic()
        wall_end, next_look = start + limits["wall_seconds"], start + POLL_S
        answer = b""
        while True:
            now = time.monotonic()
            for fd, _event in poller.poll(max(0.0, min(next_look, wall_end) - now) * 1000 + 1):
                if fd in captures:
                    captures[fd].drain(fd, most=1 << 20)
                elif fd == self._line.hangup_fd:
                    raise WorkerFault("the owner is gone")
                elif fd == shell.commands:
                    with contextlib.suppress(BrokenPipeError):
                        text = text[os.write(fd, text[:4096]) :]
                    if not text:
                        poller.unregister(fd)
                elif fd == shell.status:
                    piece = os.read(fd, 64)
                    answer += piece
                    if answer.endswith(b"\n"):
                        return None, _exit_code(answer)
                    if not piece:
                        return None, None
            now = time.monotonic()
            if now >= wall_end:
                return "timeout", None
            if now >= next_look:
                next_look = now + POLL_S
                use = processes.usage(0)
                cpu_s = self._cpu_s() - cpu_before
                broken = broken_limit(limits, cpu_s, use.resident, use.tasks)
                if broken:
                    return broken, None

    def _recover(self, shell: _Shell, captures: dict[int, Capture]) -> int | None:
        """After a broken limit: kill what the shell started; its answer if it comes back."""
        poller = select.poll()
        poller.register(shell.status, select.POLLIN)
        give_up = time.monotonic() + _COME_BACK_S
        while time.monotonic() < give_up:
            for pid in processes.descendants():
                if pid != shell.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            for fd, capture in captures.items():
                capture.drain(fd, most=1 << 20)
            if poller.poll(50):
                answer = os.read(shell.status, 64)
                return _exit_code(answer) if answer.endswith(b"\n") else None
        return None

    def _end(self, *, leaving: bool = False) -> int | None:
        """End everything in the sandbox; the exit code of a shell that leaves by itself."""
        shell, self._shell = self._shell, None
        if shell is None:
            return None
        code = None
        give_up = time.monotonic() + _COME_BACK_S
        while leaving and code is None and time.monotonic() < give_up:
            status = processes.reap_until(shell.pid)
            code = os.waitstatus_to_exitcode(status) if status is not None else None
            time.sleep(0.001)
        processes.kill_all(None)
        shell.close()
        return code

    def _cpu_s(self) -> float:
        """CPU-seconds of everything this shell server ever started."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime + processes.usage(0).cpu_s


def _exit_code(answer: bytes) -> int:
    """The last line as a number; a command can find bash's copy of the pipe and write nonsense."""
    words = answer.split()
    return int(words[-1]) & 0xFF if words and words[-1].isdigit() else 255

"""The worker: serves scripts or a shell to the owner at the other end of its line.

A warm worker imports numpy, pandas and scikit-learn once, then forks for each script. It runs
inside the sandbox and knows only the standard library and what it preloads. It trusts nothing
that a script leaves behind: links are not followed, sizes are checked, every process is killed
before outputs are read.

    python worker.pyz '{"line": 5, "root": "/sandbox/work", "scratch": ["/tmp"], ...}'
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent_tools.sandbox.guest import kernel, landlock, preload, processes
from agent_tools.sandbox.guest.processes import NotBegunError, WorkerFault
from agent_tools.sandbox.guest.rooms import Rooms, try_room
from agent_tools.sandbox.guest.runner import Runner, SharedHousing, open_outputs
from agent_tools.sandbox.guest.script import Settings
from agent_tools.sandbox.guest.shell import ShellServer
from agent_tools.sandbox.guest.wire import Line, LineError, SocketLine, StreamLine

SCRATCH_MB = 128


class ScriptServer:
    """Answers requests to run scripts."""

    def __init__(
        self, settings: Settings, line: Line, housing: Rooms | SharedHousing, ruleset: int | None
    ) -> None:
        self._settings = settings
        self._line = line
        self._housing = housing
        self._runner = Runner(settings, housing, line.hangup_fd, ruleset)
        self._inputs: dict[str, int] = {}

    def answer(self, request: dict[str, Any], fds: list[int]) -> None:
        """Run the script of a request and send what became of it."""
        for key in request["forget"]:
            os.close(self._inputs.pop(key))
        if request["new"]:
            self._inputs[request["key"]] = fds.pop(0)
        memory = self._inputs[request["key"]]
        if self._settings.once:
            preload.load(preload.imported(request["code"]))
        limits: dict[str, Any] = request["limits"]
        outputs: list[int] = []
        try:
            place: Any = self._housing.open(request, memory, fds)
            answer = self._runner.run(place, request["code"], limits)
        except NotBegunError as fault:
            self._line.send(_not_begun(str(fault)), [])
            raise
        try:
            if answer["status"] == "ok":
                owner = self._settings.uid if self._settings.uid is not None else os.geteuid()
                most = int(limits["file_mb"]) << 20
                problem = open_outputs(place, request["outputs"], most, owner, outputs)
                if problem:
                    answer["status"] = "error"
                    answer["stderr"] += problem + "\n"
                    while outputs:
                        os.close(outputs.pop())
            self._line.send(answer, outputs)
        finally:
            for fd in (*outputs, *fds):
                os.close(fd)
        self._housing.close(place)


def _not_begun(reason: str) -> dict[str, Any]:
    """The answer for a script that never ran: the sandbox's failure, not the script's."""
    answer: dict[str, Any] = {"status": "infra", "exit_code": None, "stdout": ""}
    return {**answer, "stderr": reason + "\n", "cpu_s": 0.0, "wall_s": 0.0}


def _filter_works(program: str) -> bool:
    """Whether this kernel takes the filter, tried in a process that ends at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(OSError):
            kernel.install_filter(base64.b64decode(program))
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _open_line(number: int | None) -> Line:
    if number is not None:
        return SocketLine(socket.socket(fileno=number))
    # Standard input and output are the line: nothing else may read or print there.
    reading, writing = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return StreamLine(reading, writing)


def _server(
    settings: Settings, line: Line, rooms: Rooms | None, ruleset: int | None
) -> ScriptServer | ShellServer:
    if settings.purpose == "shell":
        return ShellServer(settings, line)
    return ScriptServer(settings, line, rooms or SharedHousing(settings), ruleset)


def _serve(settings: Settings) -> None:
    line = _open_line(settings.line)
    if settings.uid is not None:
        preload.open_unreachable_path()
    if os.getpid() != 1:
        kernel.adopt_orphans()
    # Scripts share our user: without this they could open our /proc/<pid>/mem.
    kernel.set_dumpable(False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    missing: list[str] = []
    rooms = Rooms(settings.root, settings.scratch, SCRATCH_MB) if settings.rooms else None
    refused = try_room(rooms) if rooms is not None else None
    if refused:
        settings, rooms = replace(settings, rooms=False), None
        kernel.drop_capabilities()
        missing.append(
            "scripts of one worker share its namespaces, one after the other "
            f"({refused}): use the kind docker"
        )
    if settings.filter is not None and not _filter_works(settings.filter):
        settings = replace(settings, filter=None)
        missing.append("no seccomp filter: the kernel refuses it, so scripts may open sockets")
    ruleset = None
    if settings.readable is not None:
        paths = [*settings.readable, sys.prefix, sys.base_prefix]
        paths += [path for path in sys.path if Path(path).is_dir()]
        ruleset = landlock.make_ruleset(paths, [settings.root, *settings.scratch])
        if ruleset is None:
            missing.append("no Landlock: scripts may read what their user may read")
    if not settings.once and settings.purpose == "scripts":
        preload.preload()
    gc.collect()
    gc.freeze()
    server = _server(settings, line, rooms, ruleset)
    line.send({"ready": True, "missing": missing, "rooms": rooms is not None}, [])
    while (received := line.receive()) is not None:
        server.answer(*received)


def main(argument: str) -> int:
    """Serve until the owner goes; exit code 0, or 3 when the worker must be replaced."""
    values = json.loads(argument)
    settings = Settings(**{**values, "scratch": tuple(values["scratch"])})
    try:
        _serve(settings)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the owner went while we were busy
    except (WorkerFault, LineError) as fault:
        print(f"sandbox worker: {fault}", file=sys.stderr)
        with contextlib.suppress(WorkerFault):
            processes.kill_all(settings.uid)
        return 3
    return 0

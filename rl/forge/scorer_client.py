"""A worker's end of the scorer: `ScriptPool` over a Unix-domain socket, in JSON lines.

    worker → scorer   {"key": …}   then   {"id": 3, "job": {code, inputs, outputs, limits}}
    scorer → worker   {"missing": […]}    {"id": 3, "result": {…, "files": {name: base64}}}
                                          {"id": 3, "error": …, "user": true}

Answers come in any order. Equal jobs have equal results, so whatever is unanswered when the
connection breaks is sent again to the scorer that comes next. No torch here.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from agent_tools.sandbox.types import Limits, SandboxError, ScriptJob, ScriptResult
from rl.errors import InfraError

SCORER = "SELFEVO_SCORER"
"""Variable of the environment: `<name>/<key>`, the scorer's abstract socket and the word that it
wants to hear first."""

RETRY_S = 0.1
START_S = 900.0

Json = dict[str, Any]


def split_address(address: str) -> tuple[str, str]:
    """Socket address and key. An abstract socket has no file: its name may be of any run directory,
    and is free as soon as the scorer is gone."""
    name, _, key = address.partition("/")
    return f"\0{name}", key


def line_of(value: Json) -> bytes:
    return json.dumps(value).encode() + b"\n"


def job_to_json(job: ScriptJob) -> Json:
    """The folder of inputs by its absolute path."""
    return {
        "code": job.code,
        "inputs": str(job.inputs.absolute()),
        "outputs": job.outputs,
        "limits": asdict(job.limits),
    }


def job_from_json(value: Json) -> ScriptJob:
    limits = Limits(**value["limits"])
    return ScriptJob(value["code"], Path(value["inputs"]), tuple(value["outputs"]), limits)


def result_to_json(result: ScriptResult) -> Json:
    files = {name: base64.b64encode(data).decode() for name, data in result.files.items()}
    return vars(result) | {"files": files}


def result_from_json(value: Json) -> ScriptResult:
    files = {name: base64.b64decode(data) for name, data in value["files"].items()}
    return ScriptResult(**value | {"files": files})


class ScorerPool:
    """`agent_tools.sandbox.ScriptPool`; for any number of threads. Jobs wait while there is no
    scorer: its restarts, and giving up, are the supervisor's."""

    def __init__(self, address: str) -> None:
        self._address, self._key = split_address(address)
        self._lock = threading.Lock()  # of what follows, and of sending
        self._socket: socket.socket | None = None
        self._waiting: dict[int, tuple[bytes, Future[ScriptResult]]] = {}
        self._closed = False
        self._ids = itertools.count()
        self._missing: tuple[str, ...] = ()
        self._met = threading.Event()
        threading.Thread(target=self._serve, name="scorer", daemon=True).start()

    @property
    def missing(self) -> tuple[str, ...]:
        """As the scorer says; waits for it. InfraError when it does not come."""
        if not self._met.wait(START_S):
            raise InfraError("the scorer does not answer; see scorer.log")
        return self._missing

    def submit(self, job: ScriptJob) -> Future[ScriptResult]:
        """Send a job. Its future raises SandboxError for inputs that cannot be read."""
        future: Future[ScriptResult] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise SandboxError("this sandbox pool is closed: make a new one")
            number = next(self._ids)
            line = line_of({"id": number, "job": job_to_json(job)})
            self._waiting[number] = (line, future)
            self._send(line)
        return future

    def run(self, jobs: Sequence[ScriptJob]) -> list[ScriptResult]:
        """Run all jobs; results in the same order."""
        return [future.result() for future in [self.submit(job) for job in jobs]]

    def close(self) -> None:
        """Let go; what is unanswered raises InfraError."""
        with self._lock:
            self._closed = True
            left, self._waiting = list(self._waiting.values()), {}
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        for _, future in left:
            future.set_exception(InfraError("the sandbox pool was closed"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------- the connection

    def _send(self, line: bytes) -> None:
        """A broken connection is found by who reads it, and the line sent again."""
        if self._socket is not None:
            try:
                self._socket.sendall(line)
            except OSError:
                self._socket = None

    def _serve(self) -> None:
        while not self._closed:
            with socket.socket(socket.AF_UNIX) as connection:
                try:
                    connection.connect(self._address)
                except OSError:
                    time.sleep(RETRY_S)
                    continue
                with self._lock:
                    if self._closed:
                        return
                    self._socket = connection
                    self._send(line_of({"key": self._key}))
                    for line, _ in self._waiting.values():
                        self._send(line)
                try:
                    self._read(connection)
                except (OSError, ValueError, KeyError, TypeError):
                    time.sleep(RETRY_S)  # broken off: again, from the first line
                with self._lock:
                    self._socket = None

    def _read(self, connection: socket.socket) -> None:
        """Until the connection ends."""
        with connection.makefile("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                answer = json.loads(line)
                if "missing" in answer:
                    self._missing = tuple(answer["missing"])
                    self._met.set()
                    continue
                result = result_from_json(answer["result"]) if "result" in answer else None
                with self._lock:
                    known = self._waiting.pop(answer["id"], None)
                if known is None:
                    continue
                if result is not None:
                    known[1].set_result(result)
                else:
                    kind = SandboxError if answer["user"] else InfraError
                    known[1].set_exception(kind(answer["error"]))

"""A pool of workers: one thread of the owner for each worker, one queue for all."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Self

from agent_tools.sandbox.engines import make_sandbox
from agent_tools.sandbox.inputs import Inputs
from agent_tools.sandbox.instance import Sandbox
from agent_tools.sandbox.isolation import full_or_closed
from agent_tools.sandbox.types import (
    Limits,
    PoolKind,
    SandboxError,
    ScriptJob,
    ScriptResult,
)
from agent_tools.sandbox.workers import START_S, Worker, report_start

_MOST_OUTPUTS = 16


class WarmPool:
    """`ScriptPool` over any sandbox. Use it as a context manager, or call `close`."""

    def __init__(self, sandbox: Sandbox, workers: int) -> None:
        if workers < 1:
            raise SandboxError(f"sandbox workers = {workers}: must be at least 1")
        self._sandbox = sandbox
        self._inputs = Inputs()
        self._jobs: queue.SimpleQueue[tuple[ScriptJob, Future[ScriptResult]] | None] = (
            queue.SimpleQueue()
        )
        self._closed = False
        self._workers = [Worker(sandbox, slot) for slot in range(workers)]
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
                ready.result(START_S + 30)
        except BaseException:
            self.close()
            raise

    @property
    def missing(self) -> tuple[str, ...]:
        """Protections that this host does not give, with the repair, one line each."""
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, worker: Worker, ready: Future[None]) -> None:
        def start() -> None:
            worker.start(Limits())
            if self._sandbox.once:  # it showed that the host can; each script starts its own
                worker.stop()

        if not report_start(ready, start):
            return
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
                except Exception as error:  # noqa: BLE001 - raised again by the future
                    future.set_exception(error)
        finally:
            worker.stop()


def make_pool(
    kind: PoolKind,
    workers: int,
    *,
    python: Path | None = None,
    cold: bool = False,
    require_full_isolation: bool = False,
) -> WarmPool:
    """A pool of `workers` workers; returns when all have shown that they start.

    kind     "bubblewrap" (isolated, warm), "docker" (a container a script) or "process" (another
             user, Landlock and limits only)
    python   the interpreter of the script environment; None is `agent_tools.paths.script_python`
    cold     bubblewrap only: a new sandbox a script instead of a fork of a warm worker
    require_full_isolation   refuse where `missing` would not be empty
    Raises InfraError with the repair where the host refuses, SandboxError for a wrong argument and
    for isolation that is not full though it must be.
    """
    pool = WarmPool(make_sandbox(kind, python, cold=cold), workers)
    return full_or_closed(pool) if require_full_isolation else pool

"""Gathers requests that arrive close together into one batch of the engine.

One thread collects, one generates; while a batch is generated the next one gathers. Used by the
server and, in process, by the trainer's client.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from model.errors import ModelError
from model.generate import Generation, GenRequest

_PATIENCE = 10
"""A batch is sent after this many windows even if requests keep coming."""


class BatcherClosedError(ModelError):
    """A request came after `close()`, or was still waiting when it was called."""


class GenerationEngine(Protocol):
    """What the batcher needs of `model.generate.Engine`."""

    def generate(self, requests: Sequence[GenRequest]) -> list[Generation]: ...

    def load(self, source: Any, version: int) -> None: ...


_Job = tuple[GenRequest, "Future[Generation]"]


class Batcher:
    """`submit` from any thread; answers come through futures. Also a context manager.

    A batch starts when `window_ms` have passed without a new request, or at `max_batch`.
    """

    def __init__(self, engine: GenerationEngine, window_ms: float = 3, max_batch: int = 64) -> None:
        self._engine = engine
        self._window_s = window_ms / 1000
        self._max_batch = max_batch
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._runner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        self._lock = threading.Lock()
        self._closed = False
        self._collector = threading.Thread(target=self._collect, name="batcher", daemon=True)
        self._collector.start()

    def submit(self, request: GenRequest) -> Future[Generation]:
        """The future generation; cancelling it works until its batch starts."""
        future: Future[Generation] = Future()
        with self._lock:
            if self._closed:
                raise BatcherClosedError("the batcher is closed; no further requests are taken")
            self._jobs.put((request, future))
        return future

    def load(self, source: Any, version: int, *, timeout_s: float = 600) -> None:
        """Gives the engine new weights between two batches and waits until they are in."""
        self._runner.submit(self._engine.load, source, version).result(timeout_s)

    def close(self, timeout_s: float = 5) -> bool:
        """Takes no more requests and fails those that wait. False if a batch still runs."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._collector.join(timeout_s)
        self._runner.shutdown(wait=False, cancel_futures=True)
        return not self._collector.is_alive()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs = [job for job in self._gather(first) if job[1].set_running_or_notify_cancel()]
            if jobs and not self._closed:
                self._run(jobs)
            else:
                _fail(jobs, BatcherClosedError("the server is shutting down"))
        while not self._jobs.empty():
            waiting = self._jobs.get_nowait()
            if waiting is not None and waiting[1].set_running_or_notify_cancel():
                _fail([waiting], BatcherClosedError("the server is shutting down"))

    def _gather(self, first: _Job) -> list[_Job]:
        jobs = [first]
        deadline = time.monotonic() + _PATIENCE * self._window_s
        while len(jobs) < self._max_batch:
            wait_s = min(self._window_s, deadline - time.monotonic())
            try:
                job = self._jobs.get(timeout=wait_s) if wait_s > 0 else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            jobs.append(job)
        return jobs

    def _run(self, jobs: Sequence[_Job]) -> None:
        outcome = self._runner.submit(self._engine.generate, [request for request, _ in jobs])
        error = outcome.exception()
        if error is not None:
            _fail(jobs, error)
            return
        for (_, future), generation in zip(jobs, outcome.result(), strict=True):
            future.set_result(generation)


def _fail(jobs: Sequence[_Job], error: BaseException) -> None:
    for _, future in jobs:
        future.set_exception(error)

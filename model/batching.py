"""One thread that keeps a batch running, and a bounded queue in front of it.

`submit` from any thread; answers come through futures, and token by token to a listener. Between
two steps requests join as far as there is room, and those that were cancelled leave.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

from model.errors import ModelError
from model.generate import Generation, GenRequest, Piece, Row
from model.running import Runner

Listener = Callable[[Piece], None]
"""Gets the new tokens after each step, in the batcher's thread: be quick, and raise nothing."""


class BatcherClosedError(ModelError):
    """A request came after `close()`, or was not answered when it was called."""


class QueueFullError(ModelError):
    """More requests than may run and wait."""


@dataclass(eq=False)
class _Job:
    request: GenRequest
    future: Future[Generation]
    listener: Listener | None
    told: int = 0  # tokens that the listener has


@dataclass(frozen=True)
class _Reload:
    source: Any
    version: int
    done: Future[None]


class Batcher:
    """A context manager. At most `max_batch` requests run and `max_queue` more wait.

    Cancelling a request's future takes it out of the queue, or of the running batch. With `start`
    off there is no thread, and the owner calls `turn` (tests do).
    """

    def __init__(
        self, runner: Runner, *, max_batch: int = 64, max_queue: int = 512, start: bool = True
    ) -> None:
        self._runner = runner
        self._max_batch, self._max_queue = max_batch, max_queue
        self._waiting: deque[_Job] = deque()
        self._running: dict[Row, _Job] = {}
        self._reloads: deque[_Reload] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        if start:
            self._thread.start()

    @property
    def counts(self) -> tuple[int, int]:
        """How many requests run and how many wait."""
        with self._changed:
            waiting = sum(not job.future.cancelled() for job in self._waiting)
            return len(self._running), waiting

    @property
    def limit(self) -> int:
        """The most requests that may run and wait together."""
        return self._max_batch + self._max_queue

    def check_room(self, count: int = 1) -> None:
        """Raise QueueFullError where `submit` would."""
        with self._changed:
            self._check_room(count)

    def submit(
        self, requests: Sequence[GenRequest], listeners: Sequence[Listener] | None = None
    ) -> list[Future[Generation]]:
        """Futures of the generations: of all requests, or of none.

        Raises ModelError for a request that cannot be served, QueueFullError and
        BatcherClosedError.
        """
        for request in requests:
            self._runner.check(request)
        ears: Sequence[Listener | None] = listeners or [None] * len(requests)
        jobs = [_Job(r, Future(), ear) for r, ear in zip(requests, ears, strict=True)]
        with self._changed:
            if self._closed:
                raise BatcherClosedError("the server is shutting down; no requests are taken")
            self._check_room(len(jobs))
            self._waiting.extend(jobs)
            self._changed.notify()
        return [job.future for job in jobs]

    def load(self, source: Any, version: int, *, timeout_s: float = 600) -> None:
        """New weights (see `Engine.load`), once all that runs has ended; what waits gets them."""
        reload = _Reload(source, version, Future())
        with self._changed:
            if self._closed:
                raise BatcherClosedError("the server is shutting down; no weights are taken")
            self._reloads.append(reload)
            self._changed.notify()
        reload.done.result(timeout_s)

    def close(self, timeout_s: float = 5) -> bool:
        """Take no more requests and fail those without an answer. False if a step still runs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is None:
            self._end()
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def turn(self) -> None:
        """One step: who was cancelled leaves, who waits joins, every row gets a token, and whoever
        has ended is told. Whatever goes wrong is told to all that run."""
        try:
            self._let_go()
            self._reload()
            self._let_in()
            ended = self._runner.step()
        except Exception as error:  # noqa: BLE001 - whatever it was, its waiters are told
            self._fail(error)
        else:
            self._tell(ended)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_room(self, count: int) -> None:
        if len(self._running) + len(self._waiting) + count > self.limit:
            self._forget_cancelled()
        if len(self._running) + len(self._waiting) + count > self.limit:
            raise QueueFullError(
                f"{len(self._running)} requests run and {len(self._waiting)} wait; at most "
                f"{self._max_batch} may run and {self._max_queue} wait: try again later"
            )

    def _forget_cancelled(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.future.cancelled())

    def _work(self) -> None:
        while self._sleep_until_needed():
            self.turn()
        self._end()

    def _end(self) -> None:
        """Nobody is left without an answer."""
        error = BatcherClosedError("the server is shutting down")
        self._fail(error)
        with self._changed:
            jobs, self._waiting = list(self._waiting), deque()
            reloads, self._reloads = list(self._reloads), deque()
        futures: list[Future[Any]] = [job.future for job in jobs]
        futures += [reload.done for reload in reloads]
        for future in futures:
            _fail(future, error)

    def _sleep_until_needed(self) -> bool:
        with self._changed:
            while not (self._closed or self._waiting or self._running or self._reloads):
                self._changed.wait()
            return not self._closed

    def _let_go(self) -> None:
        gone = [row for row, job in self._running.items() if job.future.cancelled()]
        self._runner.drop(gone)
        with self._changed:
            for row in gone:
                del self._running[row]

    def _reload(self) -> None:
        with self._changed:
            reload = self._reloads.popleft() if self._reloads and not self._running else None
        if reload is None:
            return
        try:
            self._runner.load(reload.source, reload.version)
        except Exception as error:  # noqa: BLE001 - raised again where `load` was called
            reload.done.set_exception(error)
        else:
            reload.done.set_result(None)

    def _let_in(self) -> None:
        """Those who wait join in their order, unless new weights wait for the batch to empty."""
        free = self._max_batch - len(self._running)
        if free < 1:
            return
        with self._changed:
            self._forget_cancelled()
            ahead = [job.request for job in islice(self._waiting, free)]
            room = 0 if self._reloads else self._runner.room(ahead)
            joining = [self._waiting.popleft() for _ in range(room)]
        # They are told of an error like those that run, so they count as running from here on.
        rows = [Row(job.request) for job in joining]
        with self._changed:
            self._running |= zip(rows, joining, strict=True)
        self._runner.join(rows)

    def _tell(self, ended: Sequence[Row]) -> None:
        for row, job in self._running.items():
            if job.listener is not None and len(row.ids) > job.told:
                job.listener(row.since(job.told))
                job.told = len(row.ids)
        with self._changed:
            jobs = [self._running.pop(row) for row in ended]
        for row, job in zip(ended, jobs, strict=True):
            if not job.future.set_running_or_notify_cancel():
                continue
            if row.error is not None:
                job.future.set_exception(row.error)
            else:
                job.future.set_result(row.result(self._runner.version))

    def _fail(self, error: Exception) -> None:
        """All that runs ends with this error."""
        self._runner.clear()
        with self._changed:
            jobs = list(self._running.values())
            self._running.clear()
        for job in jobs:
            _fail(job.future, error)


def _fail(future: Future[Any], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)

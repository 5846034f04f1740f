"""One thread that keeps a batch running, and a bounded queue in front of it.

`submit` from any thread; answers come through futures, and token by token to a listener. Between
two steps requests join as far as there is room, and those that were cancelled leave. `pause` holds
all that, in one of three ways; requests that come meanwhile wait in the queue.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from model.errors import ModelError
from model.generate import Generation, GenRequest, Piece, Row
from model.running import Runner

PauseMode = Literal["wait", "keep", "abort"]
"""What becomes of requests that run: they run to their end, stand still, or end as they are (then
those that wait do so too). Nobody joins in any of them."""

Listener = Callable[[Piece], None]
"""Gets the new tokens after each step, in the batcher's thread: be quick, and raise nothing."""


class BatcherClosedError(ModelError):
    """A request came after `close()`, or was not answered when it was called."""


class QueueFullError(ModelError):
    """More requests than may run and wait."""


class ResumedError(ModelError):
    """`resume` was called before a pause was complete."""


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
    done: Future[float]


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
        self._heard: dict[Row, _Job] = {}  # those of them with a listener
        self._left = False  # somebody was cancelled
        self._reloads: deque[_Reload] = deque()
        self._mode: PauseMode | None = None
        self._abort = False  # those that run and wait now are still to be ended
        self._pauses: list[Future[None]] = []  # whoever waits for a pause to be complete
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
        for job in jobs:
            job.future.add_done_callback(self._notice)
        return [job.future for job in jobs]

    @property
    def version(self) -> int:
        """Of the weights."""
        return self._runner.version

    @property
    def paused(self) -> PauseMode | None:
        """The mode of the pause that holds, or is still to be complete."""
        with self._changed:
            return self._mode

    def pause(self, mode: PauseMode) -> Future[None]:
        """Let nobody join, and treat those that run as `mode` says; done once nothing moves.

        A pause on top of another replaces it, and both are done at once. Raises BatcherClosedError;
        the future may raise it too, and ResumedError.
        """
        done: Future[None] = Future()
        with self._changed:
            if self._closed:
                raise BatcherClosedError("the server is shutting down")
            self._mode, self._abort = mode, self._abort or mode == "abort"
            self._pauses.append(done)
            self._changed.notify()
        return done

    def resume(self) -> None:
        """Go on after `pause`; without one, nothing happens."""
        with self._changed:
            self._mode, self._abort = None, False
            pauses, self._pauses = self._pauses, []
            self._changed.notify()
        for done in pauses:
            _fail(done, ResumedError("resumed before the pause was complete"))

    def load(self, source: Any, version: int) -> Future[float]:
        """New weights (see `RunningBatch.load`); the seconds that it took.

        They come once all that runs has ended, or at once while a pause keeps it; what waits gets
        them. Cancelling the future before takes the wish back. Raises BatcherClosedError.
        """
        reload = _Reload(source, version, Future())
        with self._changed:
            if self._closed:
                raise BatcherClosedError("the server is shutting down; no weights are taken")
            self._reloads.append(reload)
            self._changed.notify()
        reload.done.add_done_callback(self._notice)
        return reload.done

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
            mode = self._obey()
            self._reload(mode)
            if mode is None:
                self._let_in()
            ended = self._runner.step() if _steps(mode) else []
        except Exception as error:  # noqa: BLE001 - whatever it was, its waiters are told
            self._fail(error)
        else:
            self._tell(ended)
        self._settle()

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
            pauses, self._pauses = self._pauses, []
        futures: list[Future[Any]] = [*pauses, *(job.future for job in jobs)]
        futures += [reload.done for reload in reloads]
        for future in futures:
            _fail(future, error)

    def _sleep_until_needed(self) -> bool:
        with self._changed:
            while not (self._closed or self._is_needed()):
                self._changed.wait()
            return not self._closed

    def _is_needed(self) -> bool:
        if self._pauses or self._abort:
            return True
        if self._reloads and (not self._running or not _steps(self._mode)):
            return True
        if _steps(self._mode) and (self._running or (self._waiting and self._mode is None)):
            return True
        return self._left

    def _notice(self, future: Future[Any]) -> None:
        """A request that is cancelled leaves at the next turn, even while nothing moves."""
        if future.cancelled():
            with self._changed:
                self._left = True
                self._changed.notify()

    def _let_go(self) -> None:
        if not self._left:
            return
        self._left = False
        gone = [row for row, job in self._running.items() if job.future.cancelled()]
        self._runner.drop(gone)
        with self._changed:
            for row in gone:
                del self._running[row]
                self._heard.pop(row, None)

    def _obey(self) -> PauseMode | None:
        """The mode of this turn; where it has just become "abort", all that is there ends."""
        with self._changed:
            mode, abort, self._abort = self._mode, self._abort, False
            jobs = [*self._waiting] if abort else []
            if abort:
                self._waiting.clear()
        if abort:
            rows = list(self._running)
            self._runner.drop(rows)
            unread = {Row(job.request): job for job in jobs}
            with self._changed:
                self._running |= unread
            for row in (*rows, *unread):
                row.finish = "abort"
            self._tell([*rows, *unread])
        return mode

    def _settle(self) -> None:
        """Tell whoever waits for a pause that it is complete, if it is."""
        with self._changed:
            if self._mode is None or self._abort or (self._running and _steps(self._mode)):
                return
            pauses, self._pauses = self._pauses, []
        for done in pauses:
            if done.set_running_or_notify_cancel():
                done.set_result(None)

    def _reload(self, mode: PauseMode | None) -> None:
        with self._changed:
            while self._reloads and self._reloads[0].done.cancelled():
                self._reloads.popleft()
            ready = self._reloads and (not self._running or not _steps(mode))
            reload = self._reloads.popleft() if ready else None
        if reload is None or not reload.done.set_running_or_notify_cancel():
            return
        start = time.perf_counter()
        try:
            self._runner.load(reload.source, reload.version)
        except Exception as error:
            reload.done.set_exception(error)  # raised again where `load` was called
            if not isinstance(error, ModelError):  # half done, perhaps: nothing runs on with it
                raise
        else:
            reload.done.set_result(time.perf_counter() - start)

    def _let_in(self) -> None:
        """Those who wait join in their order, unless new weights wait for the batch to empty."""
        free = self._max_batch - len(self._running)
        if free < 1 or not self._waiting:
            return
        with self._changed:
            self._forget_cancelled()
            ahead = [job.request for job in islice(self._waiting, free)]
            room = 0 if self._reloads else self._runner.room(ahead)
            joining = [self._waiting.popleft() for _ in range(room)]
        # They are told of an error like those that run, so they count as running from here on.
        rows = {Row(job.request): job for job in joining}
        with self._changed:
            self._running |= rows
        self._heard |= {row: job for row, job in rows.items() if job.listener is not None}
        self._runner.join(list(rows))

    def _tell(self, ended: Sequence[Row]) -> None:
        for row, job in self._heard.items():
            if job.listener is not None and len(row.ids) > job.told:
                job.listener(row.since(job.told))
                job.told = len(row.ids)
        if not ended:
            return
        with self._changed:
            jobs = [self._running.pop(row) for row in ended]
        for row in ended:
            self._heard.pop(row, None)
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
        self._heard.clear()
        for job in jobs:
            _fail(job.future, error)


def _fail(future: Future[Any], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def _steps(mode: PauseMode | None) -> bool:
    """Whether those that run get tokens."""
    return mode in (None, "wait")

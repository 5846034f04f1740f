"""Calls into the pool: one thread, and one transaction for all that came meanwhile.

`append` returns when its record is committed, with the record's index. Indexes of an episode are
0, 1, 2 … in the order of commitment, without gaps: a call that could not be written takes none.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from rl.errors import InfraError
from rl.gateway.types import GatewayError
from rl.types import CallRecord

_MOST_AT_ONCE = 256
Item = tuple[CallRecord, "asyncio.Future[int]"]


class CallStore(Protocol):
    """What is used of `rl.pool.Pool`."""

    def add_calls(self, calls: Sequence[CallRecord]) -> None: ...

    def next_index(self, episode: str) -> int: ...


class Writer:
    """Owns the only thread that writes calls to `pool`. `close` commits what still waits."""

    def __init__(self, pool: CallStore) -> None:
        self._pool = pool
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._next: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="pool-writer", daemon=True)
        self._thread.start()
        self.batches = 0

    async def append(self, call: CallRecord) -> int:
        """The index of the committed record. GatewayError 503 when the pool cannot be written."""
        future: asyncio.Future[int] = self._loop.create_future()
        self._queue.put((call, future))
        return await future

    def forget(self, episode: str) -> None:
        """No more calls of this episode will come."""
        self._next.pop(episode, None)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=60)

    # ---------------------------------------------------------- the thread

    def _run(self) -> None:
        going = True
        while going:
            batch: list[Item] = []
            item = self._queue.get()
            while item is not None:
                batch.append(item)
                if self._queue.empty() or len(batch) == _MOST_AT_ONCE:
                    break
                item = self._queue.get()
            going = item is not None
            if batch:
                self.batches += 1
                self._tell(self._write(batch))

    def _write(self, batch: Sequence[Item]) -> list[tuple[asyncio.Future[int], int | Exception]]:
        ahead: dict[str, int] = {}
        calls: list[CallRecord] = []
        try:
            for call, _ in batch:
                name = call.episode
                index = ahead.get(name, self._next.get(name, -1))
                if index < 0:
                    index = self._pool.next_index(name)
                ahead[name] = index + 1
                calls.append(replace(call, index=index))
            self._pool.add_calls(calls)
        except (InfraError, OSError, ValueError) as error:
            for call, _ in batch:
                self._next.pop(call.episode, None)  # another writer? look again
            if len(batch) > 1:  # one bad record must not fail its neighbours
                return [result for item in batch for result in self._write([item])]
            return [(batch[0][1], error)]
        self._next |= ahead
        return [(future, call.index) for (_, future), call in zip(batch, calls, strict=True)]

    def _tell(self, results: Sequence[tuple[asyncio.Future[int], int | Exception]]) -> None:
        try:
            self._loop.call_soon_threadsafe(_settle, results)
        except RuntimeError:  # the loop has ended: nobody listens
            return


def _settle(results: Sequence[tuple[asyncio.Future[int], int | Exception]]) -> None:
    for future, result in results:
        if future.done():
            continue
        if isinstance(result, Exception):
            fault = GatewayError(503, f"the call was not recorded: {result}", "not_recorded")
            future.set_exception(fault)
        else:
            future.set_result(result)

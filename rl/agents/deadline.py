"""A wall-clock limit for code that was not written to keep one.

Python cannot end a thread, so a call that never looks at a clock is left behind (as a daemon
thread) when its time is over: the gateway refuses whatever it still asks. An agent that has to be
ended for certain is a process of its own (`rl.agents.command`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from rl.forge.gateway_client import DeadlineError

T = TypeVar("T")


class Deadline:
    """`seconds` from now, on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, 0 at least."""
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """DeadlineError when the time is over."""
        if self.left == 0.0:
            raise DeadlineError(f"no end after {self.seconds:g} s")


class _Call(threading.Thread, Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(daemon=True, name="agent")
        self._call = call
        self.found: list[T] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.found.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self.error = error


def within(deadline: Deadline, call: Callable[[], T]) -> T:
    """What `call` returns or raises; DeadlineError if it has not ended when the time is over."""
    thread = _Call(call)
    thread.start()
    thread.join(deadline.left)
    if thread.is_alive():
        raise DeadlineError(f"no end after {deadline.seconds:g} s")
    if thread.error is not None:
        raise thread.error
    return thread.found[0]

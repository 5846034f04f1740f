"""The child's end of the pipes: messages on standard input and output, all other output on stderr.

When standard input ends, the supervisor is gone and the process ends at once. No torch here.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator

from rl.errors import exit_code_of
from rl.forge.messages import Failed, Message, decode, encode


class Pipe:
    """Made once, before anything prints."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.dup(1)
        os.dup2(2, 1)
        self._in = os.fdopen(os.dup(0), "rb")
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """One line. The process ends if nobody reads any more."""
        line = encode(message)
        try:
            with self._lock:
                while line:
                    line = line[os.write(self._out, line) :]
        except OSError:
            os._exit(1)

    def __iter__(self) -> Iterator[Message]:
        """Messages as they come, until the supervisor ends."""
        for line in self._in:
            if line.endswith(b"\n"):
                yield decode(line)

    def leave_at_end(self, handle: Callable[[Message], None]) -> None:
        """Read in this thread, and end the process when there is nothing more to read."""
        for message in self:
            handle(message)
        os._exit(0)

    def fail(self, error: BaseException, row: dict[str, object] | None = None) -> int:
        """Tell of an error that a restart would not mend; returns the exit code."""
        code = exit_code_of(error)
        self.send(Failed(code, " ".join(str(error).split()), row))
        return code

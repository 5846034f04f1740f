"""`python -m rl.forge.scorer RUN_DIR`: the scorer, started by the supervisor.

It holds the run's only sandbox pool, of `sandbox.workers`, and executes the scripts of all workers:
equal ones once, whoever sends them. It keeps nothing that counts. Killed at any moment, it costs
the scripts that were running; the workers send them to the next one. No torch here.
"""

from __future__ import annotations

import hmac
import json
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from agent_tools.sandbox.types import ScriptPool, ScriptResult
from rl.config import load_config
from rl.errors import InfraError, UserError
from rl.forge.messages import Ping, Pong, Ready
from rl.forge.pipe import Pipe
from rl.forge.places import Places
from rl.forge.scorer_client import (
    SCORER,
    Json,
    job_from_json,
    line_of,
    result_to_json,
    split_address,
)
from rl.scripts import own_pool


class Scorer:
    """Answers any number of connections from one pool. A thread each reads, another writes, so that
    a worker that does not read holds up nobody."""

    def __init__(self, pool: ScriptPool, address: str) -> None:
        """Listens from now on. OSError where the name is taken."""
        self._pool = pool
        name, self._key = split_address(address)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(name)
        self._listener.listen()
        self._over = False
        self.jobs = 0

    def serve(self) -> None:
        """Until `close`."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Nothing is answered any more: what the pool's end does to a script is not its result."""
        self._over = True
        self._listener.close()

    def _meet(self, connection: socket.socket) -> None:
        """One worker, until it goes or says something that it should not."""
        out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with connection, connection.makefile("rb") as stream:
            try:
                told = json.loads(stream.readline(256))["key"]
                if not hmac.compare_digest(str(told).encode(), self._key.encode()):
                    return
                threading.Thread(target=_write, args=(connection, out), daemon=True).start()
                out.put(line_of({"missing": self._pool.missing}))
                for line in stream:
                    if line.endswith(b"\n"):
                        self._take(json.loads(line), out)
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"a connection ends: {error!r}", file=sys.stderr, flush=True)
            finally:
                out.put(None)

    def _take(self, asked: Json, out: queue.SimpleQueue[bytes | None]) -> None:
        try:
            future = self._pool.submit(job_from_json(asked["job"]))
        except UserError as error:
            if not self._over:
                out.put(line_of(_refusal(asked["id"], error)))
            return
        self.jobs += 1
        future.add_done_callback(partial(self._answer, asked["id"], out))

    def _answer(
        self, number: int, out: queue.SimpleQueue[bytes | None], future: Future[ScriptResult]
    ) -> None:
        if self._over or future.cancelled():
            return  # the next scorer gets the job
        error = future.exception()
        if error is not None:
            out.put(line_of(_refusal(number, error)))
        else:
            out.put(line_of({"id": number, "result": result_to_json(future.result())}))


def _refusal(number: int, error: BaseException) -> Json:
    user = isinstance(error, UserError)
    return {"id": number, "error": str(error) if user else repr(error), "user": user}


def _write(connection: socket.socket, out: queue.SimpleQueue[bytes | None]) -> None:
    try:
        while (line := out.get()) is not None:
            connection.sendall(line)
    except OSError:
        return  # the worker went away


def main(argv: Sequence[str]) -> int:
    """Runs until its standard input ends, or SIGTERM."""
    pipe = Pipe()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    address = os.environ.pop(SCORER)  # what scripts and their sandbox inherit does not have it
    try:
        config = load_config(Places(Path(argv[0])).config)
        with own_pool(config) as pool:
            scorer = Scorer(pool, address)
            threading.Thread(target=scorer.serve, name="listener", daemon=True).start()
            try:
                pipe.send(Ready())
                for message in pipe:
                    if isinstance(message, Ping):
                        pipe.send(Pong(message.number, scorer.jobs, pool.hits))
            finally:
                scorer.close()
    except (UserError, InfraError, OSError) as error:
        return pipe.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Which of a reply's tokens came from which weights, exactly, inside vLLM's server.

The engine is another process. What it sends reaches this one through a queue, in order: outputs,
and behind them the answer that new weights are in (an engine that is paused sends nothing more).
When that answer is here, outputs from before may still wait in the queue. So a load puts a *fence*
behind them: when the task that counts tokens reaches it, each running reply's count is the number
of tokens that came from the weights before. Releases that tell versions (0.32) tell them on one
route only; this works alike in 0.26 and 0.32.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final

Span = tuple[int, int, int]
"""First token, one behind the last, version."""

_PROMPT_NUMBER: Final = re.compile(r"-(\d+)$")


class _Reply:
    """One reply that vLLM is making. `starts`: first token and version of each span."""

    def __init__(self, state: Any, version: int) -> None:
        self._state = state
        self.starts = [(0, version)]

    def count(self) -> int:
        """Tokens that have come so far, the one that ends the reply included."""
        return int(self._state.detokenizer.num_output_tokens())

    def spans(self) -> list[Span]:
        ends = [first for first, _ in self.starts[1:]] + [self.count()]
        spans = zip(self.starts, ends, strict=True)
        return [(first, end, of) for (first, of), end in spans if end > first]


class Replies:
    """The replies to one request, known by what vLLM calls them. `texts`: a request of
    /v1/completions, which may have several prompts of `n` replies each."""

    def __init__(self, n: int, *, texts: bool) -> None:
        self._n, self._texts = n, texts
        self._replies: dict[int, _Reply] = {}

    def add(self, request_id: str, index: int, reply: _Reply) -> None:
        """`request_id` is the outer one: it ends with the number of its prompt."""
        number = _PROMPT_NUMBER.search(request_id) if self._texts else None
        self._replies[index + self._n * (int(number[1]) if number else 0)] = reply

    def spans(self, choice: int) -> list[Span] | None:
        """Spans over all tokens of a choice so far; None where it was not followed."""
        reply = self._replies.get(choice)
        return None if reply is None else reply.spans()


_asking: ContextVar[Replies | None] = ContextVar("asking", default=None)


class Spans:
    """Follows every reply of one server. `version` is that of the weights of what comes next."""

    def __init__(self, version: int) -> None:
        self.version = version
        self._engine: Any = None
        self._running: weakref.WeakSet[_Reply] = weakref.WeakSet()

    def attach(self, engine: Any) -> None:
        """Sees vLLM's requests from now on. Does nothing a second time."""
        if self._engine is not None or engine is None:
            return
        self._engine = engine
        try:
            processor = engine.output_processor
            add, states = processor.add_request, processor.request_states
            _ = engine.output_handler, engine.engine_core.outputs_queue
        except AttributeError as error:
            print(f"selfevo: replies get one version, no spans: {error}", file=sys.stderr)
            self._engine = False
            return

        @functools.wraps(add)
        def noting(
            request: Any, prompt: Any, parent: Any = None, index: int = 0, *more: Any
        ) -> None:
            add(request, prompt, parent, index, *more)
            if (replies := _asking.get()) is not None:
                reply = _Reply(states[request.request_id], self.version)
                self._running.add(reply)
                replies.add(request.external_req_id, index, reply)

        processor.add_request = noting

    @contextlib.contextmanager
    def following(self, n: int, *, texts: bool) -> Iterator[Replies]:
        """What vLLM is asked for inside the block, in this task or in one that it starts."""
        replies = Replies(n, texts=texts)
        token = _asking.set(replies)
        try:
            yield replies
        finally:
            _asking.reset(token)

    async def turn(self, version: int) -> None:
        """New weights are in and nothing runs: what comes from now on is theirs."""
        handler = self._engine.output_handler if self._engine else None
        if handler is None or handler.done():
            self._turned(version)
            return
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def at_fence() -> None:
            self._turned(version)
            reached.set_result(None)

        self._engine.engine_core.outputs_queue.put_nowait(_Fence(at_fence))
        await asyncio.wait({reached, handler}, return_when=asyncio.FIRST_COMPLETED)

    def _turned(self, version: int) -> None:
        for reply in self._running if version != self.version else ():
            reply.starts.append((reply.count(), version))
        self.version = version


class _Fence:
    """Among the engine's outputs, one without any: says when it is read."""

    engine_index, scheduler_stats, timestamp, weight_version = 0, None, 0.0, None

    def __init__(self, reached: Callable[[], None]) -> None:
        self._reached: Callable[[], None] | None = reached

    @property
    def outputs(self) -> list[Any]:
        if (reached := self._reached) is not None:
            self._reached = None
            reached()
        return []

"""What passes between dialects, core and engine: one call as asked, as drawn, as answered."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from model.chat_format import ParsedReply

Json = dict[str, Any]


class GatewayError(Exception):
    """A call that gets no answer. `code` is a word for programs; each dialect has its own shape."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


def refused(param: str, reason: str) -> GatewayError:
    """A request that cannot be understood or is not allowed."""
    return GatewayError(400, f"{param}: {reason}", "invalid_value", param)


@dataclass(frozen=True)
class Ask:
    """One call as any dialect asks for it.

    `messages` and `tools` have the form of OpenAI's chat. `text` (a raw completion) replaces both:
    text, or ids. `wishes` are the sampling settings that were named, by OpenAI's names. `body` is
    the request itself, for what only its dialect reads.
    """

    model: str
    body: Json
    messages: Sequence[Json] = ()
    tools: Sequence[Json] | None = None
    text: str | list[int] | None = None
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    wishes: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False


@dataclass(frozen=True)
class Drawn:
    """What an engine sampled: `ids` with one log-prob each (nan where it gave no number), spans
    `(begin, end, version)`, why it ended (`stop`, `length` or `repetition`), prompt tokens from its
    cache."""

    ids: list[int]
    logprobs: list[float]
    versions: tuple[tuple[int, int, int], ...]
    finish: str
    constrained: bool = False
    cached: int = 0
    routed: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Answer:
    """A recorded call: what every dialect writes its answer from. `index` is its record's;
    `stopped_by` the stop text that ended it."""

    id: str
    created: int
    index: int
    prompt: array[int]
    drawn: Drawn
    text: str
    reply: ParsedReply
    call_error: str | None = None
    repaired: bool = False
    stopped_by: str = ""

    @property
    def finish(self) -> str:
        """`stop`, `length` or `tool_calls`: the words that clients know."""
        return "tool_calls" if self.reply.tool_calls else self.cut

    @property
    def cut(self) -> str:
        """`stop` or `length`."""
        return "length" if self.drawn.finish == "repetition" else self.drawn.finish


class Dialect(Protocol):
    """One API: how a call is asked, answered and refused."""

    def read(self, body: Json, earlier: Mapping[str, Sequence[Json]]) -> Ask:
        """`earlier`: conversations that the episode may go on from by a name."""
        ...

    def whole(self, ask: Ask, answer: Answer) -> Json: ...

    def events(self, ask: Ask, answer: Answer) -> Iterable[bytes]: ...

    def error(self, error: GatewayError) -> Json: ...

    def late_error(self, error: GatewayError) -> bytes: ...

    ping: bytes

"""Episodes at the gateway: opened before an agent starts, limited while it runs, then closed."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import Counter
from dataclasses import dataclass, field

from rl.gateway.history import History
from rl.gateway.settings import EpisodeSampling, Limits, Repeat
from rl.gateway.types import Answer, GatewayError, Json


class Flight:
    """A call that runs: its result to come, and how many wait for it."""

    task: asyncio.Task[Answer]

    def __init__(self, result: asyncio.Future[Answer]) -> None:
        self.result = result
        self.listeners = 0
        self.committing = False  # being written: it can no longer be taken back
        self.heard = asyncio.Event()

    def fail(self, error: GatewayError) -> None:
        """The listeners get an error."""
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # seen, though nobody may listen

    def end(self, error: GatewayError) -> None:
        """Cancels the call, unless it is being written or has ended."""
        if not self.committing and not self.task.done():
            self.fail(error)
            self.task.cancel()

    def end_unheard(self, error: GatewayError) -> None:
        """Cancels the call if nobody has come back to it."""
        if not self.listeners:
            self.end(error)


@dataclass
class Episode:
    """One attempt of an agent. `begun` counts calls let in: call k draws with seed + k."""

    id: str
    group: int
    sampling: EpisodeSampling
    limits: Limits
    repeat: Repeat
    history: History
    secret: str = field(default="", repr=False)
    opened: float = field(default_factory=time.monotonic)
    closed: bool = False
    begun: int = 0
    recorded: int = 0
    tokens: int = 0
    flights: dict[bytes, Flight] = field(default_factory=dict)
    answers: dict[bytes, Answer] = field(default_factory=dict)
    responses: dict[str, list[Json]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    seen: Counter[bytes] = field(default_factory=Counter)

    def key(self, digest: bytes, retry: bool) -> bytes:
        """What a request is known by. With `repeat="sample"` an equal body is a call of its own,
        unless its client says that it tries again."""
        if self.repeat == "join":
            return digest
        self.seen[digest] += not (retry and self.seen[digest])
        return digest + str(self.seen[digest]).encode()

    @property
    def deadline(self) -> float:
        return self.opened + self.limits.deadline_s

    def check_secret(self, key: str) -> None:
        """GatewayError for a caller that does not know the episode's key, if it has one."""
        if self.secret and not hmac.compare_digest(key.encode(), self.secret.encode()):
            raise GatewayError(401, f"episode {self.id} wants its own API key", "wrong_key")

    def check_open(self) -> None:
        """GatewayError where no call may begin or go on."""
        if self.closed:
            raise GatewayError(410, f"episode {self.id} is closed", "episode_closed")
        if time.monotonic() >= self.deadline:
            raise GatewayError(
                403,
                f"episode {self.id} is over: its {self.limits.deadline_s:g} s have passed",
                "episode_deadline",
            )

    def check_limits(self) -> None:
        """GatewayError where one more call would pass a limit."""
        self.check_open()
        if self.recorded + len(self.flights) >= self.limits.calls:
            raise GatewayError(
                403, f"episode {self.id} has had its {self.limits.calls} calls", "episode_calls"
            )
        if self.tokens >= self.limits.tokens:
            raise GatewayError(
                403,
                f"episode {self.id} has sampled its {self.limits.tokens} tokens",
                "episode_tokens",
            )

    def summary(self) -> Json:
        return {
            "episode": self.id,
            "group": self.group,
            "calls": self.recorded,
            "tokens": self.tokens,
            "counts": dict(self.counts),
        }

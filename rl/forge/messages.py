"""What goes through the pipes between the supervisor and workers, scorer and trainer: JSON lines.

One message a line, `{"<kind>": {fields}}`, for instance
`{"run": {"group": 3, "member": 0, "attempt": 1, …}}`. A line that was cut off by a kill is no
message. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rl.types import EpisodeStatus


class MessageError(Exception):
    """A line that is no message: the writer is broken, or something else prints there."""


@dataclass(frozen=True)
class Run:
    """To a worker: run one attempt. `seed` is the same for all attempts of a member."""

    group: int
    member: int
    attempt: int
    task: int
    seed: int
    gateway: str

    @property
    def episode(self) -> str:
        return episode_name(self.group, self.member, self.attempt)


@dataclass(frozen=True)
class Ended:
    """From a worker: an attempt is over. `status` None: it died, nothing of it counts."""

    group: int
    member: int
    attempt: int
    status: EpisodeStatus | None
    reason: str = ""


@dataclass(frozen=True)
class Ready:
    """From a worker, once: ids and domains of its tasks, in order, and whether they need a scorer.
    From the trainer, once: where its checkpoint stands; `row` is that step's, and `device` where it
    computes. From the scorer, once its sandbox runs."""

    tasks: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    scripts: bool = False
    step: int = 0
    version: int = 0
    weights: str = ""
    row: dict[str, Any] | None = None
    device: str = ""


@dataclass(frozen=True)
class Retire:
    """From a worker: give it nothing more; it ends when its other episodes have."""

    reason: str


@dataclass(frozen=True)
class Step:
    """To the trainer: step `step` over these groups (the episode of each member that counts).

    `frontier` is what the window has taken up to and with this step, `dropped` the groups that
    were taken for it but not trained on, `last` that no step follows, `metrics` what the supervisor
    measured, for the row.
    """

    step: int
    groups: tuple[tuple[str, ...], ...]
    dropped: tuple[tuple[str, ...], ...]
    frontier: dict[str, Any]
    tasks: tuple[str, ...]
    domains: tuple[str, ...]
    last: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stepped:
    """From the trainer: the step is done, and durable where `saved`. `weights` is the folder that
    an engine can load."""

    step: int
    version: int
    weights: str
    row: dict[str, Any]
    saved: bool


@dataclass(frozen=True)
class Push:
    """To the trainer: put the weights into the engine at `url` through the card's memory."""

    url: str
    version: int
    engine: int
    """How often it was started: another one has to be made ready first."""


@dataclass(frozen=True)
class Pushed:
    """From the trainer: the engine has this version, or why it has not."""

    version: int
    error: str = ""


@dataclass(frozen=True)
class Ping:
    """To the scorer: a sign of life is wanted."""

    number: int


@dataclass(frozen=True)
class Pong:
    """From the scorer: jobs since its start, and how many of them equal ones had answered."""

    number: int
    jobs: int
    hits: int


@dataclass(frozen=True)
class Failed:
    """From any of them, last: an error that a restart would not mend, with its exit code."""

    code: int
    message: str
    row: dict[str, Any] | None = None


Message = Run | Ended | Ready | Retire | Step | Stepped | Push | Pushed | Ping | Pong | Failed
_KINDS: dict[str, type[Message]] = {
    kind.__name__.lower(): kind
    for kind in (Run, Ended, Ready, Retire, Step, Stepped, Push, Pushed, Ping, Pong, Failed)
}


def encode(message: Message) -> bytes:
    """One line. Non-finite numbers of a row are written as Python's JSON does."""
    return json.dumps({type(message).__name__.lower(): asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Inverse of `encode`. MessageError for anything else."""
    try:
        ((name, values),) = json.loads(line).items()
        kind = _KINDS[name]
        return kind(**{f.name: _tuples(values[f.name]) for f in fields(kind)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MessageError(f"{line[:200]!r} is no message ({error})") from error


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples; what is inside an object stays as it is."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def episode_name(group: int, member: int, attempt: int) -> str:
    """The name of an attempt, in gateway and pool: `g3-0.1`."""
    return f"g{group}-{member}.{attempt}"


def parse_episode(name: str) -> tuple[int, int, int] | None:
    """(group, member, attempt), or None for a name that is none of ours."""
    head, dash, rest = name.partition("-")
    member, dot, attempt = rest.partition(".")
    numbers = (head.removeprefix("g"), member, attempt)
    if not (head.startswith("g") and dash and dot and all(n.isdigit() for n in numbers)):
        return None
    return int(numbers[0]), int(numbers[1]), int(numbers[2])


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's numbers as JSON knows them (numpy's and torch's scalars become Python's)."""
    return {k: v if isinstance(v, str | int) else float(v) for k, v in row.items()}

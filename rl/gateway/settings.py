"""How an episode is opened: its sampling, its limits, and what an equal request means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from rl.gateway.types import refused

OnConflict = Literal["refuse", "override"]
Repeat = Literal["join", "sample"]


@dataclass(frozen=True)
class EpisodeSampling:
    """`max_tokens` is a call's upper bound. `seed` None draws without one. `repetition` (n, p) ends
    a reply after n tokens in a row that were each likelier than p. Raises ValueError."""

    temperature: float = 1.0
    max_tokens: int = 1024
    seed: int | None = None
    on_conflict: OnConflict = "refuse"
    repetition: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        if not _number(self.temperature) or not 0 <= self.temperature <= 100:
            raise ValueError("temperature: expected a number from 0 to 100")
        _positive("max_tokens", self.max_tokens)
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise ValueError("seed: expected a whole number from 0 on")
        if self.repetition is not None:
            object.__setattr__(self, "repetition", _repetition(self.repetition))
        if self.on_conflict not in ("refuse", "override"):
            raise ValueError('on_conflict: use "refuse" or "override"')


@dataclass(frozen=True)
class Limits:
    """Calls that are recorded or run, sampled tokens, seconds from the opening. A call may sample
    what is left of `tokens`; calls that run at the same time may pass it by their own lengths.
    Raises ValueError."""

    calls: int = 1000
    tokens: int = 1_000_000
    deadline_s: float = 3600.0

    def __post_init__(self) -> None:
        _positive("calls", self.calls)
        _positive("tokens", self.tokens)
        if not _number(self.deadline_s) or self.deadline_s <= 0:
            raise ValueError("deadline_s: expected seconds above 0")


T = TypeVar("T", EpisodeSampling, Limits)


def filled(defaults: T, given: Any, where: str) -> T:
    """The defaults with what is given. GatewayError for an unknown name or a wrong value."""
    if given is None:
        return defaults
    if not isinstance(given, dict):
        raise refused(where, "expected an object")
    known = asdict(defaults)
    only(given, known, f"{where}.")
    try:
        return type(defaults)(**known | given)
    except ValueError as error:
        raise refused(where, str(error)) from error


def only(given: Mapping[str, Any], known: Iterable[str], where: str = "") -> None:
    """GatewayError for a name that is not known."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise refused(f"{where}{unknown[0]}", f"unknown; use {', '.join(sorted(known))}")


def _repetition(value: Any) -> tuple[int, float]:
    """A pair, also as JSON's list."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not _number(value[1]):
        raise ValueError("repetition: expected [tokens, probability]")
    _positive("repetition", value[0])
    if not 0 < value[1] < 1:
        raise ValueError("repetition: expected a probability between 0 and 1")
    return value[0], value[1]


def _positive(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a whole number from 1 on")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)

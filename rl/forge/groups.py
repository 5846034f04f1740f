"""Which attempt runs next, and which group is finished: the supervisor's state, without any I/O.

A *group* is one task with `size` members; it is what the window counts. A *member* gets attempts
until one of them has a terminal result: done, timeout, env_error or aborted. An attempt that died
(its worker, the gateway or the engine went away) is followed by the next one. A group is finished
when all its members are.

    member:  queued → running → ended            every ended group is finish()ed in the window,
                ↑        │                        taken, trained on or dropped, and released
                └─ died ─┘
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rl.forge.messages import episode_name, parse_episode
from rl.types import EpisodeStatus
from rl.window import Window

Key = tuple[int, int]
"""(group, member)."""


@dataclass(frozen=True)
class Known:
    """What a pool knows of members: the attempt with a result that still counts, and the number
    that the next attempt gets."""

    ended: Mapping[Key, tuple[int, EpisodeStatus]] = field(default_factory=dict)
    attempts: Mapping[Key, int] = field(default_factory=dict)


def known_members(
    episodes: Iterable[str], results: Iterable[tuple[str, EpisodeStatus, int]], version: int
) -> Known:
    """From the names of all episodes of a pool, and of those with a result (name, status, newest
    policy version among its calls).

    Results that a policy newer than `version` had a part in do not count: after a restart from an
    older checkpoint that policy does not exist (yet). Of several results the latest attempt counts.
    """
    attempts: dict[Key, int] = {}
    for name in episodes:
        if (parsed := parse_episode(name)) is not None:
            group, member, attempt = parsed
            key = (group, member)
            attempts[key] = max(attempts.get(key, 0), attempt + 1)
    ended: dict[Key, tuple[int, EpisodeStatus]] = {}
    for name, status, newest in results:
        if (parsed := parse_episode(name)) is not None and newest <= version:
            group, member, attempt = parsed
            if attempt >= ended.get((group, member), (-1, status))[0]:
                ended[group, member] = (attempt, status)
    return Known(ended, attempts)


@dataclass(frozen=True)
class Group:
    """A finished group: the episode of each member that counts, and how it ended."""

    index: int
    episodes: tuple[str, ...]
    statuses: tuple[EpisodeStatus, ...]

    @property
    def failed(self) -> bool:
        """No member was judged."""
        return not any(status in ("done", "timeout") for status in self.statuses)


@dataclass
class _Member:
    attempt: int
    charged: int = 0
    status: EpisodeStatus | None = None


class Groups:
    """Members in flight over a window of groups.

    total: groups of the whole run. attempts: deaths that are a member's own doing before it is
    given up.
    """

    def __init__(
        self,
        window: Window[Group],
        size: int,
        total: int,
        attempts: int,
        known: Known = Known(),
    ) -> None:
        self.window = window
        self._total = total
        self._size, self._attempts, self._known = size, attempts, known
        self._members: dict[int, list[_Member]] = {}
        self._queue: list[Key] = []  # a heap: the oldest group first, new attempts too

    @property
    def exhausted(self) -> bool:
        """All groups of the run have been taken."""
        return self.window.head >= self._total

    def admit(self) -> None:
        """New groups while there are slots and groups left."""
        while self.window.upcoming < self._total and (index := self.window.admit()) is not None:
            members = []
            for m in range(self._size):
                attempt, status = self._known.ended.get((index, m), (None, None))
                if attempt is None:
                    attempt = self._known.attempts.get((index, m), 0)
                    heapq.heappush(self._queue, (index, m))
                members.append(_Member(attempt, status=status))
            self._members[index] = members
            self._settle(index)

    def next(self) -> tuple[int, int, int] | None:
        """(group, member, attempt) to run now, or None."""
        if not self._queue:
            return None
        group, member = heapq.heappop(self._queue)
        return group, member, self._members[group][member].attempt

    def ended(self, group: int, member: int, attempt: int, status: EpisodeStatus) -> None:
        """An attempt has its result. News of an attempt that is no longer the current one is
        ignored."""
        found = self._current(group, member, attempt)
        if found is not None:
            found.status = status
            self._settle(group)

    def died(self, group: int, member: int, attempt: int, *, charge: bool) -> bool:
        """An attempt came to nothing. True if that was its last one: the caller then records an
        `env_error` for it and calls `ended`. `charge`: not the fault of another process."""
        found = self._current(group, member, attempt)
        if found is None:
            return False
        found.charged += charge
        if found.charged >= self._attempts:
            return True
        found.attempt += 1
        heapq.heappush(self._queue, (group, member))
        return False

    def _current(self, group: int, member: int, attempt: int) -> _Member | None:
        members = self._members.get(group)
        if members is None or members[member].attempt != attempt:
            return None
        return members[member] if members[member].status is None else None

    def _settle(self, index: int) -> None:
        members = self._members[index]
        statuses = tuple(m.status for m in members if m.status is not None)
        if len(statuses) == len(members):
            names = tuple(episode_name(index, m, x.attempt) for m, x in enumerate(members))
            del self._members[index]
            self.window.finish(index, Group(index, names, statuses))

"""The windowed FIFO: which finished group the trainer may take next (M2 report §6.2.4, Fig. 5).

Groups are numbered in the order of their submission. Of the groups in flight the trainer may take
any that is finished among the W indices that begin at the *head*, the oldest group not yet taken.
What is finished beyond waits: the head moves only when it is taken itself. So nothing overtakes a
slow group by more than W − 1, and W chooses between strict order (W = 1) and greedy (W = N).

    N slots, each held from admission until `release`, that is until the optimiser step that used
    the group and the weight sync after it are done (or the group was dropped).
    At most N + W − 2 groups are taken before group j and after its admission; with P groups a step
    the policy that trains on it is at most ⌊(N + W − 2) / P⌋ versions newer than the one that
    began it. Proof, and the trace of Fig. 5: docs/windowed_fifo.md.

One thread at a time; `rl.forge.supervisor` is the caller.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")
Order = Literal["fifo", "windowed", "greedy"]
WINDOW_SHARE = 0.3
"""W / N where nothing else is asked for: the report's "in practice" value."""


def window_size(order: Order, slots: int, share: float = WINDOW_SHARE) -> int:
    """W for an order: 1, max(1, round(share · N)) or N."""
    if order == "fifo":
        return 1
    return slots if order == "greedy" else max(1, min(slots, round(share * slots)))


def lag_bound(slots: int, window: int, groups_a_step: int) -> int:
    """The most policy versions between a group's first token and the step that trains on it."""
    return (slots + window - 2) // groups_a_step


@dataclass(frozen=True)
class Frontier:
    """Where a window stands, as a checkpoint keeps it: every index below `head` and those in
    `taken` have been taken."""

    head: int = 0
    taken: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.head < 0 or any(index <= self.head for index in self.taken):
            raise ValueError(
                f"a frontier with head {self.head} and {list(self.taken)} taken; the head is the "
                "oldest group not yet taken, so those taken out of turn lie above it"
            )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"head": self.head, "taken": list(self.taken)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Frontier:
        """Inverse of `to_dict`."""
        return cls(int(values["head"]), tuple(map(int, values["taken"])))


class Window(Generic[T]):
    """`slots` is N, `window` is W (1 ≤ W ≤ N). `start` goes on from a checkpoint's frontier.

    A group is anything that ends. There is no clock here: a deadline that passes is a result like
    any other, and the caller's to `finish`. Wrong calls raise ValueError.
    """

    def __init__(self, slots: int, window: int, start: Frontier = Frontier()) -> None:
        if not 1 <= window <= slots:
            raise ValueError(f"a window of {window} over {slots} slots; 1 ≤ window ≤ slots")
        self.slots, self.window = slots, window
        self.head, self.next = start.head, start.head
        self._skip = set(start.taken)  # taken before the checkpoint: never admitted again
        self._done: dict[int, T] = {}
        self._order: list[int] = []  # the keys of `_done` as a heap
        self._running: set[int] = set()
        self._taken: set[int] = set(start.taken)  # at or above the head
        self._held = 0  # taken, but not yet released
        self._count = 0  # taken by this window
        self._admitted: dict[int, int] = {}  # `_count` then, of those not yet taken

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._running) + len(self._done) + self._held

    @property
    def overtaken(self) -> int:
        """Groups taken past the head: at most W − 1."""
        return len(self._taken)

    @property
    def head_age(self) -> int:
        """Groups taken since the head was admitted (0 if it is not yet): at most N + W − 2."""
        return self._count - self._admitted.get(self.head, self._count)

    @property
    def blocked_done(self) -> int:
        """Groups that are finished but beyond the window."""
        return sum(index >= self.head + self.window for index in self._done)

    @property
    def upcoming(self) -> int:
        """The index that `admit` gives next."""
        index = self.next
        while index in self._skip:
            index += 1
        return index

    @property
    def running(self) -> tuple[int, ...]:
        """Admitted and not finished, in order."""
        return tuple(sorted(self._running))

    def admit(self) -> int | None:
        """The index of a new group, or None while all slots are in use."""
        if self.active >= self.slots:
            return None
        while self.next in self._skip:
            self._skip.discard(self.next)
            self.next += 1
        index = self.next
        self.next += 1
        self._running.add(index)
        self._admitted[index] = self._count
        return index

    def finish(self, index: int, result: T) -> None:
        """A running group has ended, whichever way: a group past its deadline is finished too."""
        if index not in self._running:
            raise ValueError(f"group {index} is not running")
        self._running.discard(index)
        self._done[index] = result
        heapq.heappush(self._order, index)

    def take(self) -> tuple[int, T] | None:
        """The oldest finished group inside the window, or None. Its slot stays in use."""
        if not self._order or self._order[0] >= self.head + self.window:
            return None
        index = heapq.heappop(self._order)
        self._taken.add(index)
        self._held += 1
        self._count += 1
        del self._admitted[index]
        while self.head in self._taken:
            self._taken.discard(self.head)
            self.head += 1
        return index, self._done.pop(index)

    def release(self, count: int) -> None:
        """Free the slots of groups taken before: after the optimiser step and the weight sync, or
        at once for groups that are not trained on."""
        if not 0 <= count <= self._held:
            raise ValueError(f"{count} slots to release, {self._held} are held")
        self._held -= count

    def frontier(self) -> Frontier:
        """What has been taken. Groups that were admitted but not taken come again after a restart,
        in the order of their indices."""
        return Frontier(self.head, tuple(sorted(self._taken)))

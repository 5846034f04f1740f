"""Discrete-event simulation of a run that a `Window` paces: exact, without clock or random numbers.

    groups  start when they are admitted and a worker is free, and hold it for a given time;
    trainer takes groups from the window while it is idle; with P in hand it computes for `train_s`
            (optimiser step and weight sync), then frees their slots and is idle again.

All ends of one instant happen before slots are filled and groups are taken again. Real processes do
the same in `benchmarks.window_processes`; docs/windowed_fifo.md compares the two.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from rl.window import Window

Workload = Literal["lognormal", "mixture", "pareto"]
WORKLOADS: tuple[Workload, ...] = ("lognormal", "mixture", "pareto")


@dataclass(frozen=True)
class Setup:
    """N slots, window W, P groups a step, seconds a step; a group past `deadline_s` ends there.

    `workers` run at once (None: one a slot). Example: `Setup(64, 19, 16, train_s=0.25)`.
    """

    slots: int
    window: int
    groups_a_step: int
    train_s: float
    deadline_s: float = math.inf
    workers: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.groups_a_step <= self.slots:
            raise ValueError(
                f"{self.groups_a_step} groups a step from {self.slots} slots never fill a step; "
                "1 ≤ groups_a_step ≤ slots"
            )
        if self.train_s < 0 or self.deadline_s <= 0:
            raise ValueError(f"train_s {self.train_s} ≥ 0 and deadline_s {self.deadline_s} > 0")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"{self.workers} workers; at least one")


@dataclass(frozen=True)
class Take:
    """One group as the trainer got it, in the step that `version` begins.

    `lag`: versions since it began to run. `before`: groups taken between its admission and its own
    turn. `trained` is False for a group that was released at once.
    """

    index: int
    version: int
    lag: int
    before: int
    admitted_s: float
    ended_s: float
    taken_s: float
    trained: bool = True


@dataclass(frozen=True)
class Trace:
    """What happened: every take in order, the end of every step, seconds the trainer waited."""

    takes: tuple[Take, ...]
    steps_s: tuple[float, ...]
    idle_s: float

    @property
    def makespan_s(self) -> float:
        """End of the last step."""
        return self.steps_s[-1]

    @property
    def steps_a_second(self) -> float:
        return len(self.steps_s) / self.makespan_s

    @property
    def idle_share(self) -> float:
        """Of the makespan, the part that the trainer waited for groups."""
        return self.idle_s / self.makespan_s

    @property
    def lags(self) -> list[int]:
        """Of the groups trained on, in the order of their turn."""
        return [take.lag for take in self.takes if take.trained]


def simulate(
    durations: Sequence[float], setup: Setup, steps: int, untrained: Collection[int] = ()
) -> Trace:
    """Run `steps` optimiser steps; group i takes `durations[i]` seconds of a worker.

    Groups in `untrained` (all rewards equal) are taken and released at once. ValueError when the
    durations end before the steps do: a run of `steps` needs at most steps · P + N of them, and one
    more for each untrained group.
    """
    window = Window[None](setup.slots, setup.window)
    free = setup.workers or setup.slots
    waiting: deque[int] = deque()  # admitted, no worker yet
    events: list[tuple[float, int]] = []  # (end, group) of the groups at work
    admitted: dict[int, tuple[float, int]] = {}  # time, groups taken before
    began: dict[int, int] = {}  # version at the first token
    ended: dict[int, float] = {}
    takes: list[Take] = []
    steps_s: list[float] = []
    now = idle_s = idle_since = 0.0
    step_ends, batch = math.inf, 0

    while len(steps_s) < steps:
        freed = True
        while freed:  # settle this instant: slots, workers, trainer; what is dropped frees a slot
            freed = False
            while window.next < len(durations) and (new := window.admit()) is not None:
                admitted[new] = (now, len(takes))
                waiting.append(new)
            while waiting and free:
                index = waiting.popleft()
                began[index] = len(steps_s)
                heapq.heappush(events, (now + min(durations[index], setup.deadline_s), index))
                free -= 1
            while step_ends == math.inf and (found := window.take()) is not None:
                index, trained = found[0], found[0] not in untrained
                since_s, taken = admitted.pop(index)
                version, lag = len(steps_s), len(steps_s) - began.pop(index)
                before = len(takes) - taken
                takes.append(
                    Take(index, version, lag, before, since_s, ended.pop(index), now, trained)
                )
                batch += trained
                if not trained:
                    window.release(1)
                    freed = True
                if batch == setup.groups_a_step:
                    step_ends = now + setup.train_s
                    idle_s += now - idle_since
        now = min(step_ends, events[0][0] if events else math.inf)
        if now == math.inf:
            raise ValueError(
                f"{len(durations)} groups give {len(steps_s)} of {steps} steps; draw more"
            )
        if step_ends == now:
            steps_s.append(now)
            window.release(setup.groups_a_step)
            step_ends, batch, idle_since = math.inf, 0, now
        while events and events[0][0] == now:
            index = heapq.heappop(events)[1]
            window.finish(index, None)
            ended[index] = now
            free += 1
    return Trace(tuple(takes), tuple(steps_s), idle_s)


def draw(workload: Workload, count: int, seed: int) -> list[float]:
    """Durations with expectation 1: `lognormal` (σ = 1), `mixture` (5 % take ten times as long as
    the others), `pareto` (exponent 1.5: infinite variance)."""
    rng = random.Random(f"{workload}-{seed}")
    if workload == "lognormal":
        return [rng.lognormvariate(-0.5, 1.0) for _ in range(count)]
    if workload == "mixture":
        return [(10.0 if rng.random() < 0.05 else 1.0) / 1.45 for _ in range(count)]
    return [rng.paretovariate(1.5) / 3.0 for _ in range(count)]

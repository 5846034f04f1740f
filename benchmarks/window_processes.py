"""What `rl.window_sim` computes, done: worker processes, a trainer process and a loop over pipes.

Every worker is a process that holds its group for the drawn time, the trainer one that takes a
fixed time a step; the loop owns the `Window` and hears from both through pipes, as they end.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO

from benchmarks.serve_common import BenchmarkError
from rl.window import Window
from rl.window_sim import Setup, Take, Trace

PROGRAM = Path(__file__).with_name("window_worker.py")
WAIT_S = 60.0
TRAINER = -1


class Fleet:
    """`workers` processes and a trainer, used for any number of runs; they end with the block."""

    def __init__(self, workers: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._runs = 0
        for number in (TRAINER, *range(workers)):
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", str(PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes[number] = process
            self._selector.register(_pipe(process.stdout), selectors.EVENT_READ, number)
        for number in self._processes:
            self._send(number, "up", 0.0)
        up = 0
        while up < len(self._processes):
            up += len(self._answers())

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for process in self._processes.values():
            process.kill()
            process.communicate()

    def _send(self, number: int, name: str, seconds: float) -> None:
        pipe = _pipe(self._processes[number].stdin).fileno()
        try:
            os.write(pipe, f"{name} {seconds!r}\n".encode())
        except BrokenPipeError:
            raise BenchmarkError(f"process {number} has ended") from None

    def _answers(self) -> list[tuple[int, str]]:
        """Wait for answers: (process, name of the item that it held)."""
        ready = self._selector.select(WAIT_S)
        if not ready:
            raise BenchmarkError(f"no process answered within {WAIT_S:.0f} s")
        found = []
        for key, _ in ready:
            names = os.read(key.fd, 4096).decode().split()
            if not names:
                raise BenchmarkError(f"process {key.data} has ended")
            found += [(key.data, name) for name in names]
        return found

    def run(
        self,
        durations: Sequence[float],
        setup: Setup,
        steps: int,
        scale_s: float,
        untrained: Collection[int] = (),
    ) -> Trace:
        """As `rl.window_sim.simulate`, with `scale_s` seconds for each unit of its times.

        The trace is in the simulator's units again, so that both can be compared.
        """
        self._runs += 1
        window = Window[None](setup.slots, setup.window)
        free = [number for number in self._processes if number != TRAINER][: setup.workers]
        waiting: list[int] = []
        admitted: dict[int, tuple[float, int]] = {}
        began: dict[int, int] = {}
        ended: dict[int, float] = {}
        takes: list[Take] = []
        steps_s: list[float] = []
        batch, idle_s, idle_since, training = 0, 0.0, 0.0, False
        origin = time.perf_counter()

        def now() -> float:
            return (time.perf_counter() - origin) / scale_s

        while True:
            freed = True
            while freed:
                freed = False
                while window.next < len(durations) and (new := window.admit()) is not None:
                    admitted[new] = (now(), len(takes))
                    waiting.append(new)
                while waiting and free:
                    index = waiting.pop(0)
                    began[index] = len(steps_s)
                    seconds = scale_s * min(durations[index], setup.deadline_s)
                    self._send(free.pop(), f"{self._runs}:{index}", seconds)
                while not training and (found := window.take()) is not None:
                    index, trained = found[0], found[0] not in untrained
                    since_s, taken = admitted.pop(index)
                    version, lag = len(steps_s), len(steps_s) - began.pop(index)
                    end, before = ended.pop(index), len(takes) - taken
                    takes.append(Take(index, version, lag, before, since_s, end, now(), trained))
                    batch += trained
                    if not trained:
                        window.release(1)
                        freed = True
                    if batch == setup.groups_a_step:
                        training = True
                        idle_s += now() - idle_since
                        self._send(TRAINER, f"{self._runs}:step", scale_s * setup.train_s)
            for number, name in self._answers():
                run, item = name.split(":")
                if int(run) != self._runs:
                    continue  # ended while it was being abandoned
                if number == TRAINER:
                    steps_s.append(now())
                    if len(steps_s) == steps:
                        return Trace(tuple(takes), tuple(steps_s), idle_s)
                    window.release(setup.groups_a_step)
                    training, batch, idle_since = False, 0, steps_s[-1]
                else:
                    window.finish(int(item), None)
                    ended[int(item)] = now()
                    free.append(number)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe

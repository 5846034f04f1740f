"""One step's episodes: who attempts what with which seed, run in threads, scripts in the pool."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agent_tools.sandbox.types import ScriptJob, ScriptPool, ScriptResult
from model.tokenizer import Tokenizer
from rl.engine import Cohort, EpisodeAbortedError, derive_seed
from rl.types import ChatClient, Env, Episode, Sampling, Task

if TYPE_CHECKING:
    from model.generate import Engine

CACHE_ENTRIES = 4096
COHORT = 128
"""Episodes (threads) at once."""


@dataclass(frozen=True)
class Rollout:
    """Episodes in the order they were asked for, and seconds."""

    episodes: tuple[Episode, ...]
    generate_s: float
    wall_s: float

    @property
    def execute_s(self) -> float:
        """Seconds not spent generating: scripts, grading, threads."""
        return max(0.0, self.wall_s - self.generate_s)


def plan_step(
    tasks: Sequence[Task],
    *,
    seed: int,
    step: int,
    groups: int,
    group_size: int,
    temperature: float,
    max_tokens: int,
    asked: range | None = None,
) -> list[Task]:
    """The attempts of one step: `groups` × `group_size`, tasks taken in turn over all steps.

    Example: 4 tasks, 3 groups → step 1 has tasks 0 1 2, step 2 has 3 0 1. Seeds depend on
    (seed, step, group, index) only. `asked`: the groups to make instead of the first `groups`;
    those beyond go on with the next tasks.
    """
    attempts = []
    for g in asked if asked is not None else range(groups):
        task = tasks[((step - 1) * groups + g) % len(tasks)]
        for i in range(group_size):
            sampling = Sampling(temperature, max_tokens, derive_seed(seed, step, g, i))
            attempts.append(
                replace(task, episode=f"s{step}-g{g}-{i}", group=g, index=i, sampling=sampling)
            )
    return attempts


def run_local(
    attempts: Sequence[Task],
    env: Env,
    engine: Engine,
    tokenizer: Tokenizer,
    check: Callable[[], None] = lambda: None,
    repetition: tuple[int, float] | None = None,
) -> Rollout:
    """Run attempts against the in-process engine, `COHORT` at a time, in lock-step.

    `check` is called often from this thread and may raise to stop (a signal). The first error of an
    episode is raised after its cohort has ended.
    """
    started = time.monotonic()
    episodes: list[Episode] = []
    generate_s = 0.0
    for first in range(0, len(attempts), COHORT):
        part = attempts[first : first + COHORT]
        cohort = Cohort(engine, tokenizer, len(part), check, repetition)
        threads = [_Member(order, task, env, cohort) for order, task in enumerate(part)]
        for thread in threads:
            thread.start()
        cohort.drive()
        for thread in threads:
            thread.join()
        generate_s += cohort.generate_s
        episodes += [thread.result() for thread in threads]
    return Rollout(tuple(episodes), generate_s, time.monotonic() - started)


class _Member(threading.Thread):
    """One episode of a cohort."""

    def __init__(self, order: int, task: Task, env: Env, cohort: Cohort) -> None:
        super().__init__(daemon=True, name=f"episode-{task.episode}")
        self._order, self._task, self._env, self._cohort = order, task, env, cohort
        self._episode: Episode | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._episode = self._env.run(self._task, self._cohort.client(self._order))
        except EpisodeAbortedError:
            pass  # the driver is raising the reason
        except BaseException as error:  # noqa: BLE001 - raised again by result()
            self._error = error
        finally:
            self._cohort.leave()

    def result(self) -> Episode:
        if self._error is not None:
            raise self._error
        if self._episode is None:
            raise RuntimeError(f"episode {self._task.episode} ended without a result")
        return self._episode


def run_remote(
    attempts: Sequence[Task], env: Env, client: ChatClient, *, threads: int = 16
) -> Rollout:
    """Run attempts against an HTTP endpoint, `threads` at a time."""
    started = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        episodes = tuple(pool.map(lambda task: env.run(task, client), attempts))
    return Rollout(episodes, 0.0, time.monotonic() - started)


class CachingPool:
    """A script pool that runs equal scripts on equal inputs once.

    Key: (inputs folder = competition and split, limits, hash of the script). An equal script that
    is still running is joined. Infrastructure failures are not kept.
    """

    def __init__(self, pool: ScriptPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Future[ScriptResult]] = OrderedDict()
        self.hits = 0

    @property
    def missing(self) -> tuple[str, ...]:
        return self._pool.missing

    def submit(self, job: ScriptJob) -> Future[ScriptResult]:
        key = _job_key(job)
        with self._lock:
            known = self._known.get(key)
            if known is not None and not _failed(known):
                self.hits += 1
                self._known.move_to_end(key)
                return known
            future = self._pool.submit(job)
            self._known[key] = future
            if len(self._known) > CACHE_ENTRIES:
                self._known.popitem(last=False)
            return future

    def run(self, jobs: Sequence[ScriptJob]) -> list[ScriptResult]:
        return [future.result() for future in [self.submit(job) for job in jobs]]

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> CachingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _job_key(job: ScriptJob) -> str:
    digest = hashlib.sha256(job.code.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{job.inputs}|{job.outputs}|{job.limits}|{digest}"


def _failed(future: Future[ScriptResult]) -> bool:
    if not future.done():
        return False
    return future.cancelled() or future.exception() is not None or future.result().status == "infra"

"""The workers and the attempts that they run: hand out, take back, give up. No torch here."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rl.config import RunConfig
from rl.engine import derive_seed
from rl.errors import CheckpointStateError, ConfigError
from rl.forge.child import Child
from rl.forge.groups import Groups
from rl.forge.messages import Ended, Ready, Retire, Run, episode_name
from rl.forge.records import TaskNames
from rl.forge.servers import Server
from rl.pool import Pool
from rl.types import EpisodeStatus, RewardRecord

KILL_AFTER_S = 10.0
"""Past its deadline a worker itself ends an attempt; after so much more the worker is killed."""


@dataclass(frozen=True)
class _Attempt:
    run: Run
    worker: Child
    started: float
    servers: tuple[int, int]


class Crew:
    """Attempts in flight. `servers` are what they need: engine and gateway, and where the tasks
    need scripts (`scripts`) the scorer."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        pool: Pool,
        workers: Sequence[Child],
        servers: tuple[Server, Server],
        scorer: Child,
    ) -> None:
        self.scripts = False
        self.tasks = TaskNames((), ())
        self.last_death = ""
        self._config, self._groups, self._pool = config, groups, pool
        self._workers, self._servers, self._scorer = list(workers), servers, scorer
        self._attempts: dict[str, _Attempt] = {}
        self._retired: set[Child] = set()

    # ---------------------------------------------------------- what workers say

    def ready(self, worker: Child, ready: Ready) -> None:
        """A worker has its tasks. CheckpointStateError if they are others than before."""
        tasks = TaskNames(ready.tasks, ready.domains)
        if self.tasks.ids and tasks != self.tasks:
            raise CheckpointStateError(
                f"{worker.name} has other tasks than before; resume with the same data and code"
            )
        if not ready.tasks:
            raise ConfigError("there are no tasks to train on; name competitions")
        self.tasks, self.scripts = tasks, ready.scripts
        worker.up()

    def retire(self, worker: Child, retire: Retire) -> None:
        """A worker takes nothing more and will end."""
        print(f"{worker.name} is replaced: {retire.reason}", file=sys.stderr)
        self._retired.add(worker)

    def ended(self, ended: Ended) -> None:
        """An attempt is over, or died."""
        attempt = self._attempts.get(episode_name(ended.group, ended.member, ended.attempt))
        if attempt is None:
            return  # ended by us before
        if ended.status is None:
            # what an engine or gateway that went away has caused is not the attempt's own doing
            calm = self._starts == attempt.servers and all(s.alive for s in self._servers)
            self._lost(attempt, ended.reason, charge=calm)
            return
        del self._attempts[attempt.run.episode]
        attempt.worker.thrive()
        self._groups.ended(ended.group, ended.member, ended.attempt, ended.status)

    def buried(self, worker: Child, code: int) -> bool:
        """A worker has ended with `code`; its attempts are run again. True if it was a fault."""
        for attempt in [a for a in self._attempts.values() if a.worker is worker]:
            self._lost(attempt, f"{worker.name} ended with {code}", charge=True)
        fault = worker not in self._retired
        self._retired.discard(worker)
        return fault

    # ---------------------------------------------------------- attempts

    @property
    def _starts(self) -> tuple[int, int]:
        engine, gateway = self._servers
        return engine.starts, gateway.starts

    def dispatch(self) -> None:
        """Give waiting members to workers that have room, oldest group first."""
        if not self.tasks.ids or not all(server.ready for server in self._servers):
            return
        if self.scripts and not self._scorer.ready:
            return  # what runs waits for it; what begins would only lose time to its deadline
        load = {w: 0 for w in self._workers if w.ready and w not in self._retired}
        for known in self._attempts.values():
            if known.worker in load:
                load[known.worker] += 1
        while load:
            worker = min(load, key=lambda w: load[w])
            if load[worker] >= self._config.forge.episodes_per_worker:
                return
            found = self._groups.next()
            if found is None:
                return
            group, member, attempt = found
            seed = derive_seed(self._config.seed, "group", group, member)
            gateway = self._servers[1].url
            run = Run(group, member, attempt, group % len(self.tasks.ids), seed, gateway)
            self._attempts[run.episode] = _Attempt(run, worker, time.monotonic(), self._starts)
            load[worker] += 1
            worker.send(run)

    def expire(self, now: float) -> None:
        """Kill a worker that holds an attempt far beyond its deadline: that one is a timeout."""
        limit = self._config.forge.deadline_s + KILL_AFTER_S
        for attempt in [a for a in self._attempts.values() if now - a.started > limit]:
            self._record(attempt.run, "timeout")
            attempt.worker.kill()

    def _lost(self, attempt: _Attempt, reason: str, *, charge: bool) -> None:
        """An attempt without a word of its end, or that died; it may have left its reward."""
        run = attempt.run
        self._attempts.pop(run.episode, None)
        self.last_death = f"{run.episode}: {reason}"
        known = self._pool.reward(run.episode)
        if known is not None:
            self._groups.ended(run.group, run.member, run.attempt, known.status)
        elif self._groups.died(run.group, run.member, run.attempt, charge=charge):
            print(f"{self.last_death}; given up after {run.attempt + 1} attempts", file=sys.stderr)
            self._record(run, "env_error")

    def _record(self, run: Run, status: EpisodeStatus) -> None:
        """Write a result that no worker will."""
        self._attempts.pop(run.episode, None)
        known = self._pool.reward(run.episode)
        if known is None:
            known = RewardRecord(run.episode, 0.0, status=status)
            self._pool.add_reward(known)
        self._groups.ended(run.group, run.member, run.attempt, known.status)

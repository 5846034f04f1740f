"""`python -m rl.forge.worker RUN_DIR`: a rollout worker, started by the supervisor.

It runs attempts in threads: opens the episode at the gateway, lets the agent run, closes it (then
its calls are in the pool), writes the reward, and says so. It holds nothing that is not in the
pool: killed at any moment, it loses the attempts it was running and nothing else. No torch here.

An agent that does not end by its deadline gets a timeout as its result. Its thread cannot be
stopped: the worker takes nothing new and ends when its other attempts have.
"""

from __future__ import annotations

import importlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rl.config import RunConfig, load_config
from rl.errors import ConfigError, InfraError, UserError
from rl.forge.gateway_client import (
    DeadlineError,
    EnvAgent,
    GatewayControl,
    LimitError,
    RefusedError,
)
from rl.forge.messages import Ended, Message, Ready, Retire, Run
from rl.forge.pipe import Pipe
from rl.forge.places import Places
from rl.forge.scorer_client import SCORER
from rl.forge.servers import CONTROL_KEY
from rl.parts import AgentParts, AnyPartsFactory
from rl.pool import Pool
from rl.types import AgentEnv, RewardRecord, Sampling, Task

GRACE_S = 2.0
"""Past its deadline an attempt may still end by itself for so long."""


def parts_factory(name: str) -> AnyPartsFactory:
    """The factory that `forge.parts` names; ConfigError if there is none."""
    module, _, function = name.partition(":")
    try:
        factory: AnyPartsFactory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"forge.parts {name!r}: {error}; name module:function") from error
    return factory


class Attempt:
    """One attempt; whoever settles it first decides how it ended."""

    def __init__(self, run: Run, deadline_s: float) -> None:
        self.run = run
        self.started = time.monotonic()
        self.over = self.started + deadline_s + GRACE_S
        self._settled = threading.Lock()

    def settle(self) -> bool:
        """True for the first caller."""
        return self._settled.acquire(blocking=False)


class Worker:
    """Attempts of one process. `key` opens and closes episodes at the gateway."""

    def __init__(
        self,
        config: RunConfig,
        pool: Pool,
        pipe: Pipe,
        tasks: Sequence[Task],
        agent: AgentEnv,
        key: str,
    ) -> None:
        self._config, self._pool, self._pipe = config, pool, pipe
        self._tasks, self._agent, self._key = tasks, agent, key
        self._lock = threading.Lock()
        self._running: set[Attempt] = set()
        self._stuck = False

    def handle(self, message: Message) -> None:
        """Start what is asked for."""
        if not isinstance(message, Run):
            return
        attempt = Attempt(message, self._config.forge.deadline_s)
        with self._lock:
            self._running.add(attempt)
        threading.Thread(
            target=self._work, args=(attempt,), name=message.episode, daemon=True
        ).start()

    def watch(self) -> None:
        """Forever: end attempts whose time is over."""
        while True:
            time.sleep(0.2)
            now = time.monotonic()
            with self._lock:
                late = [a for a in self._running if now > a.over]
            for attempt in late:
                if attempt.settle():
                    self._stuck = True
                    self._pipe.send(Retire(f"{attempt.run.episode} does not end"))
                    self._guarded(attempt, self._give_up)
            if self._stuck and not self._running:
                os._exit(0)

    # ---------------------------------------------------------- one attempt

    def _work(self, attempt: Attempt) -> None:
        self._guarded(attempt, self._attempt)

    def _guarded(self, attempt: Attempt, body: Callable[[Attempt], Ended | None]) -> None:
        """Run it, report a full disk as the end of the run, and leave the list."""
        run = attempt.run
        try:
            ended = body(attempt)
            if ended is not None:
                with self._lock:
                    self._running.discard(attempt)
                self._pipe.send(ended)
        except BaseException as error:  # noqa: BLE001 - told to the supervisor
            print(f"{run.episode}: {error!r}", file=sys.stderr, flush=True)
            os._exit(self._pipe.fail(error))

    def _attempt(self, attempt: Attempt) -> Ended | None:
        """None if the deadline was faster."""
        run, config = attempt.run, self._config
        task = replace(
            self._tasks[run.task],
            episode=run.episode,
            group=run.group,
            index=run.member,
            sampling=Sampling(config.rollout.temperature, config.rollout.max_new_tokens, run.seed),
        )
        gateway = GatewayControl(run.gateway, self._key)
        key = secrets.token_hex(16)  # an agent reaches its own episode, and no other
        died = ""
        reward: RewardRecord | None = None
        try:
            gateway.open(
                run.episode,
                group=run.group,
                sampling=task.sampling,
                limits=limits_of(config),
                repeat=config.forge.repeat,
                key=key,
                repetition=config.repetition,
            )
            reward = self._agent.run(
                task, f"{run.gateway}/e/{run.episode}/v1", key, config.forge.deadline_s
            )
        except (DeadlineError, LimitError):
            reward = RewardRecord(run.episode, 0.0, status="timeout")
        except ConfigError:
            raise  # no other attempt would be better: the run ends
        except (InfraError, RefusedError) as error:
            died = str(error)
        except Exception as error:  # noqa: BLE001 - whatever an agent's code raises
            died = repr(error)
        if not attempt.settle():
            return None
        if reward is not None:
            try:
                gateway.close(run.episode)
            except InfraError as error:
                died = str(error)
        gateway.end()
        if died or reward is None:
            print(f"{run.episode} died: {died}", file=sys.stderr, flush=True)
            return Ended(run.group, run.member, run.attempt, None, died[:300])
        if not reward.t_wall:
            reward = replace(reward, t_wall=time.monotonic() - attempt.started)
        return self._record(run, reward)

    def _give_up(self, attempt: Attempt) -> Ended:
        """An agent that does not end: what it has called counts, and earns 0."""
        gateway = GatewayControl(attempt.run.gateway, self._key)
        try:
            gateway.close(attempt.run.episode)
        except InfraError as error:
            return replace(_ended(attempt.run), reason=str(error)[:300])
        finally:
            gateway.end()
        wall = time.monotonic() - attempt.started
        reward = RewardRecord(attempt.run.episode, 0.0, t_wall=wall, status="timeout")
        return self._record(attempt.run, reward)

    def _record(self, run: Run, reward: RewardRecord) -> Ended:
        try:
            self._pool.add_reward(reward)
        except InfraError:
            known = self._pool.reward(run.episode)
            if known is None:
                raise
            reward = known  # the supervisor was faster
        return replace(_ended(run), status=reward.status)


def _ended(run: Run) -> Ended:
    return Ended(run.group, run.member, run.attempt, None)


def limits_of(config: RunConfig) -> dict[str, float]:
    """What an episode may use, as the gateway is told."""
    forge = config.forge
    return {
        "calls": forge.episode_calls,
        "tokens": forge.episode_tokens,
        "deadline_s": forge.deadline_s + GRACE_S,
    }


def main(argv: Sequence[str]) -> int:
    """Runs until its standard input ends."""
    pipe = Pipe()
    places = Places(Path(argv[0]))
    key = os.environ.pop(CONTROL_KEY, "")  # what agents start does not inherit it
    try:
        config = load_config(places.config)
        pool = Pool(places.pool_of(config))
        factory = parts_factory(config.forge.parts)
    except (UserError, InfraError) as error:
        return pipe.fail(error)
    try:
        with factory(config) as parts:
            os.environ.pop(SCORER, None)
            agent = parts.agent if isinstance(parts, AgentParts) else EnvAgent(parts.env)
            worker = Worker(config, pool, pipe, parts.tasks, agent, key)
            threading.Thread(target=worker.watch, name="deadlines", daemon=True).start()
            ids = tuple(task.id for task in parts.tasks)
            domains = tuple(task.domain for task in parts.tasks)
            pipe.send(Ready(ids, domains, parts.scripts))
            pipe.leave_at_end(worker.handle)
    except (UserError, InfraError) as error:
        return pipe.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

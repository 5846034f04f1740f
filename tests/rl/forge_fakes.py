"""Parts of asynchronous runs in tests: real prompts and calls, a reward from the attempt's seed,
faults on demand. `FORGE_FAULTS` lists them: `hang:N` (member 0 of group N never ends), `fail:N`
(every member of group N is an env_error), `fail-all`, `flat:N` (all of group N earn the same),
`raise:N` (the environment breaks in the first attempts of group N), `wrong:N` (it finds the run's
configuration wrong), `mute:N` (no calls, and equal rewards)."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent_tools.sandbox import ScriptJob, ScriptPool
from rl.config import RunConfig
from rl.errors import ConfigError
from rl.parts import Parts
from rl.scripts import script_pool
from rl.types import ChatClient, Episode, RewardRecord, ScriptOutcome, Task

TASKS = ("tweet-sentiment", "diamonds-price")


class SeedEnv:
    """Reward = a number that the seed gives, 0 … 1; `turns` calls an episode. With a pool it is a
    script that says the number."""

    def __init__(self, turns: int, pool: ScriptPool | None = None) -> None:
        self._turns, self._pool = turns, pool
        self._faults = set(os.environ.get("FORGE_FAULTS", "").split(","))
        self._pause_s = float(os.environ.get("FORGE_PAUSE_S", "0"))

    def run(self, task: Task, client: ChatClient) -> Episode:
        faults = {name for name in self._faults if name.endswith(f":{task.group}")}
        kinds = {name.partition(":")[0] for name in faults}
        messages = list(task.prompt)
        reward = 0.5 if "flat" in kinds else random.Random(task.sampling.seed).random()
        if "wrong" in kinds:
            raise ConfigError("the agent's program is not there; install it")
        if "mute" in kinds:
            idle, nothing = ScriptOutcome("", "ok", True, 0.0, 0.0), RewardRecord(task.episode, 0.0)
            return Episode(task.episode, task.id, task.group, task.index, (), (idle,), nothing)
        for turn in range(self._turns):
            reply = client.chat(
                messages,
                temperature=task.sampling.temperature,
                max_tokens=task.sampling.max_tokens,
                seed=task.sampling.seed + turn,
            )
            if "hang" in kinds and task.index == 0:
                threading.Event().wait()
            if "raise" in kinds and task.episode.endswith(".0"):
                raise RuntimeError("the environment is broken")
            time.sleep(self._pause_s)
            messages += [
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": f"score {reward:.2f}"},
            ]
        failed = "fail-all" in self._faults or "fail" in kinds
        if self._pool is not None:
            reward = round(reward, 1)  # so that many scripts are equal
            code = f"import time; time.sleep({self._pause_s}); print({reward})"
            result = self._pool.submit(
                ScriptJob(code, Path(os.environ["FORGE_INPUTS"]), ())
            ).result(120)
            failed = failed or result.stdout != f"{reward}\n"
        script = ScriptOutcome(
            reply.text, "infra" if failed else "ok", not failed, reward, 100 * reward
        )
        record = RewardRecord(task.episode, reward, status="env_error" if failed else "done")
        return Episode(task.episode, task.id, task.group, task.index, (), (script,), record)


@contextmanager
def seed_parts(config: RunConfig) -> Iterator[Parts]:
    """Two tasks with different prompts."""
    yield Parts(_tasks(), SeedEnv(config.rollout.turns))


@contextmanager
def script_parts(config: RunConfig) -> Iterator[Parts]:
    """The same, graded by scripts."""
    with script_pool(config) as pool:
        yield Parts(_tasks(), SeedEnv(config.rollout.turns, pool), scripts=True)


def _tasks() -> tuple[Task, ...]:
    return tuple(
        Task(name, ({"role": "user", "content": f"task {name}"},), Path(), "train")
        for name in TASKS
    )

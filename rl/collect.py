"""Where the episodes of a step come from: sampled and judged here, or read from a pool.

No torch here: the engine is only passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from model.chat_format import render_ids
from model.tokenizer import Tokenizer
from rl.config import RunConfig
from rl.errors import RecordError
from rl.pool import GroupRecord, Pool, StepRecord
from rl.rollout import plan_step, run_local
from rl.samples import dead_groups
from rl.types import Env, Episode, Task

if TYPE_CHECKING:
    from model.generate import Engine


@dataclass(frozen=True)
class Collected:
    """A step's episodes: all of them, and those to learn from (without dropped groups).

    `attempts` were begun, `dropped` groups had no spread and were replaced. Seconds.
    """

    episodes: tuple[Episode, ...]
    learnt: tuple[Episode, ...]
    attempts: int
    dropped: int = 0
    generate_s: float = 0.0
    wall_s: float = 0.0


class Source(Protocol):
    """Gives a step's episodes; None when nothing is left for another step.

    `spent`: attempts of all steps before. `version`: of the policy that samples.
    """

    def collect(self, step: int, spent: int, version: int) -> Collected | None: ...

    def left(self, step: int, spent: int) -> bool:
        """Whether `step` could be collected."""
        ...

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        """Ids of some prompts, to see whether the policy is alive."""
        ...


class LocalSource:
    """Samples with the in-process engine. With `dynamic_sampling.refills`, groups without spread
    are replaced; whatever is executed counts against `steps` × `scripts_per_step`."""

    def __init__(
        self,
        config: RunConfig,
        tasks: Sequence[Task],
        env: Env,
        engine: Engine,
        tokenizer: Tokenizer,
        check: Callable[[], None],
        pool: Pool | None = None,
    ) -> None:
        self._config, self._tasks, self._env = config, tasks, env
        self._engine, self._tokenizer, self._check, self._pool = engine, tokenizer, check, pool

    @property
    def prompts(self) -> list[list[int]]:
        return [render_ids(task.prompt, None, self._tokenizer) for task in self._tasks]

    def left(self, step: int, spent: int) -> bool:
        return self._affordable(spent) > 0

    def _affordable(self, spent: int) -> int:
        """Groups that the run's budget still allows."""
        budget = self._config.budget
        left = budget.steps * budget.scripts_per_step - spent
        return left // self._config.rollout.group_size

    def collect(self, step: int, spent: int, version: int) -> Collected | None:
        config, wanted = self._config, self._config.groups_per_step
        size = config.rollout.group_size
        self._engine.version = version
        episodes: list[Episode] = []
        dead: set[int] = set()
        made = 0
        generate_s = wall_s = 0.0
        for _ in range(1 + config.rollout.dynamic_sampling.refills):
            short = wanted - (made - len(dead))
            count = min(short, self._affordable(spent + made * size))
            if count < 1:
                break
            rollout = run_local(
                self._plan(step, range(made, made + count)),
                self._env,
                self._engine,
                self._tokenizer,
                self._check,
                config.repetition,
            )
            made += count
            generate_s += rollout.generate_s
            wall_s += rollout.wall_s
            episodes += rollout.episodes
            if config.rollout.dynamic_sampling.refills:
                dead |= dead_groups(rollout.episodes, config)
        if not made:
            return None
        learnt = tuple(e for e in episodes if e.group not in dead)
        if self._pool is not None:
            record(self._pool, step, episodes, learnt)
        return Collected(tuple(episodes), learnt, made * size, len(dead), generate_s, wall_s)

    def _plan(self, step: int, asked: range) -> list[Task]:
        rollout = self._config.rollout
        return plan_step(
            self._tasks,
            seed=self._config.seed,
            step=step,
            groups=self._config.groups_per_step,
            group_size=rollout.group_size,
            temperature=rollout.temperature,
            max_tokens=rollout.max_new_tokens,
            asked=asked,
        )


class PoolSource:
    """Reads what another run recorded: same steps, same episodes, no engine and no scripts."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._steps = {record.step: record for record in pool.steps()}
        if not self._steps:
            raise RecordError(
                f"{pool.url} names no optimiser step; it must come from a run with `pool` set"
            )
        self._prompts: list[tuple[int, ...]] = []

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return self._prompts

    def left(self, step: int, spent: int) -> bool:
        return step in self._steps

    def collect(self, step: int, spent: int, version: int) -> Collected | None:
        if step not in self._steps:
            return None
        episodes = episodes_of(self._pool, self._steps[step].groups)
        first = {e.calls[0].prompt_ids: None for e in episodes if e.calls}
        self._prompts = list(first)
        return Collected(episodes, episodes, len(episodes))


def episodes_of(pool: Pool, groups: Iterable[GroupRecord]) -> tuple[Episode, ...]:
    """Episodes of these groups from their records; scripts are not recorded.

    RecordError for an episode without reward: it never ended.
    """
    episodes = []
    for number, group in enumerate(groups):
        for index, name in enumerate(group.episodes):
            reward = pool.reward(name)
            if reward is None:
                raise RecordError(
                    f"{pool.url}: episode {name} has no reward; `python -m rl.pool verify` it"
                )
            calls = tuple(replace(call, group=number) for call in pool.calls(name))
            episodes.append(
                Episode(name, group.task, number, index, calls, (), reward, group.domain)
            )
    return tuple(episodes)


def record(pool: Pool, step: int, episodes: Sequence[Episode], learnt: Sequence[Episode]) -> None:
    """Append a step's calls and rewards, then which of them it trains on.

    A step that is sampled again after a crash gives the same ids, so what is there stays.
    """
    for episode in episodes:
        if pool.reward(episode.id) is not None:
            continue
        known = {call.index for call in pool.calls(episode.id)}
        for call in episode.calls:
            if call.index not in known:
                pool.add_call(call)
        pool.add_reward(episode.reward)
    groups: dict[int, list[Episode]] = {}
    for episode in learnt:
        groups.setdefault(episode.group, []).append(episode)
    pool.add_step(
        StepRecord(
            step,
            tuple(
                GroupRecord(g[0].task, g[0].domain, tuple(e.id for e in g)) for g in groups.values()
            ),
        )
    )

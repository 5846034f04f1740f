"""Episodes as the pool has them, and whether a group of them has anything to teach.

Judging reads what training will read, so supervisor and trainer cannot differ. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rl.config import RunConfig
from rl.errors import CheckpointStateError
from rl.forge.groups import Group
from rl.forge.messages import parse_episode
from rl.pool import GroupRecord, Pool
from rl.samples import dead_groups
from rl.types import Episode


@dataclass(frozen=True)
class TaskNames:
    """Tasks in their order: group g is an attempt at task g modulo their number."""

    ids: tuple[str, ...]
    domains: tuple[str, ...]


class Verdict(Enum):
    """`LIVE`: returns differ. `FLAT`: all equal, every advantage is 0. `FAILED`: no member was
    judged."""

    LIVE = "live"
    FLAT = "flat"
    FAILED = "failed"


def episode_of(pool: Pool, name: str, tasks: TaskNames) -> Episode:
    """One finished episode. CheckpointStateError where the pool does not have it."""
    parsed, reward = parse_episode(name), pool.reward(name)
    if parsed is None or reward is None:
        raise CheckpointStateError(
            f"{pool.url} has no reward of episode {name}; `python -m rl.pool verify` it"
        )
    group, member, _ = parsed
    which = group % len(tasks.ids)
    calls = tuple(pool.calls(name))
    task, domain = tasks.ids[which], tasks.domains[which]
    return Episode(name, task, group, member, calls, reward.scripts, reward, domain)


def judge(pool: Pool, group: Group, tasks: TaskNames, config: RunConfig) -> Verdict:
    """Of a finished group, by the run's own reward rule."""
    if group.failed:
        return Verdict.FAILED
    episodes = [episode_of(pool, name, tasks) for name in group.episodes]
    return Verdict.FLAT if dead_groups(episodes, config) else Verdict.LIVE


def group_records(groups: Sequence[Sequence[str]], tasks: TaskNames) -> tuple[GroupRecord, ...]:
    """Groups as the pool's step records name them."""
    out = []
    for names in groups:
        parsed = parse_episode(names[0])
        assert parsed is not None
        which = parsed[0] % len(tasks.ids)
        out.append(GroupRecord(tasks.ids[which], tasks.domains[which], tuple(names)))
    return tuple(out)

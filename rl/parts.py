"""What a run trains against: tasks, and an environment or an agent. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rl.config import RunConfig
from rl.types import AgentEnv, Env, Task


@dataclass(frozen=True)
class Parts:
    """Tasks in their order, and the environment that runs attempts at them. `scripts`: it executes
    scripts (`rl.scripts`), so that an asynchronous run needs a scorer."""

    tasks: tuple[Task, ...]
    env: Env
    scripts: bool = False


@dataclass(frozen=True)
class AgentParts:
    """Tasks in their order, and an agent that knows only a `base_url` (asynchronous runs).
    `scripts` as in `Parts`."""

    tasks: tuple[Task, ...]
    agent: AgentEnv
    scripts: bool = False


PartsFactory = Callable[[RunConfig], AbstractContextManager[Parts]]
AnyPartsFactory = Callable[[RunConfig], AbstractContextManager[Parts | AgentParts]]

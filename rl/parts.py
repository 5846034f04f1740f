"""What a run trains against: tasks, and an environment or an agent. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rl.config import RunConfig
from rl.types import AgentEnv, Env, Task


@dataclass(frozen=True)
class Parts:
    """Tasks in their order, and the environment that runs attempts at them."""

    tasks: tuple[Task, ...]
    env: Env


@dataclass(frozen=True)
class AgentParts:
    """Tasks in their order, and an agent that knows only a `base_url` (asynchronous runs)."""

    tasks: tuple[Task, ...]
    agent: AgentEnv


PartsFactory = Callable[[RunConfig], AbstractContextManager[Parts]]
AnyPartsFactory = Callable[[RunConfig], AbstractContextManager[Parts | AgentParts]]

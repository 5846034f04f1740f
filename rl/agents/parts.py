"""What an asynchronous run trains against: the tasks and the agent that its run file names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agent_tools.paths import data_dir
from rl.agents.options import CommandOptions, MiniSweOptions
from rl.agents.registry import make_agent, own_tasks
from rl.config import RunConfig
from rl.envs.mle.env import MleEnv, MleTaskset
from rl.mle_parts import mle_parts
from rl.parts import AgentParts


@contextmanager
def agent_parts(config: RunConfig) -> Iterator[AgentParts]:
    """The section `agent` of a run file, on its own tasks or the run's competitions (dev split)."""
    if isinstance(config.agent, CommandOptions | MiniSweOptions):
        tasks = own_tasks(config.agent)
        if tasks is None:
            taskset = MleTaskset(config.suite, "dev", data_dir(), turns=config.rollout.turns)
            tasks = tuple(taskset.task(name) for name in config.competitions)
        yield AgentParts(tasks, make_agent(config.agent))
        return
    with mle_parts(config) as parts:
        assert isinstance(parts.env, MleEnv)
        yield AgentParts(parts.tasks, make_agent(config.agent, parts.env), scripts=True)

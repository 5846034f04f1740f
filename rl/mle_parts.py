"""What the loop trains against in production: train competitions, dev rewards, a real sandbox."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent_tools.paths import data_dir
from agent_tools.sandbox import Limits
from rl.config import RunConfig
from rl.envs.mle.env import MleEnv, MleTaskset
from rl.envs.mle.prompts import load_scaffold
from rl.parts import Parts
from rl.scripts import script_pool


@contextmanager
def mle_parts(config: RunConfig) -> Iterator[Parts]:
    """Tasks of `config.competitions` in their dev split, scripts in the configured sandbox.

    Of the scaffold, its words count; turns and temperature of training are the run file's own.
    """
    scaffold = load_scaffold(Path(config.scaffold) if config.scaffold else None)
    taskset = MleTaskset(
        config.suite, "dev", data_dir(), scaffold=scaffold, turns=config.rollout.turns
    )
    tasks = tuple(taskset.task(name) for name in config.competitions)
    with script_pool(config) as pool:
        env = MleEnv(pool, Limits(cpu_seconds=config.env.cpu_seconds), scaffold=scaffold)
        yield Parts(tasks, env, scripts=True)

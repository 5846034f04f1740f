"""Where a run's scripts are executed: in a sandbox pool of this process, or in the scorer that an
asynchronous run's workers share (`rl.forge.scorer`). No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from agent_tools.sandbox import ScriptPool, make_pool
from rl.config import RunConfig
from rl.forge.scorer_client import SCORER, ScorerPool
from rl.rollout import CachingPool


@contextmanager
def script_pool(config: RunConfig) -> Iterator[ScriptPool]:
    """The scorer's pool in a worker of an asynchronous run, else one of our own."""
    address = os.environ.get(SCORER)
    if address is None:
        with own_pool(config) as pool:
            yield pool
        return
    with ScorerPool(address) as remote:
        yield remote


@contextmanager
def own_pool(config: RunConfig) -> Iterator[CachingPool]:
    """The configured sandbox, started; equal scripts run once. What the host does not protect from
    is printed. InfraError where it does not start."""
    made = make_pool(
        config.sandbox.kind,
        config.sandbox.workers,
        require_full_isolation=config.sandbox.require_full_isolation,
    )
    with CachingPool(made) as pool:
        for missing in pool.missing:
            print(f"sandbox: {missing}", flush=True)
        yield pool

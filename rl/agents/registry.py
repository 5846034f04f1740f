"""Agents by name: `agent: {kind: mle | langgraph | mini-swe-agent | command, …}` of a run file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from agent_tools.paths import agents_python
from model.tokenizer import Tokenizer
from rl.agents.command import CommandAgent, Place
from rl.agents.context_client import GatewayCounter
from rl.agents.graders import load_call, make_grader
from rl.agents.langgraph_env import LangGraphAgent
from rl.agents.mini_swe import mini_swe_agent
from rl.agents.options import (
    AgentSection,
    CommandOptions,
    LangGraphOptions,
    MiniSweOptions,
    MleAgent,
    PythonGrader,
)
from rl.agents.tasks import FolderTaskset
from rl.agents.white_box import WhiteBoxAgent
from rl.checkpoints import resolve_checkpoint
from rl.config import nearest, validate
from rl.envs.mle.env import MleEnv
from rl.envs.mle.verifier import Verifier, VerifierProtocol
from rl.errors import ConfigError
from rl.types import AgentEnv, Task

_SECTIONS: dict[str, Any] = {
    section.model_fields["kind"].default: section for section in get_args(get_args(AgentSection)[0])
}
KINDS = tuple(_SECTIONS)


def agent_env(
    name: str,
    options: Mapping[str, Any] | None = None,
    env: MleEnv | None = None,
    *,
    verifier: VerifierProtocol | None = None,
) -> AgentEnv:
    """The agent of a kind. ConfigError names an unknown kind, a wrong option or what is missing.

    env        runs the scripts of `mle` and `langgraph`; it belongs to the caller
    verifier   grades submissions of `mini-swe-agent` and `command`; None: prepared competitions
    """
    if name not in _SECTIONS:
        raise ConfigError(f"agent kind {name!r}; nearest known kind is {nearest(name, KINDS)!r}")
    section = validate(_SECTIONS[name], {**(options or {}), "kind": name}, "agent")
    return make_agent(section, env, verifier=verifier)


def make_agent(
    section: Any, env: MleEnv | None = None, *, verifier: VerifierProtocol | None = None
) -> AgentEnv:
    """The agent of a section of `rl.agents.options`; arguments and errors as for `agent_env`."""
    judge = verifier or Verifier()
    if isinstance(section, CommandOptions):
        grader = make_grader(section.grader, judge, section.isolation)
        python = Path(section.python).expanduser().absolute() if section.python else None
        place = _place(section, section.isolation, python)
        return CommandAgent(
            section.command, grader, model=section.model, place=place, env=section.env
        )
    if isinstance(section, MiniSweOptions):
        return mini_swe_agent(
            agents_python(),
            make_grader(section.grader, judge, "bubblewrap"),
            model=section.model,
            config=section.config,
            steps=section.steps,
            place=_place(section, "bubblewrap", None),
        )
    if env is None:
        raise ConfigError(f"agent kind {section.kind!r} needs the competitions of a run")
    if isinstance(section, LangGraphOptions):
        return LangGraphAgent(
            env,
            load_call(section.graph),
            model=section.model,
            scripts=section.scripts,
            steps=section.steps,
            is_async=section.is_async,
            options=section.options,
        )
    assert isinstance(section, MleAgent)
    if section.context is None:
        return WhiteBoxAgent(env)
    tokenizer = Tokenizer.load(resolve_checkpoint(section.tokenizer))
    keep = section.context.keep
    return WhiteBoxAgent(
        env,
        policy=section.context.policy(),
        counter=lambda: GatewayCounter(tokenizer, keep),
    )


def check_agent(section: Any) -> None:
    """ConfigError for a function that is not there, or does not take the section's options."""
    if isinstance(section, CommandOptions | MiniSweOptions):
        if isinstance(section.grader, PythonGrader):
            load_call(section.grader.call)
        return
    if not isinstance(section, LangGraphOptions):
        return
    signature = inspect.signature(load_call(section.graph))
    try:
        signature.bind("base_url", "api_key", section.model, (), **section.options)
    except TypeError as error:
        raise ConfigError(
            f"agent.options: {section.graph} cannot be called with them ({error}); it takes "
            f"{signature}"
        ) from None


def own_tasks(section: Any) -> tuple[Task, ...] | None:
    """The tasks that an agent's section brings; None where the run's competitions are meant."""
    if not isinstance(section, CommandOptions | MiniSweOptions) or section.tasks is None:
        return None
    taskset = FolderTaskset(Path(section.tasks))
    return tuple(taskset.task(name) for name in taskset.ids())


def _place(section: CommandOptions | MiniSweOptions, isolation: str, python: Path | None) -> Place:
    keep = Path(section.keep) if section.keep else None
    return Place(isolation, python, section.memory_mb, section.processes, section.disk_mb, keep)

"""Any LangGraph graph as an agent: it gets an endpoint, a key, a model's name and the tools.

A builder is `build(base_url, api_key, model, tools, **options)`; what it returns is streamed from
`{"messages": [opening messages]}`. So an agent that somebody wrote is used as it is:

    def build(base_url, api_key, model, tools):
        llm = ChatOpenAI(base_url=base_url, api_key=api_key, model=model)
        return create_react_agent(llm, list(tools))

The clock is looked at after every super-step and in every tool. A node that hangs is left behind
at the deadline (`rl.agents.deadline`), one that awaits is cancelled. What a graph had submitted
before it failed counts; at a deadline nothing counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from rl.agents.deadline import Deadline, within
from rl.agents.desk import Desk, ScriptEnv
from rl.agents.refusals import judge_refusal
from rl.errors import InfraError
from rl.forge.gateway_client import DeadlineError
from rl.types import RewardRecord, Task

Builder = Callable[..., Any]


class LangGraphAgent:
    """Runs a graph on script competitions (`rl.types.AgentEnv`); for any number of threads.

    scripts   executions that its tools allow an episode
    steps     super-steps at most (LangGraph's recursion limit); reaching it ends the episode
    is_async  the graph's nodes are coroutines
    """

    def __init__(
        self,
        env: ScriptEnv,
        builder: Builder,
        *,
        model: str,
        scripts: int = 8,
        steps: int = 64,
        is_async: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._env = env
        self._builder = builder
        self._model = model
        self._scripts = scripts
        self._steps = steps
        self._is_async = is_async
        self._options = dict(options or {})

    def run(self, task: Task, base_url: str, api_key: str, deadline_s: float) -> RewardRecord:
        """One episode. InfraError where the endpoint is away, ConfigError where the agent asks for
        what the run forbids; a graph's own exceptions are raised too."""
        started = time.monotonic()
        deadline = Deadline(deadline_s)
        desk = Desk(self._env, task, self._scripts, deadline)

        def episode() -> RewardRecord:
            self._drive(task, base_url, api_key, desk, deadline)
            deadline.check()
            return desk.reward(time.monotonic() - started)

        try:
            return within(deadline, episode)
        except DeadlineError:
            return desk.timeout(time.monotonic() - started)

    def _drive(
        self, task: Task, base_url: str, api_key: str, desk: Desk, deadline: Deadline
    ) -> None:
        """Run the graph to its end."""
        import openai  # slow to import, as langgraph
        from langgraph.errors import GraphRecursionError

        graph = self._builder(
            base_url, api_key, self._model, (desk.run_script, desk.submit), **self._options
        )
        inputs = {"messages": [dict(message) for message in task.prompt]}
        try:
            if self._is_async:
                asyncio.run(_drive_async(graph, inputs, self._steps, deadline))
                return
            for _ in graph.stream(inputs, {"recursion_limit": self._steps}):
                deadline.check()
        except GraphRecursionError:
            return
        except openai.APIStatusError as error:
            judge_refusal(error)
        except openai.APIConnectionError as error:
            deadline.check()
            raise InfraError(f"the endpoint {base_url} is away: {error}") from error


async def _drive_async(graph: Any, inputs: Any, steps: int, deadline: Deadline) -> None:
    try:
        async with asyncio.timeout(deadline.left):
            async for _ in graph.astream(inputs, {"recursion_limit": steps}):
                deadline.check()
    except TimeoutError:
        deadline.check()  # ours
        raise

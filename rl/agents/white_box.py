"""An environment of ours as an agent behind a `base_url`, with managed context if it is wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl.agents.context import Policy
from rl.agents.context_client import ContextClient, ContextFullError, Counter
from rl.agents.deadline import Deadline, DeadlineError, within
from rl.agents.refusals import status_of
from rl.engine import OpenAIClient
from rl.errors import ConfigError, InfraError
from rl.types import (
    ChatClient,
    ChatReply,
    Env,
    EpisodeStatus,
    Message,
    RewardRecord,
    Task,
)


class WhiteBoxAgent:
    """Runs an `Env` against an endpoint (`rl.types.AgentEnv`); for any number of threads."""

    def __init__(
        self,
        env: Env,
        *,
        model: str,
        policy: Policy | None = None,
        counter: Callable[[], Counter] | None = None,
    ) -> None:
        """policy: how the context is managed; its tokens are counted by a `counter` an episode."""
        if (policy is None) != (counter is None):
            raise ValueError("a context policy needs a counter of tokens, and the other way round")
        self._env = env
        self._model = model
        self._policy = policy
        self._counter = counter

    def run(self, task: Task, base_url: str, api_key: str, deadline_s: float) -> RewardRecord:
        """One episode. A context that cannot be made to fit, or a request that the endpoint
        refuses, ends it with reward 0."""
        from openai import APIStatusError, OpenAIError  # slow to import

        started = time.monotonic()
        deadline = Deadline(deadline_s)
        managed = self._policy is not None
        endpoint = OpenAIClient(base_url, self._model, api_key=api_key, token_ids=managed)
        client: ChatClient = _TimedClient(endpoint, deadline)
        if self._policy is not None and self._counter is not None:
            client = ContextClient(client, self._policy, self._counter())
        try:
            return within(deadline, lambda: self._env.run(task, client).reward)
        except DeadlineError:
            status: EpisodeStatus = "timeout"
        except ContextFullError:
            status = "done"
        except (ConfigError, InfraError) as error:
            if not isinstance(error.__cause__, OpenAIError):
                raise  # not the endpoint's
            cause = error.__cause__
            status = status_of(cause) if isinstance(cause, APIStatusError) else "env_error"
        wall = time.monotonic() - started
        return RewardRecord(task.episode, 0.0, t_wall=wall, status=status)


class _TimedClient:
    """Looks at the clock before every call."""

    def __init__(self, client: ChatClient, deadline: Deadline) -> None:
        self._client = client
        self._deadline = deadline

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
    ) -> ChatReply:
        self._deadline.check()
        return self._client.chat(
            messages, tools=tools, temperature=temperature, max_tokens=max_tokens, seed=seed
        )

"""An environment of ours as an agent behind a `base_url`, with managed context if it is wanted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from rl.agents.context import Policy
from rl.agents.context_client import ContextClient, ContextFullError, Counter
from rl.agents.deadline import Deadline, within
from rl.forge.gateway_client import DeadlineError, GatewayChat, LimitError
from rl.types import ChatClient, Env, EpisodeStatus, RewardRecord, Task


class WhiteBoxAgent:
    """Runs an `Env` against the gateway (`rl.types.AgentEnv`); for any number of threads."""

    def __init__(
        self,
        env: Env,
        *,
        policy: Policy | None = None,
        counter: Callable[[], Counter] | None = None,
    ) -> None:
        """policy: how the context is managed; its tokens are counted by a `counter` an episode."""
        if (policy is None) != (counter is None):
            raise ValueError("a context policy needs a counter of tokens, and the other way round")
        self._env = env
        self._policy = policy
        self._counter = counter

    def run(self, task: Task, base_url: str, api_key: str, deadline_s: float) -> RewardRecord:
        """One episode. A context that cannot be made to fit ends it with reward 0, as deadline and
        limits do. Raises as `GatewayChat.chat` for what is no outcome."""
        started = time.monotonic()
        deadline = Deadline(deadline_s)
        chat = GatewayChat(
            base_url, api_key, started + deadline_s, token_ids=self._policy is not None
        )
        client: ChatClient = chat
        if self._policy is not None and self._counter is not None:
            client = ContextClient(chat, self._policy, self._counter())
        try:
            episode = within(deadline, lambda: self._env.run(task, client))
        except (DeadlineError, LimitError):
            status: EpisodeStatus = "timeout"
        except ContextFullError:
            status = "done"
        else:
            return replace(episode.reward, scripts=episode.scripts)
        finally:
            chat.end()
        wall = time.monotonic() - started
        return RewardRecord(task.episode, 0.0, t_wall=wall, status=status)

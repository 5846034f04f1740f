"""A worker's two sides of the gateway: open and close episodes, and chat as an agent would.

No torch here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from rl.errors import InfraError
from rl.types import ChatClient, ChatReply, Env, Message, RewardRecord, Sampling, Task

CONTROL_TIMEOUT_S = 30.0


class DeadlineError(Exception):
    """The episode's time is over; whatever it was doing has not ended."""


class LimitError(Exception):
    """The episode has used up its calls or tokens: as final as a deadline."""


class RefusedError(Exception):
    """The gateway refuses what the environment asks for, for instance a sampling setting that the
    run forbids: the environment has to be mended."""


class GatewayControl:
    """Opens and closes episodes at the gateway of one URL, with its control key. Raises InfraError
    when it is away."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=CONTROL_TIMEOUT_S,
            verify=self.url.startswith("https:"),  # reading certificates costs 27 ms
        )

    def open(
        self,
        episode: str,
        *,
        group: int,
        sampling: Sampling,
        limits: Mapping[str, float],
        repeat: str,
        key: str,
        repetition: tuple[int, float] | None = None,
    ) -> None:
        """From now on the episode's calls are answered: sampled so, within these limits, to whoever
        has the key. `repetition`: as in `rl.gateway.settings`."""
        body = {
            "episode": episode,
            "group": group,
            "sampling": {
                "temperature": sampling.temperature,
                "max_tokens": sampling.max_tokens,
                "seed": sampling.seed,
                "repetition": repetition,
            },
            "limits": dict(limits),
            "repeat": repeat,
            "key": key,
        }
        self._post("/control/open", body)

    def close(self, episode: str) -> None:
        """No call is answered any more; those that were are in the pool."""
        self._post("/control/close", {"episode": episode})

    def end(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        try:
            answer = self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise InfraError(f"{self.url}{path}: {error}; the gateway is away") from error
        if answer.status_code >= 400:
            raise InfraError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:200]}")


class GatewayChat:
    """The chat client of a white-box environment: plain HTTP, as any agent's.

    Raises DeadlineError once `deadline` (monotonic clock) is over, LimitError when the episode has
    used up its calls or tokens, RefusedError for what is not allowed, InfraError when gateway or
    engine are away. Ids and log-probs go to the pool; with `token_ids` the ids are in the replies
    too. Call k of the episode draws with the episode's seed + k. A prompt that leaves no room for
    one token gets an empty reply with finish reason `length`.
    """

    def __init__(
        self, base_url: str, api_key: str, deadline: float, *, token_ids: bool = False
    ) -> None:
        self._deadline = deadline
        self._token_ids = token_ids
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=None,
            verify=base_url.startswith("https:"),  # reading certificates costs 27 ms
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
    ) -> ChatReply:
        """One reply."""
        started = time.time()
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError
        body: dict[str, Any] = {
            "model": "policy",
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if tools:
            body["tools"] = list(tools)
        if self._token_ids:
            body["return_token_ids"] = True
        del seed  # the gateway draws with the episode's
        try:
            answer = self._http.post("/chat/completions", json=body, timeout=left)
        except httpx.TimeoutException:
            raise DeadlineError from None
        except httpx.HTTPError as error:
            raise InfraError(f"the gateway is away: {error}") from error
        if answer.status_code != 200:
            code = _raise_for(answer)
            return ChatReply("", finish_reason=code, t_start=started, t_end=time.time())
        try:
            (choice,) = answer.json()["choices"]
            message = choice["message"]
            calls = tuple(message.get("tool_calls") or ())
            text, reason = message.get("content") or "", choice.get("finish_reason") or "stop"
            read, written = choice.get("prompt_token_ids") or (), choice.get("token_ids") or ()
        except (ValueError, KeyError, TypeError) as error:
            raise InfraError(f"the gateway gave no chat reply ({error!r})") from error
        return ChatReply(
            text,
            prompt_ids=tuple(read),
            response_ids=tuple(written),
            finish_reason=reason,
            t_start=started,
            t_end=time.time(),
            tool_calls=calls,
        )

    def end(self) -> None:
        """Let go of the connection."""
        self._http.close()


def _raise_for(answer: httpx.Response) -> str:
    """Raise what an error answer means; `length` for a prompt that is too long."""
    try:
        error = answer.json()["error"]
        code, message = str(error.get("code")), str(error.get("message"))
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message = "", answer.text
    text = f"the gateway answered {answer.status_code}: {' '.join(message.split())[:300]}"
    if code == "context_length_exceeded":
        return "length"
    if code in ("episode_deadline", "timeout"):
        raise DeadlineError
    if code in ("episode_calls", "episode_tokens"):
        raise LimitError(text)
    if answer.status_code in (400, 403, 413, 422):
        raise RefusedError(text)
    raise InfraError(text)  # also an episode that a restarted gateway does not know


class EnvAgent:
    """An environment of our own as an agent behind the gateway (`rl.types.AgentEnv`)."""

    def __init__(self, env: Env) -> None:
        self._env = env

    def run(self, task: Task, base_url: str, api_key: str, deadline_s: float) -> RewardRecord:
        """One attempt; its reward carries the scripts."""
        client = GatewayChat(base_url, api_key, time.monotonic() + deadline_s)
        try:
            chat: ChatClient = client
            episode = self._env.run(task, chat)
        finally:
            client.end()
        reward = episode.reward
        return RewardRecord(
            episode=task.episode,
            outcome=reward.outcome,
            process=reward.process,
            t_wall=reward.t_wall,
            t_tool=reward.t_tool,
            status=reward.status,
            scripts=episode.scripts,
        )

"""The nouns of the training plane: small frozen records between environment, engine and trainer.

One LLM request is the training atom (`CallRecord`); rewards are separate records. Nothing here
imports torch, so an environment is tested and an agent behind any API is measured without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Message = dict[str, Any]
"""One OpenAI chat message, for instance `{"role": "user", "content": "…"}`."""

EpisodeStatus = Literal["done", "timeout", "env_error", "aborted"]
"""`env_error` is an infrastructure fault: excluded from rewards and scores, and counted."""


@dataclass(frozen=True)
class CallRecord:
    """One LLM request: exactly the ids that went in and came out.

    `logprobs[i]` is the log-probability of `response_ids[i]` under the unmasked softmax at
    `temperature`. `versions` are spans `(start, end, policy_version)` over the response.
    A `constrained` reply (grammar-masked) is refused as training data.
    """

    episode: str
    group: int
    index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[tuple[int, int, int], ...]
    finish_reason: str
    t_start: float
    t_end: float
    temperature: float = 1.0
    constrained: bool = False
    tokenizer_hash: str = ""
    routed_experts: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class RewardRecord:
    """What an episode earned: `outcome` in [0, 1], `(call index, value)` steps, seconds; and the
    scripts that earned it, where there were any."""

    episode: str
    outcome: float
    process: tuple[tuple[int, float], ...] = ()
    t_wall: float = 0.0
    t_tool: float = 0.0
    status: EpisodeStatus = "done"
    scripts: tuple[ScriptOutcome, ...] = ()


@dataclass(frozen=True)
class ScriptOutcome:
    """One script as executed and graded.

    `status` is the sandbox's (`ok`, `error`, `timeout`, `memory`, `killed`, `infra`); `percentile`
    is 0–100 (0 when invalid); `score` is None when the submission was not valid.
    """

    script: str
    status: str
    valid: bool
    score: float | None
    percentile: float
    any_medal: bool = False
    gold: bool = False
    silver: bool = False
    bronze: bool = False
    above_median: bool = False
    cpu_s: float = 0.0
    wall_s: float = 0.0
    message: str = ""
    cached: bool = False


@dataclass(frozen=True)
class Episode:
    """All calls of one attempt at one task, its scripts in order, and its reward."""

    id: str
    task: str
    group: int
    index: int
    calls: tuple[CallRecord, ...]
    scripts: tuple[ScriptOutcome, ...]
    reward: RewardRecord
    domain: str = "mle"


@dataclass(frozen=True)
class Sampling:
    """How an episode samples. Call `k` (from 0) uses seed `seed + k`: episodes are repeatable."""

    temperature: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """One task, and (after `dataclasses.replace`) one attempt at it.

    `id` is the competition id, `prompt` the opening chat messages, `files` the folder whose files
    a script sees, `split` one of `train`, `dev`, `val`, `domain` the kind of its reward (advantages
    are normalised by domain). The rollout fills `episode`, `group`, `index` and `sampling` for each
    attempt; an environment copies them into its records.
    """

    id: str
    prompt: tuple[Message, ...]
    files: Path
    split: str
    turns: int = 1
    episode: str = ""
    group: int = 0
    index: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    facts: Any = None
    domain: str = "mle"


@dataclass(frozen=True)
class ChatReply:
    """What a chat client returns: text, and ids with log-probs where the endpoint gives them."""

    text: str
    prompt_ids: tuple[int, ...] = ()
    response_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = "stop"
    constrained: bool = False
    t_start: float = 0.0
    t_end: float = 0.0
    versions: tuple[tuple[int, int, int], ...] = ()
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tokenizer_hash: str = ""


@runtime_checkable
class ChatClient(Protocol):
    """An OpenAI-compatible chat route: the in-process engine, or HTTP."""

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
    ) -> ChatReply: ...


class Taskset(Protocol):
    """A finite, ordered set of tasks; `task(id)` raises a UserError for an unknown id."""

    def ids(self) -> tuple[str, ...]: ...

    def task(self, task_id: str) -> Task: ...


class Env(Protocol):
    """Runs one attempt; talks to the model only through `client`; raises only on broken code."""

    def run(self, task: Task, client: ChatClient) -> Episode: ...


class AgentEnv(Protocol):
    """Runs one attempt of an agent that we did not write: it talks to an OpenAI or Anthropic
    `base_url` and knows nothing of training. The gateway behind the URL records its calls; what
    comes back is the reward alone (`task.episode` names it). Raises InfraError where the endpoint
    or a sandbox is away, so that the attempt is made again; anything else only on broken code."""

    def run(self, task: Task, base_url: str, api_key: str, deadline_s: float) -> RewardRecord: ...

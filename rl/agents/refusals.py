"""What a refused request says about an episode: the gateway's answers, by their code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl.errors import ConfigError, InfraError
from rl.forge.gateway_client import DeadlineError

if TYPE_CHECKING:
    import openai

OVER = ("episode_deadline", "timeout")
LIMITS = ("episode_calls", "episode_tokens")
FORBIDDEN = "forbidden_setting"


def judge_refusal(error: openai.APIStatusError) -> None:
    """Return where the refusal was the agent's to mend, so that its episode is judged by what it
    has done: a limit that it used up, a context that is too long.

    Raises DeadlineError past the deadline, ConfigError for a setting that the run forbids (no
    episode of this agent would be better), InfraError for faults of the endpoint, an episode that
    a restarted gateway does not know included.
    """
    if error.code in OVER:
        raise DeadlineError from error
    if error.code == FORBIDDEN:
        raise ConfigError(f"the agent asks for what the run forbids: {error.message}") from error
    mended = error.code in LIMITS or error.status_code in (400, 413, 422)
    if not mended:
        raise InfraError(f"the endpoint answered {error.status_code}: {error.message}") from error

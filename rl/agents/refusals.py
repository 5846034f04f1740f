"""What a refused request says about an episode: the gateway's answers, by their code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl.types import EpisodeStatus

if TYPE_CHECKING:
    import openai


def status_of(error: openai.APIStatusError) -> EpisodeStatus:
    """`timeout` past the deadline, `aborted` where somebody closed the episode, `env_error` for
    faults of the server; anything else was the agent's to mend, and the episode is `done`."""
    if error.code == "episode_deadline":
        return "timeout"
    if error.code == "episode_closed":
        return "aborted"
    return "env_error" if error.status_code >= 500 else "done"

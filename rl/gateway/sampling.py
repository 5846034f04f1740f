"""What an episode's calls are sampled with, and which wishes of an agent go against it.

A record's log-probs are those of the plain softmax at the episode's temperature. A setting that
would draw from something else makes the record useless for training, so it is refused, or (with
`on_conflict="override"`) left out and counted. `seed` is never taken from a request: call k of an
episode draws with the episode's seed + k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rl.gateway.settings import EpisodeSampling
from rl.gateway.types import GatewayError, Json

NOTHING: Final[dict[str, tuple[Any, ...]]] = {
    "top_p": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto", "none"),
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "top_logprobs": (None, 0),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "background": (None, False),
}
"""Settings, with the values that wish for nothing."""

ANSWER_SHAPE: Final = ("n", "best_of", "echo", "suffix", "top_logprobs", "background")
"""Without these an agent would get another answer than it expects: never overridden."""


def wishes(body: Json) -> dict[str, Any]:
    """The sampling settings that a request of OpenAI's form names."""
    return {name: body[name] for name in ("temperature", *NOTHING) if name in body}


def overridden(wanted: Mapping[str, Any], sampling: EpisodeSampling) -> list[str]:
    """The wishes that are left out. Raises GatewayError for those that the run forbids."""
    against = [name for name, value in wanted.items() if _conflicts(name, value, sampling)]
    for name in against:
        if sampling.on_conflict == "override" and name not in ANSWER_SHAPE:
            continue
        reason = f"{name}={wanted[name]!r} is not allowed in this run"
        if name == "temperature":
            reason += f", which samples at {sampling.temperature:g}; leave it out"
        else:
            reason += ": a record must hold plain samples of the model; leave it out"
        raise GatewayError(400, reason, "forbidden_setting", name)
    return against


def _conflicts(name: str, value: Any, sampling: EpisodeSampling) -> bool:
    if name == "temperature":
        return value is not None and value != sampling.temperature
    return value not in NOTHING.get(name, (None,))

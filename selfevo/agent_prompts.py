"""What the agent is told, and the tools that it may call. Pure functions, no I/O.

The loop and the generator of the agent's training data build their prompts here, so the bundled
nano model always sees the wording that it was trained on. Wording is short on purpose: the nano
has a 2,048-entry vocabulary split at white space and a context of 4,096 tokens.

The dialogue (one round): system, user, then the agent calls ``run_digest``, reads the digest, and
ends the round with ``propose_edit`` or ``abstain``. ``config_get``, ``memory_read`` and
``skill_read`` are there for models that want to look before they decide.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

#: Keys of the template's ``search_space.yaml``, in its order.
DEFAULT_KEYS: tuple[str, ...] = (
    "optim.lr",
    "optim.warmup_steps",
    "optim.updates_per_batch",
    "optim.grad_clip",
    "optim.weight_decay",
    "rollout.temperature",
    "rollout.max_new_tokens",
    "rollout.group_size",
    "cispo.is_weight_max",
    "env.cpu_seconds",
)

DIRECTIONS: tuple[str, ...] = ("increase", "decrease")
WHY_MAX = 120  # characters of a reason
DECISIONS = frozenset({"propose_edit", "abstain"})  # calls that end the agent's step

#: The part of the template's program.md that the agent reads (comments are for people only).
DEFAULT_PROGRAM = """\
goal: raise the mean percentile of the policy on held out competitions.
each round you may change one key of the train config by one step.
the harness then trains the changed run, measures it and keeps or drops it."""

RULES = """\
rules:
call run_digest first and use only what it shows.
if a digest shows a fault, call propose_edit with the key, the direction and a short why.
if the run is healthy, call abstain.
do not repeat an edit that was rejected. follow the review."""


def program_text(markdown: str) -> str:
    """program.md as the agent reads it: HTML comments and blank lines removed."""
    text = re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL)
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def system_text(program: str = DEFAULT_PROGRAM) -> str:
    """The system message: the lab's program, then the fixed rules."""
    return f"{program}\n{RULES}"


def memory_line(round_: int, key: str, direction: str, verdict: str, diff: float | None) -> str:
    """One remembered round, such as ``r1 optim.lr decrease accept diff +31.2``.

    ``diff`` is candidate minus control in percentile points; None when nothing was measured.
    """
    tail = "" if diff is None else f" diff {diff:+.1f}"
    return f"r{round_} {key} {direction} {verdict}{tail}"


def user_text(
    round_: int,
    rounds: int,
    runs: Sequence[str],
    memory: Sequence[str] = (),
    reviews: Sequence[str] = (),
    revise: str | None = None,
) -> str:
    """The user message of a round.

    ``runs`` are names for ``run_digest`` (control-s0 …); ``memory`` and ``reviews`` hold one line
    each; ``revise`` is the edit that a reviewer asked to change (same round, same PR).
    """
    lines = [f"round {round_} of {rounds}", "runs " + " ".join(runs)]
    lines += ["memory", *memory] if memory else ["memory none"]
    if reviews:
        lines += ["review", *reviews]
    if revise:
        lines.append(f"revise {revise}")
    return "\n".join(lines)


def agent_messages(
    round_: int,
    rounds: int,
    runs: Sequence[str],
    *,
    memory: Sequence[str] = (),
    reviews: Sequence[str] = (),
    revise: str | None = None,
    program: str = DEFAULT_PROGRAM,
) -> list[Message]:
    """The opening messages of one round: system and user."""
    return [
        {"role": "system", "content": system_text(program)},
        {"role": "user", "content": user_text(round_, rounds, runs, memory, reviews, revise)},
    ]


def _function(
    name: str, description: str, properties: Mapping[str, Any], required: Sequence[str]
) -> Tool:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": dict(properties),
                "required": list(required),
            },
        },
    }


def agent_tools(keys: Sequence[str] = DEFAULT_KEYS) -> list[Tool]:
    """The agent's tools as JSON schemas; ``keys`` are the editable keys of the lab."""
    why = {"type": "string", "maxLength": WHY_MAX}
    key = {"type": "string", "enum": list(keys)}
    name = {"type": "string", "maxLength": 40}
    return [
        _function("run_digest", "digest of a run", {"run": name}, ["run"]),
        _function(
            "propose_edit",
            "change one key by one step",
            {
                "key": key,
                "direction": {"type": "string", "enum": list(DIRECTIONS)},
                "why": why,
                "value": {"type": "number"},
            },
            ["key", "direction", "why"],
        ),
        _function("abstain", "change nothing", {"why": why}, ["why"]),
        _function("config_get", "value of a key", {"key": name}, ["key"]),
        _function("memory_read", "notes of all rounds", {}, []),
        _function("skill_read", "a skill page", {"name": name}, ["name"]),
    ]


#: The tools for the template's search space.
AGENT_TOOLS: list[Tool] = agent_tools()


def call_message(name: str, arguments: Mapping[str, Any], call_id: str = "call_0") -> Message:
    """An assistant message with one tool call (OpenAI form)."""
    function = {"name": name, "arguments": json.dumps(dict(arguments), ensure_ascii=False)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def tool_message(text: str, call_id: str = "call_0") -> Message:
    """The answer to a tool call."""
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def schema_error(problem: str, tools: Sequence[Tool] = AGENT_TOOLS) -> str:
    """The short text that answers a call which could not be read: the fault, then the calls."""
    calls = []
    for tool in tools:
        function = tool["function"]
        required = function["parameters"]["required"]
        calls.append(
            f"{function['name']} ( {' , '.join(required)} )"
            if required
            else f"{function['name']} ( )"
        )
    return f"error: {problem}\ncalls: " + " ; ".join(calls)

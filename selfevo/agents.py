"""The three kinds of agent, and how a model's reply becomes one checked tool call. No I/O here.

`model` asks an OpenAI-compatible endpoint; `rules` follows the detectors' own suggestions; `random`
draws a valid edit. The last two are baselines and never stand in for the model silently: the kind
is in every proposal event and on every PR.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfevo.agent_prompts import DIRECTIONS, Message, Tool
from selfevo.config import SearchSpace, one_step

SEVERITY = {"critical": 0, "error": 0, "high": 0, "warning": 1, "medium": 1, "low": 2, "info": 2}


@dataclass(frozen=True)
class Call:
    """One well-formed tool call. `repaired` says that its text had to be mended first."""

    name: str
    arguments: Mapping[str, Any]
    id: str
    repaired: bool = False


@dataclass(frozen=True)
class Malformed:
    """A reply without a usable call; `problem` is short enough to send back."""

    problem: str


@dataclass(frozen=True)
class Hint:
    """A detector's finding, reduced to what the rules agent needs."""

    name: str
    severity: str
    key: str | None
    direction: str | None
    evidence: str


# ------------------------------------------------------------------ baselines


def rules_decision(
    hints: Sequence[Hint],
    space: SearchSpace,
    values: Mapping[str, Any],
    tried: Sequence[tuple[str, str]] = (),
) -> tuple[str, dict[str, Any]]:
    """The worst finding's own suggestion that is possible and not in `tried`, else abstain."""
    for hint in sorted(hints, key=lambda h: SEVERITY.get(h.severity, 1)):
        if hint.key not in space.keys or hint.direction not in DIRECTIONS:
            continue
        if (hint.key, hint.direction) in tried or not movable(
            space, values, hint.key, hint.direction
        ):
            continue
        why = f"{hint.name}: {hint.evidence}"[:120]
        return "propose_edit", {"key": hint.key, "direction": hint.direction, "why": why}
    return "abstain", {"why": "no finding suggests an edit that is still open"}


def random_decision(
    space: SearchSpace, values: Mapping[str, Any], seed: str
) -> tuple[str, dict[str, Any]]:
    """A uniformly drawn (key, direction) among those that can move; `seed` makes it repeatable."""
    choices = [
        (key, direction)
        for key in space.keys
        for direction in DIRECTIONS
        if movable(space, values, key, direction)
    ]
    if not choices:
        return "abstain", {"why": "no key can move"}
    key, direction = random.Random(seed).choice(choices)
    return "propose_edit", {"key": key, "direction": direction, "why": "drawn at random"}


def movable(
    space: SearchSpace, values: Mapping[str, Any], key: str | None, direction: str | None
) -> bool:
    """Whether one step of `key` in `direction` changes its value."""
    if key is None or direction is None or key not in space.keys:
        return False
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return one_step(space.keys[key], value, direction) != value


# ------------------------------------------------------------------ reading a model's reply


def read_reply(message: Mapping[str, Any], tools: Sequence[Tool], call_id: str) -> Call | Malformed:
    """The first tool call of an assistant message, mended once where its form is broken.

    `call_id` is used where the reply carries none. A call to an unknown tool, or with wrong
    arguments, is `Malformed`: sense is never guessed, only form.
    """
    by_name = {tool["function"]["name"]: tool["function"] for tool in tools}
    calls = tool_calls(message)
    if calls:
        first = calls[0]
        name, raw = str(first["function"].get("name") or ""), first["function"].get("arguments")
        if not name:
            return Malformed("a tool call without a name")
        found = _arguments(raw if raw is not None else "{}")
        identity = str(first.get("id") or call_id)
    else:
        text = str(message.get("content") or "")
        embedded = _embedded_call(text)
        if embedded is None:
            return Malformed("no tool call in the reply")
        name, raw_arguments = embedded
        found = (raw_arguments, True)
        identity = call_id
    if name not in by_name:
        return Malformed(f"no tool named {name[:40]!r}")
    if found is None:
        return Malformed(f"the arguments of {name} are not JSON")
    arguments, repaired = found
    arguments, fixed = _coerce(arguments, by_name[name]["parameters"])
    problem = argument_fault(arguments, by_name[name]["parameters"])
    if problem:
        return Malformed(f"{name}: {problem}")
    return Call(name, arguments, identity, repaired or fixed)


def tool_calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a message, each with a mapping as `function`, whatever a server sent."""
    calls = message.get("tool_calls") or []
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function")
        found.append({**call, "function": function if isinstance(function, dict) else {}})
    return found


def printable(value: Any) -> Any:
    """JSON of others with what UTF-8 cannot hold (lone surrogates) replaced by `?`."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {str(printable(key)): printable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [printable(inner) for inner in value]
    return value


def argument_fault(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    """What is wrong with `arguments` by a flat JSON schema; None if nothing is."""
    properties = schema["properties"]
    for name in schema["required"]:
        if name not in arguments:
            return f"{name} is missing"
    for name, value in arguments.items():
        if name not in properties:
            return f"{str(name)[:40]} is not an argument"
        rule = properties[name]
        if rule["type"] == "string" and not isinstance(value, str):
            return f"{name} must be a string"
        if rule["type"] == "number" and not _finite(value):
            return f"{name} must be a number"
        if "enum" in rule and value not in rule["enum"]:
            return f"{name} must be one of {' '.join(rule['enum'])}"
    return None


def _finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond any float
        return False


def _arguments(raw: Any) -> tuple[dict[str, Any], bool] | None:
    """Arguments as a mapping, and whether the text had to be repaired."""
    if isinstance(raw, dict):
        return raw, False
    text = str(raw)
    for candidate, repaired in ((text, False), (repair_json(text), True)):
        try:
            value = printable(json.loads(candidate))
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value, repaired
    return None


def repair_json(text: str) -> str:
    """One attempt to mend the form: fences, text around the object, a cut-off end, commas."""
    text = re.sub(r"^\s*```(?:json)?\s*|\s*```\s*$", "", text)
    start = text.find("{")
    if start < 0:
        return text
    text = text[start:]
    out: list[str] = []
    closers: list[str] = []
    in_string = escaped = False
    for char in text:
        out.append(char)
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
            continue
        if char == '"':
            in_string = True
        elif char in "{[":
            closers.append("}" if char == "{" else "]")
        elif char in "}]" and closers:
            closers.pop()
            if not closers:
                break
    mended = "".join(out)
    if in_string:
        mended = mended.rstrip("\\") + '"'
    mended = re.sub(r",\s*$", "", mended) + "".join(reversed(closers))
    return re.sub(r",\s*([}\]])", r"\1", mended)


def _embedded_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """A call written into the visible text: MiniMax XML, or a JSON object with name, arguments."""
    xml = re.search(r'<invoke name="([^"]+)">(.*?)(?:</invoke>|$)', text, re.DOTALL)
    if xml:
        pairs = re.findall(
            r'<parameter name="([^"]+)">(.*?)(?:</parameter>|$)', xml.group(2), re.DOTALL
        )
        return xml.group(1), {name: value.strip() for name, value in pairs}
    if "{" not in text:
        return None
    try:
        value = printable(json.loads(repair_json(text)))
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    found = _arguments(value.get("arguments", value.get("parameters", {})))
    return (value["name"], found[0]) if found else None


def _coerce(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Numbers that came as text become numbers; nulls of optional arguments are dropped."""
    out: dict[str, Any] = {}
    fixed = False
    for name, value in arguments.items():
        rule = schema["properties"].get(name, {})
        if value is None and name not in schema["required"]:
            fixed = True
            continue
        if rule.get("type") == "number" and isinstance(value, str):
            try:
                value = float(value)
                fixed = True
            except ValueError:
                pass
        out[name] = value
    return out, fixed


def plain_message(message: Mapping[str, Any], step: Call | Malformed) -> Message:
    """The assistant message as it goes back into the conversation.

    A good call is kept as one call; a malformed reply is kept as text only, since servers refuse
    a history with unreadable arguments.
    """
    if isinstance(step, Call):
        function = {
            "name": step.name,
            "arguments": json.dumps(dict(step.arguments), ensure_ascii=False),
        }
        plain = {
            "role": "assistant",
            "content": str(message.get("content") or ""),
            "tool_calls": [{"id": step.id, "type": "function", "function": function}],
        }
        if message.get("reasoning_content"):  # interleaved thinking: M2 reads its own again
            plain["reasoning_content"] = str(message["reasoning_content"])
        return plain
    text = str(message.get("content") or "")
    if not text and message.get("tool_calls"):
        text = json.dumps(tool_calls(message)[0]["function"], ensure_ascii=False)
    return {"role": "assistant", "content": text[:400]}

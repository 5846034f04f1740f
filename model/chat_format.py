"""MiniMax-M2's chat syntax: messages to prompt, reply text to content, thinking and tool calls.

Template: the tool-calling guide of MiniMax-M2. Earlier thinking is shown again only for assistant
turns after the last user message, so that prompts grow by appending inside one user turn; there a
turn without thinking keeps its empty block. No torch is imported here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from model.errors import ModelError
from model.tokenizer import BOS, CALL, CALL_END, EOS, ROLE, THINK, THINK_END, Tokenizer
from model.tool_schema import (
    Tool,
    fault,
    hint,
    object_fault,
    read_tools,
    read_value,
    types_of,
    write_value,
)

Message = Mapping[str, Any]

DEFAULT_SYSTEM: Final = "You are a helpful assistant."

_TOOLS_HEAD: Final = (
    "\n\n# Tools\nYou may call one or more tools to assist with the user query.\n"
    "Here are the tools available in JSONSchema format:\n\n<tools>\n"
)
_TOOLS_TAIL: Final = (
    "</tools>\n\nWhen making tool calls, use XML format to invoke tools and pass parameters:\n\n"
)
_EXAMPLE: Final = (
    '\n<invoke name="tool-name-1">\n<parameter name="param-key-1">param-value-1</parameter>\n'
    "...\n</invoke>\n"
)
_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "tool": "tool",
    "assistant": "ai",
}
_MAX_SCHEMA_HINT: Final = 400


class ChatFormatError(ModelError):
    """Messages or tools that the template cannot express."""


class ToolCallError(ModelError):
    """A malformed or cut-off tool call. The message says what is wrong and shows the schema."""

    def __init__(self, reason: str, schema: str) -> None:
        self.reason = reason
        self.schema = schema
        super().__init__(f"bad tool call: {reason}; expected {schema}")


class Span(NamedTuple):
    """A piece of a prompt: one special token, text in which no special token may arise, or (where
    there are any) these very `ids`."""

    text: str
    special: bool
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class ToolCall:
    """`arguments_json` is a JSON object in text form, as OpenAI's API has it."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True)
class ParsedReply:
    content: str
    reasoning: str
    tool_calls: list[ToolCall]


# ---------------------------------------------------------------- messages to prompt


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt as text. `ChatFormatError` for an unknown role or content that is not text."""
    spans = _spans(messages, tools, add_generation_prompt)
    return "".join(span.text for span in spans)


def render_ids(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The prompt as ids. Special tokens come from the template only, never from message text."""
    return _encode(_spans(messages, tools, add_generation_prompt), tokenizer)


def render_around_ids(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: Tokenizer,
    sampled: Mapping[int, Sequence[int]],
) -> list[int]:
    """`render_ids`, but `messages[i]` is said with the ids `sampled[i]`, end mark included, as a
    model wrote them: its thinking stays, and nothing of it is encoded again."""
    return _encode(_spans(messages, tools, True, sampled), tokenizer)


def render_next_ids(
    messages: Sequence[Message], tokenizer: Tokenizer, sampled: Mapping[int, Sequence[int]]
) -> list[int]:
    """What follows the end mark of an assistant turn: further messages and the next reply's
    beginning. No message may be of the system, whose place is the head. `sampled` as above.

    No token reaches over an end mark: the ids before it and these are the ids of the whole.
    """
    turns = [(m, role_of(m, i), sampled.get(i, ())) for i, m in enumerate(messages)]
    return tokenizer.encode("\n", specials=False) + _encode(_turns(turns, True), tokenizer)


def render_reply(message: Message) -> str:
    """The text a model writes after the generation prompt to say this assistant message."""
    return "".join(span.text for span in _reply_spans(message))


def render_reply_ids(message: Message, tokenizer: Tokenizer) -> list[int]:
    """`render_reply` as ids, ending with the end-of-turn token: a target of supervised training."""
    return _encode(_reply_spans(message), tokenizer)


def _encode(spans: Iterator[Span], tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    text: list[str] = []
    for span in spans:
        if not span.special:
            text.append(span.text)
            continue
        ids += tokenizer.encode("".join(text), specials=False)
        text.clear()
        ids += span.ids or (tokenizer.token_id(span.text),)
    return ids + tokenizer.encode("".join(text), specials=False)


def _spans(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    sampled: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> Iterator[Span]:
    roles = [role_of(message, index) for index, message in enumerate(messages)]
    system = [text_of(m) for m, role in zip(messages, roles, strict=True) if role == "system"]
    yield Span(BOS, True)
    yield from _open("system")
    yield _plain("\n\n".join(system) if system else DEFAULT_SYSTEM)
    if tools:
        yield from _tools_block(tools)
    yield from _close()

    turns = [
        (message, role, sampled.get(index, ()))
        for index, (message, role) in enumerate(zip(messages, roles, strict=True))
        if role != "system"
    ]
    yield from _turns(turns, add_generation_prompt)


def _turns(
    turns: Sequence[tuple[Message, str, Sequence[int]]], add_generation_prompt: bool
) -> Iterator[Span]:
    """What is said after the head; each message with its role, and its ids if it was sampled."""
    last_user = max((i for i, (_, role, _) in enumerate(turns) if role == "user"), default=-1)
    for index, (message, role, ids) in enumerate(turns):
        if role == "user":
            yield from _open("user")
            yield _plain(text_of(message))
            yield from _close()
        elif role == "ai":
            yield from _open("ai")
            if ids:
                yield Span(THINK, True)
                yield _plain("\n")
                yield Span("", True, ids)
            elif index > last_user:
                yield Span(THINK, True)
                yield _plain("\n")
                yield from _reply_spans(message)
            else:
                yield from _visible_spans(message)
                yield Span(EOS, True)
            yield _plain("\n")
        else:
            first = index == 0 or turns[index - 1][1] != "tool"
            last = index + 1 == len(turns) or turns[index + 1][1] != "tool"
            if first:
                yield Span(ROLE, True)
                yield _plain("tool")
            yield _plain(f"\n<response>{text_of(message)}</response>")
            if last:
                yield from _close()
    if add_generation_prompt:
        yield from _open("ai")
        yield Span(THINK, True)
        yield _plain("\n")


def _plain(text: str) -> Span:
    return Span(text, False)


def _open(role: str) -> Iterator[Span]:
    yield Span(ROLE, True)
    yield _plain(role + "\n")


def _close() -> Iterator[Span]:
    yield Span(EOS, True)
    yield _plain("\n")


def _tools_block(tools: Sequence[Mapping[str, Any]]) -> Iterator[Span]:
    _specs(tools)
    yield _plain(_TOOLS_HEAD)
    for tool in tools:
        schema = json.dumps(tool.get("function", tool), ensure_ascii=False)
        yield _plain(f"<tool>{schema}</tool>\n")
    yield _plain(_TOOLS_TAIL)
    yield Span(CALL, True)
    yield _plain(_EXAMPLE)
    yield Span(CALL_END, True)


def _reply_spans(message: Message) -> Iterator[Span]:
    reasoning, _ = split_thinking(message)
    yield _plain(reasoning + "\n" if reasoning else "")
    yield Span(THINK_END, True)
    yield _plain("\n\n")
    yield from _visible_spans(message)
    yield Span(EOS, True)


def _visible_spans(message: Message) -> Iterator[Span]:
    _, content = split_thinking(message)
    calls = message.get("tool_calls") or []
    yield _plain(content)
    if not calls:
        return
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ChatFormatError("tool_calls must be a list of calls")
    if content:
        yield _plain("\n")
    yield Span(CALL, True)
    yield _plain("\n")
    for call in calls:
        yield _plain(_invoke(call))
    yield Span(CALL_END, True)


def _invoke(call: object) -> str:
    inner = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ChatFormatError('a tool call must be {"function": {"name": …, "arguments": …}}')
    arguments = inner.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ChatFormatError(f"arguments of {inner.get('name')!r} are not JSON") from error
    if not isinstance(arguments, Mapping):
        raise ChatFormatError(f"arguments of {inner.get('name')!r} must be a JSON object")
    lines = [f'<invoke name="{inner.get("name")}">']
    lines += [
        f'<parameter name="{key}">{write_value(value)}</parameter>'
        for key, value in arguments.items()
    ]
    return "\n".join([*lines, "</invoke>"]) + "\n"


def role_of(message: Message, index: int) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ChatFormatError(
            f"messages[{index}]: unknown role {role!r}; use {', '.join(sorted(_ROLES))}"
        )
    return _ROLES[role]


def text_of(message: Message) -> str:
    """Content as text; a list of `{"type": "text", "text": …}` parts is joined."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ChatFormatError("message content must be text or a list of text parts")
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise ChatFormatError("message content may hold text parts only")
        parts.append(str(part.get("text", "")))
    return "".join(parts)


def split_thinking(message: Message) -> tuple[str, str]:
    """Reasoning and visible text; clients that keep thinking inside the content are understood."""
    content = text_of(message)
    reasoning = message.get("reasoning_content")
    if reasoning is None and THINK_END in content:
        head, _, content = content.partition(THINK_END)
        return head.removeprefix(THINK).strip("\n"), content.removeprefix("\n\n")
    return str(reasoning or ""), content


def _specs(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Tool]:
    try:
        return read_tools(tools)
    except ValueError as error:
        raise ChatFormatError(str(error)) from error


# ---------------------------------------------------------------- reply to parts

_INVOKE = re.compile(r'\s*<invoke name="([^"\n]*)">(.*?)</invoke>', re.DOTALL)
_PARAMETER = re.compile(r'\s*<parameter name="([^"\n]*)">(.*?)</parameter>', re.DOTALL)


def parse(
    text: str,
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    check_schema: bool = True,
    id_salt: str = "",
) -> ParsedReply:
    """Reply text (what follows the generation prompt) to its parts.

    Without tools nothing is a call: the visible text is the content, whatever it holds.
    `check_schema=False` lets a well-formed call with a wrong value through, as OpenAI's API does.
    Call ids are a hash of `id_salt`, the text and the position. Raises `ToolCallError`.
    """
    specs = _specs(tools)
    reasoning, visible = _split_reply(text)
    content, mark, block = visible.partition(CALL)
    if not mark or not specs:
        return ParsedReply(visible, reasoning, [])
    block, closed, _ = block.partition(CALL_END)
    if not closed:
        raise ToolCallError(f"cut off before {CALL_END}", _hints(specs))
    calls: list[ToolCall] = []
    position = 0
    while match := _INVOKE.match(block, position):
        arguments = _arguments(match[1], match[2], specs, check_schema)
        digest = hashlib.sha256(f"{id_salt}\0{text}\0{len(calls)}".encode()).hexdigest()
        calls.append(
            ToolCall(f"call_{digest[:24]}", match[1], json.dumps(arguments, ensure_ascii=False))
        )
        position = match.end()
    rest = block[position:].strip()
    if rest or not calls:
        raise ToolCallError(_what_is_wrong(rest), _hints(specs))
    return ParsedReply(content.removesuffix("\n"), reasoning, calls)


def _split_reply(text: str) -> tuple[str, str]:
    """Reasoning and visible part. Text without `</think>` was cut off while thinking."""
    text = text.removesuffix(EOS)
    text = text.removeprefix(THINK + "\n")
    reasoning, mark, visible = text.partition(THINK_END)
    if not mark:
        head, call, tail = text.partition(CALL)
        return head.removesuffix("\n"), call + tail
    return reasoning.removesuffix("\n"), visible.removeprefix("\n\n")


def _arguments(
    name: str, body: str, specs: Mapping[str, Tool], check_schema: bool
) -> dict[str, Any]:
    tool = specs.get(name)
    if tool is None:
        raise ToolCallError(f"there is no tool {name!r}", _hints(specs))
    arguments: dict[str, Any] = {}
    position = 0
    while match := _PARAMETER.match(body, position):
        key, raw = match[1], match[2]
        try:
            arguments[key] = read_value(raw, tool.properties.get(key, {}), tool.parameters)
        except ValueError as error:
            if check_schema:
                raise ToolCallError(f"parameter {key!r}: {error}", hint(tool)) from error
            arguments[key] = raw
        position = match.end()
    rest = body[position:].strip()
    if rest:
        raise ToolCallError(_what_is_wrong(rest), hint(tool))
    reason = object_fault(arguments, tool.parameters, tool.parameters) if check_schema else None
    if reason:
        raise ToolCallError(reason, hint(tool))
    return arguments


def _what_is_wrong(rest: str) -> str:
    if not rest:
        return "no <invoke> inside the block"
    for tag in ("invoke", "parameter"):
        if rest.startswith(f"<{tag} ") and f"</{tag}>" not in rest:
            return f"missing </{tag}>"
    return f"unexpected text {rest[:40]!r}"


def _hints(specs: Mapping[str, Tool]) -> str:
    text = "; ".join(hint(tool) for tool in specs.values()) or "no tools"
    return text if len(text) <= _MAX_SCHEMA_HINT else text[: _MAX_SCHEMA_HINT - 1] + "…"


def read_reply(
    text: str, tools: Sequence[Mapping[str, Any]] | None, finish: str, salt: str
) -> tuple[ParsedReply, str | None, bool]:
    """The reply, why a call in it was no call, and whether it took the one repair.

    A reply that was cut off is never repaired: half an argument must not be run.
    """
    try:
        return parse(text, tools, check_schema=False, id_salt=salt), None, False
    except ToolCallError as error:
        reason = str(error)
    if finish not in ("length", "abort"):
        try:
            mended = repair(text, tools)
            return parse(mended, tools, check_schema=False, id_salt=salt), None, True
        except ToolCallError as error:
            reason = str(error)
    return parse(text, None, id_salt=salt), reason, False


# ---------------------------------------------------------------- one automatic repair

_LOOSE_INVOKE = re.compile(r"<invoke\s+name\s*=\s*[\"']?([^\"'>\n]*)[\"']?\s*>")
_LOOSE_PARAMETER = re.compile(r"<parameter\s+name\s*=\s*[\"']?([^\"'>\n]*)[\"']?\s*>")
_FENCE = re.compile(r"```(?:json)?\s*(\{.*?\})\s*```", re.DOTALL)


def repair(text: str, tools: Sequence[Mapping[str, Any]] | None) -> str:
    """The reply with its usual faults mended, or unchanged where none is known.

    Mends missing closing tags and call marks, unquoted names, quotes round a raw value, and a
    call written as (fenced) JSON `{"name": …, "arguments": {…}}`. Parse the result again; one
    repair is all a reply gets.
    """
    specs = _specs(tools)
    reasoning, visible = _split_reply(text)
    starts = list(_LOOSE_INVOKE.finditer(visible))
    if starts:
        content = visible[: starts[0].start()].partition(CALL)[0].removesuffix("\n")
        ends = [match.start() for match in starts[1:]] + [len(visible)]
        calls = [
            _loose_call(match[1].strip(), visible[match.end() : end], specs)
            for match, end in zip(starts, ends, strict=True)
        ]
    else:
        content, calls = _json_calls(visible, specs)
    if not calls:
        return text
    message = {"content": content, "reasoning_content": reasoning, "tool_calls": calls}
    return render_reply(message)


def _loose_call(name: str, body: str, specs: Mapping[str, Tool]) -> dict[str, Any]:
    body = body.partition("</invoke>")[0].partition(CALL_END)[0]
    tool = specs.get(name)
    starts = list(_LOOSE_PARAMETER.finditer(body))
    ends = [*(match.start() for match in starts[1:]), len(body)]
    arguments = {}
    for match, end in zip(starts, ends, strict=False):  # one end too many without parameters
        value, closed, _ = body[match.end() : end].partition("</parameter")
        key = match[1].strip()
        arguments[key] = _mend_value(value if closed else value.rstrip(), key, tool)
    return {"name": name, "arguments": arguments}


def _mend_value(raw: str, key: str, tool: Tool | None) -> str:
    """Takes off quotes that the schema does not want; a value that is already right is kept."""
    if tool is None or key not in tool.properties:
        return raw
    schema, root = tool.properties[key], tool.parameters
    bare = raw.strip()
    unquoted = bare.strip("\"'`").strip()
    fully_quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'`"
    candidates = [unquoted, raw] if fully_quoted else [raw, bare, unquoted, unquoted.rstrip(",;")]
    if types_of(schema, root) != ["string"]:
        candidates = [raw, bare, *candidates]
    for candidate in candidates:
        try:
            value = read_value(candidate, schema, root)
        except ValueError:
            continue
        if fault(value, schema, root) is None:
            return candidate
    return raw


def _json_calls(visible: str, specs: Mapping[str, Tool]) -> tuple[str, list[dict[str, Any]]]:
    """Calls written as JSON, fenced or as the whole visible text; only known tools count."""
    stripped = visible.replace(CALL, "").replace(CALL_END, "").strip()
    found = list(_FENCE.finditer(visible))
    texts = [match[1] for match in found] or [stripped]
    content = visible[: found[0].start()].strip() if found else ""
    calls: list[dict[str, Any]] = []
    for text in texts:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        inner = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(inner, dict) or inner.get("name") not in specs:
            continue
        arguments = inner.get("arguments", inner.get("parameters", {}))
        if isinstance(arguments, dict):
            calls.append({"name": inner["name"], "arguments": arguments})
    return content, calls

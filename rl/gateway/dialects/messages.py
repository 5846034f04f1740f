"""Anthropic's messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rl.gateway.dialects import reading
from rl.gateway.dialects.reading import event
from rl.gateway.types import Answer, Ask, GatewayError, Json, refused

_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_CHOICES: Final = {"auto": "auto", "none": "none", "any": "required"}


class Messages:
    """POST /v1/messages. Thinking is shown where the request asks for it, as Anthropic does."""

    ping = event({"type": "ping"}, "ping")

    def read(self, body: Json, earlier: Mapping[str, Sequence[Json]]) -> Ask:
        choice = body.get("tool_choice") or {}
        if not isinstance(choice, dict):
            raise refused("tool_choice", 'expected {"type": "auto"}')
        kind = str(choice.get("type", "auto"))
        tools = [_tool(tool) for tool in reading.objects(body, "tools")]
        wishes: Json = {n: body[n] for n in ("temperature", "top_p", "top_k") if n in body}
        wishes["tool_choice"] = _CHOICES.get(kind, choice)
        system = _text(body.get("system"), "system")
        head: list[Json] = [{"role": "system", "content": system}] if system else []
        return Ask(
            model=reading.text(body, "model", "model"),
            body=body,
            messages=head + _messages(reading.objects(body, "messages", least=1)),
            tools=tools if tools and kind != "none" else None,
            max_tokens=reading.count(body, "max_tokens"),
            stops=reading.stops(body, "stop_sequences"),
            wishes=wishes,
            stream=reading.flag(body, "stream"),
        )

    def whole(self, ask: Ask, answer: Answer) -> Json:
        reason = _STOP_REASONS[answer.finish]
        if answer.stopped_by and reason == "end_turn":
            reason = "stop_sequence"
        return self._head(ask, answer) | {
            "content": _content(ask, answer),
            "stop_reason": reason,
            "stop_sequence": answer.stopped_by or None,
            "usage": _usage(answer),
        }

    def events(self, ask: Ask, answer: Answer) -> Iterable[bytes]:
        whole = self.whole(ask, answer)
        first = self._head(ask, answer) | {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(answer) | {"output_tokens": 0},
        }
        yield _event("message_start", message=first)
        for index, block in enumerate(whole["content"]):
            yield from _block(index, block)
        delta = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
        yield _event("message_delta", delta=delta, usage=_usage(answer))
        yield _event("message_stop")

    def error(self, error: GatewayError) -> Json:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
        inner = {"type": _KINDS.get(error.status, kind), "message": str(error), "code": error.code}
        return {"type": "error", "error": inner}

    def late_error(self, error: GatewayError) -> bytes:
        return event(self.error(error), "error")

    def _head(self, ask: Ask, answer: Answer) -> Json:
        name = f"msg_{answer.id}"
        return {"id": name, "type": "message", "role": "assistant", "model": ask.model}


def _tool(tool: Json) -> Json:
    if tool.get("type") not in (None, "custom"):
        raise refused("tools", f"{tool.get('type')!r} runs at a server that is not here")
    inner = {"name": tool.get("name"), "description": tool.get("description", "")}
    return {"type": "function", "function": inner | {"parameters": tool.get("input_schema", {})}}


def _messages(given: Sequence[Json]) -> list[Json]:
    """Anthropic's turns as OpenAI's messages: the results of tools are messages of their own."""
    found: list[Json] = []
    for message in given:
        role, content = message.get("role"), message.get("content")
        if role == "system":
            found.append({"role": "system", "content": _text(content, "messages")})
            continue
        if role not in ("user", "assistant"):
            raise refused("messages", f"unknown role {role!r}; use user and assistant")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise refused("messages", "content must be text or a list of blocks")
        found += _assistant(blocks) if role == "assistant" else _user(blocks)
    return found


def _user(blocks: Sequence[Json]) -> list[Json]:
    found: list[Json] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_result":
            content = _text(block.get("content"), "tool_result")
            found.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
            )
        elif kind == "text":
            if found and found[-1]["role"] == "user":
                found[-1]["content"] += str(block.get("text", ""))
            else:
                found.append({"role": "user", "content": str(block.get("text", ""))})
        else:
            raise refused("messages", f"a block of type {kind!r} is not understood here")
    return found


def _assistant(blocks: Sequence[Json]) -> list[Json]:
    message: Json = {"role": "assistant", "content": ""}
    calls: list[Json] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            message["content"] += str(block.get("text", ""))
        elif kind == "thinking":
            thinking = str(block.get("thinking", ""))
            message["reasoning_content"] = message.get("reasoning_content", "") + thinking
        elif kind == "tool_use":
            call = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": call})
        elif kind != "redacted_thinking":
            raise refused("messages", f"a block of type {kind!r} is not understood here")
    if calls:
        message["tool_calls"] = calls
    return [message]


def _text(content: Any, where: str) -> str:
    """Text, or the joined text of blocks."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise refused(where, "expected text or a list of blocks")
    parts = []
    for block in content:
        if not isinstance(block, dict) or block.get("type") != "text":
            raise refused(where, "only blocks of text are understood here")
        parts.append(str(block.get("text", "")))
    return "".join(parts)


def _content(ask: Ask, answer: Answer) -> list[Json]:
    reply, blocks = answer.reply, []
    thinking = ask.body.get("thinking")
    shown = isinstance(thinking, dict) and thinking.get("type") != "disabled"
    if shown and reply.reasoning:
        blocks.append({"type": "thinking", "thinking": reply.reasoning, "signature": answer.id})
    if reply.content or not reply.tool_calls:
        blocks.append({"type": "text", "text": reply.content})
    for call in reply.tool_calls:
        given = json.loads(call.arguments_json)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks


def _usage(answer: Answer) -> Json:
    cached = answer.drawn.cached
    return {
        "input_tokens": len(answer.prompt) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": len(answer.drawn.ids),
    }


def _block(index: int, block: Json) -> Iterable[bytes]:
    """The events of one block of content."""
    kind = block["type"]
    empty: dict[str, Json] = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}
    start = block | empty.get(kind, {"input": {}})
    yield _event("content_block_start", index=index, content_block=start)
    if kind == "tool_use":
        text = json.dumps(block["input"], ensure_ascii=False)
        parts = [{"type": "input_json_delta", "partial_json": p} for p in reading.pieces(text)]
    elif kind == "thinking":
        parts = [
            {"type": "thinking_delta", "thinking": p} for p in reading.pieces(block["thinking"])
        ]
        parts.append({"type": "signature_delta", "signature": block["signature"]})
    else:
        parts = [{"type": "text_delta", "text": p} for p in reading.pieces(block["text"])]
    for part in parts:
        yield _event("content_block_delta", index=index, delta=part)
    yield _event("content_block_stop", index=index)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)

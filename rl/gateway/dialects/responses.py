"""OpenAI's responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rl.gateway.dialects import reading
from rl.gateway.dialects.openai_errors import OpenAIErrors
from rl.gateway.dialects.reading import event
from rl.gateway.sampling import wishes
from rl.gateway.types import Answer, Ask, GatewayError, Json, refused


class Responses(OpenAIErrors):
    """POST /v1/responses. `previous_response_id` goes on from an answer of the same episode."""

    def read(self, body: Json, earlier: Mapping[str, Sequence[Json]]) -> Ask:
        for name in ("conversation", "prompt"):
            if body.get(name) is not None:
                raise refused(name, "nothing is stored here but responses; send the input")
        tools = [_tool(tool) for tool in reading.objects(body, "tools")]
        wanted = wishes(body)
        form = body.get("text") or {}
        if not isinstance(form, dict):
            raise refused("text", "expected an object")
        if form.get("format") is not None:
            wanted["response_format"] = form["format"]
        messages: list[Json] = []
        if instructions := reading.text(body, "instructions"):
            messages.append({"role": "system", "content": instructions})
        if previous := reading.text(body, "previous_response_id"):
            if previous not in earlier:
                raise GatewayError(
                    400,
                    f"previous_response_id: no response {previous!r} in this episode",
                    "previous_response_not_found",
                    "previous_response_id",
                )
            messages += earlier[previous]
        messages += _messages(body.get("input"))
        return Ask(
            model=reading.text(body, "model", "model"),
            body=body,
            messages=messages,
            tools=tools if tools and body.get("tool_choice") != "none" else None,
            max_tokens=reading.count(body, "max_output_tokens"),
            wishes=wanted,
            stream=reading.flag(body, "stream"),
        )

    def whole(self, ask: Ask, answer: Answer) -> Json:
        return self._response(ask, answer, _output(answer), done=True)

    def events(self, ask: Ask, answer: Answer) -> Iterable[bytes]:
        begun = self._response(ask, answer, [], done=False)
        whole = self.whole(ask, answer)
        plan: list[Json] = [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
        ]
        for index, item in enumerate(whole["output"]):
            plan += _item_events(index, item)
        plan.append({"type": f"response.{whole['status']}", "response": whole})
        for number, body in enumerate(plan):
            yield event(body | {"sequence_number": number}, body["type"])

    def late_error(self, error: GatewayError) -> bytes:
        body = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        return event(body | {"sequence_number": 0}, "error")

    def _response(self, ask: Ask, answer: Answer, output: list[Json], *, done: bool) -> Json:
        cut = answer.finish == "length"
        status = "in_progress" if not done else "incomplete" if cut else "completed"
        body = ask.body
        return {
            "id": response_id(answer),
            "object": "response",
            "created_at": answer.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if done and cut else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": ask.model,
            "output": output,
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": body.get("previous_response_id"),
            "temperature": body.get("temperature"),
            "text": {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p"),
            "truncation": "disabled",
            "usage": _usage(answer) if done else None,
        }


def response_id(answer: Answer) -> str:
    """The id by which a later request names an answer."""
    return f"resp_{answer.id}"


def said_before(ask: Ask) -> Sequence[Json]:
    """A request's messages without its instructions, which a later request does not inherit."""
    return ask.messages[1:] if ask.body.get("instructions") else ask.messages


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        raise refused("tools", f"{tool.get('type')!r} runs at a server that is not here")
    names = ("name", "description", "parameters", "strict")
    inner = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": inner}


def _messages(given: Any) -> list[Json]:
    """Input items as messages of chat; those of one assistant turn become one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise refused("input", "expected text or a list of items")
    found: list[Json] = []
    for item in given:
        kind = item.get("type", "message")
        if kind == "message":
            role, text = item.get("role"), _text(item.get("content"))
            if role == "assistant":
                message = _turn(found)
                message["content"] += text
            else:
                found.append({"role": role, "content": text})
        elif kind == "function_call":
            call = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            calls = _turn(found).setdefault("tool_calls", [])
            calls.append({"id": item.get("call_id"), "type": "function", "function": call})
        elif kind == "function_call_output":
            text = _text(item.get("output"))
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            message = _turn(found, new=True)
            message["reasoning_content"] = _text(parts)
        else:
            raise refused("input", f"an item of type {kind!r} is not understood here")
    return found


def _turn(found: list[Json], *, new: bool = False) -> Json:
    """The assistant message that is being read: reasoning begins one, text ends none."""
    if new or not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    return found[-1]


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    kinds = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and part.get("type") in kinds for part in parts):
        raise refused("input", "only parts of text are understood here")
    return "".join(str(part.get("text", "")) for part in parts)


def _output(answer: Answer) -> list[Json]:
    reply, name = answer.reply, answer.id
    status = "incomplete" if answer.finish == "length" else "completed"
    items: list[Json] = []
    if reply.reasoning:
        part = {"type": "reasoning_text", "text": reply.reasoning}
        items.append({"id": f"rs_{name}", "type": "reasoning", "summary": [], "content": [part]})
    if reply.content or not reply.tool_calls:
        text: Json = {"type": "output_text", "text": reply.content, "annotations": []}
        message = {"id": f"msg_{name}", "type": "message", "role": "assistant"}
        items.append(message | {"status": status, "content": [text]})
    for position, call in enumerate(reply.tool_calls):
        item = {"id": f"fc_{name}_{position}", "type": "function_call", "status": status}
        named = {"call_id": call.id, "name": call.name, "arguments": call.arguments_json}
        items.append(item | named)
    return items


def _usage(answer: Answer) -> Json:
    read, written = len(answer.prompt), len(answer.drawn.ids)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": answer.drawn.cached},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


def _item_events(index: int, item: Json) -> Iterable[Json]:
    """The events of one output item."""
    at = {"item_id": item["id"], "output_index": index}
    nothing: Json = {"arguments": ""} if item["type"] == "function_call" else {"content": []}
    empty = item | nothing
    yield _of("output_item.added", {"output_index": index, "item": empty})
    if item["type"] == "function_call":
        for piece in reading.pieces(item["arguments"]):
            yield _of("function_call_arguments.delta", at | {"delta": piece})
        yield _of(
            "function_call_arguments.done",
            at | {"name": item["name"], "arguments": item["arguments"]},
        )
    else:
        kind = "output_text" if item["type"] == "message" else "reasoning_text"
        extra: Json = {"logprobs": []} if kind == "output_text" else {}
        part = item["content"][0]
        place = at | {"content_index": 0}
        yield _of("content_part.added", place | {"part": part | {"text": ""}})
        for piece in reading.pieces(part["text"]):
            yield _of(f"{kind}.delta", place | {"delta": piece} | extra)
        yield _of(f"{kind}.done", place | {"text": part["text"]} | extra)
        yield _of("content_part.done", place | {"part": part})
    yield _of("output_item.done", {"output_index": index, "item": item})


def _of(kind: str, fields: Json) -> Json:
    return {"type": f"response.{kind}", **fields}

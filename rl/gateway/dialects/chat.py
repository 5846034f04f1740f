"""OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from model.tokenizer import Tokenizer
from rl.gateway.core import tool_calls
from rl.gateway.dialects import reading
from rl.gateway.dialects.openai_errors import OpenAIErrors
from rl.gateway.dialects.reading import event
from rl.gateway.sampling import wishes
from rl.gateway.types import Answer, Ask, Json, refused

DONE = b"data: [DONE]\n\n"


class Chat(OpenAIErrors):
    """POST /v1/chat/completions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def read(self, body: Json, earlier: Mapping[str, Sequence[Json]]) -> Ask:
        tools = reading.objects(body, "tools")
        if body.get("functions"):
            raise refused("functions", "this old form is not understood; use tools")
        return Ask(
            model=reading.text(body, "model", "model"),
            body=body,
            messages=reading.objects(body, "messages", least=1),
            tools=tools if tools and body.get("tool_choice") != "none" else None,
            max_tokens=reading.count(body, "max_completion_tokens", "max_tokens"),
            stops=reading.stops(body, "stop"),
            wishes=wishes(body),
            stream=reading.flag(body, "stream"),
        )

    def whole(self, ask: Ask, answer: Answer) -> Json:
        reply = answer.reply
        message: Json = {"role": "assistant", "content": reply.content}
        message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["content"] = reply.content or None
            message["tool_calls"] = tool_calls(reply)
        choice: Json = {
            "index": 0,
            "message": message,
            "finish_reason": answer.finish,
            "logprobs": self._logprobs(ask, answer),
            **extras(ask, answer),
        }
        head = self._head(ask, answer, "chat.completion")
        return head | {"choices": [choice], "usage": usage(answer)}

    def events(self, ask: Ask, answer: Answer) -> Iterable[bytes]:
        head = self._head(ask, answer, "chat.completion.chunk")
        reply = answer.reply
        yield _chunk(head, {"role": "assistant", "content": ""})
        for piece in reading.pieces(reply.reasoning):
            yield _chunk(head, {"reasoning_content": piece})
        for piece in reading.pieces(reply.content):
            yield _chunk(head, {"content": piece})
        for position, call in enumerate(tool_calls(reply)):
            yield _chunk(head, {"tool_calls": [{"index": position, **call}]})
        last = {"logprobs": self._logprobs(ask, answer), **extras(ask, answer)}
        yield _chunk(head, {}, answer.finish, last)
        if (ask.body.get("stream_options") or {}).get("include_usage"):
            yield event(head | {"choices": [], "usage": usage(answer)})
        yield DONE

    def _head(self, ask: Ask, answer: Answer, kind: str) -> Json:
        return {
            "id": f"chatcmpl-{answer.id}",
            "object": kind,
            "created": answer.created,
            "model": ask.model,
        }

    def _logprobs(self, ask: Ask, answer: Answer) -> Json | None:
        if not ask.body.get("logprobs"):
            return None
        drawn, tokens = answer.drawn, self._tokenizer
        return {
            "content": [
                {
                    "token": tokens.decode([id]),
                    "logprob": logprob,
                    "bytes": list(tokens.token_bytes(id)),
                    "top_logprobs": [],
                }
                for id, logprob in zip(drawn.ids, drawn.logprobs, strict=True)
            ]
        }


def usage(answer: Answer) -> Json:
    read, written = len(answer.prompt), len(answer.drawn.ids)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": answer.drawn.cached},
    }


def extras(ask: Ask, answer: Answer) -> Json:
    """What OpenAI's answers do not have: the record's index; ids, where they are asked for."""
    more: Json = {"call_index": answer.index}
    if answer.call_error:
        more["tool_call_error"] = answer.call_error
    if answer.repaired:
        more["repaired"] = True
    if ask.body.get("return_token_ids"):
        more["prompt_token_ids"] = answer.prompt.tolist()
        more["token_ids"] = answer.drawn.ids
        more["versions"] = answer.drawn.versions
    return more


def _chunk(head: Json, delta: Json, finish: str | None = None, more: Any = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **(more or {})}
    return event(head | {"choices": [choice]})

"""What OpenAI's chat API sends and expects: request checks, errors, response bodies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from model.chat_format import ParsedReply

Json = dict[str, Any]


class ApiError(Exception):
    """An answer in the shape of OpenAI's errors."""

    def __init__(self, status: int, message: str, *, param: str | None, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> Json:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions. Fields that change nothing here are ignored."""

    model_config = ConfigDict(extra="ignore")

    messages: list[Json] = Field(min_length=1)
    model: str | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=64)
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    response_format: Json | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stops if text)

    @property
    def choice_name(self) -> str | None:
        """tool_choice as "none", "auto", "required", or the name of the tool to call."""
        if not isinstance(self.tool_choice, dict):
            return self.tool_choice
        inner = self.tool_choice.get("function", self.tool_choice)
        name = inner.get("name") if isinstance(inner, dict) else None
        return name if isinstance(name, str) else ""

    def check(self) -> None:
        """Raises `ApiError` for what this server cannot do: it never drops a wish in silence."""
        if self.top_logprobs:
            raise _refused("top_logprobs", "only the sampled token's log-prob is kept; use 0")
        if self.frequency_penalty or self.presence_penalty:
            raise _refused("frequency_penalty", "penalties are not applied; leave them at 0")
        if self.logit_bias:
            raise _refused("logit_bias", "a logit bias is not applied; leave it empty")
        if (self.response_format or {"type": "text"}).get("type") != "text":
            raise _refused("response_format", 'only "text"; use a tool and tool_choice "required"')
        kinds = ("none", "auto", "required", None)
        if not isinstance(self.tool_choice, dict) and self.tool_choice not in kinds:
            raise _refused("tool_choice", 'use "none", "auto", "required" or a named function')
        if isinstance(self.tool_choice, dict) and not self.choice_name:
            raise _refused("tool_choice", 'expected {"type": "function", "function": {"name": …}}')


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="unsupported_value")


@dataclass(frozen=True)
class TokenLogprob:
    """One sampled token: natural log-prob of the unmasked softmax at the request's temperature."""

    text: str
    raw: bytes
    logprob: float

    def body(self) -> Json:
        return {
            "token": self.text,
            "logprob": self.logprob,
            "bytes": list(self.raw),
            "top_logprobs": [],
        }


@dataclass(frozen=True)
class Choice:
    """One reply, ready to be written as a response or as a stream."""

    reply: ParsedReply
    finish_reason: str
    constrained: bool
    version: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    prompt_token_ids: list[int] | None
    tool_call_error: str | None = None
    repaired: bool = False

    def tool_calls(self) -> list[Json]:
        return [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json},
            }
            for call in self.reply.tool_calls
        ]

    def message(self) -> Json:
        calls = self.tool_calls()
        message: Json = {
            "role": "assistant",
            "content": self.reply.content or (None if calls else ""),
            "reasoning_content": self.reply.reasoning,
        }
        if calls:
            message["tool_calls"] = calls
        return message

    def extras(self) -> Json:
        """Everything beside the message: log-probs, ids and what training must know."""
        body: Json = {"logprobs": None, "constrained": self.constrained, "version": self.version}
        if self.logprobs is not None:
            body["logprobs"] = {"content": [entry.body() for entry in self.logprobs]}
        if self.prompt_token_ids is not None:
            body["prompt_token_ids"] = self.prompt_token_ids
            body["token_ids"] = self.token_ids
        if self.tool_call_error:
            body["tool_call_error"] = self.tool_call_error
        if self.repaired:
            body["repaired"] = True
        return body


@dataclass(frozen=True)
class Completion:
    """All choices of one request. `created` is Unix seconds."""

    id: str
    created: int
    model: str
    prompt_tokens: int
    choices: Sequence[Choice] = field(default_factory=tuple)

    def usage(self) -> Json:
        written = sum(len(choice.token_ids) for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def body(self) -> Json:
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "finish_reason": choice.finish_reason,
                **choice.extras(),
            }
            for index, choice in enumerate(self.choices)
        ]
        constrained = any(choice.constrained for choice in self.choices)
        body = self._head("chat.completion")
        body |= {"choices": choices, "usage": self.usage(), "constrained": constrained}
        if self.choices and self.choices[0].prompt_token_ids is not None:
            body["prompt_token_ids"] = self.choices[0].prompt_token_ids
        return body

    def events(self, *, include_usage: bool) -> Iterator[str]:
        """The same answer as server-sent events, for clients that stream."""
        head = self._head("chat.completion.chunk")
        for index, choice in enumerate(self.choices):
            deltas: list[Json] = [{"role": "assistant", "content": ""}]
            if choice.reply.reasoning:
                deltas.append({"reasoning_content": choice.reply.reasoning})
            if choice.reply.content:
                deltas.append({"content": choice.reply.content})
            for position, call in enumerate(choice.tool_calls()):
                deltas.append({"tool_calls": [{"index": position, **call}]})
            for delta in deltas:
                yield _event(head, [{"index": index, "delta": delta, "finish_reason": None}])
            last = {"index": index, "delta": {}, "finish_reason": choice.finish_reason}
            yield _event(head, [last | choice.extras()])
        if include_usage:
            yield _event(head | {"usage": self.usage()}, [])
        yield "data: [DONE]\n\n"


def _event(head: Json, choices: list[Json]) -> str:
    return f"data: {json.dumps(head | {'choices': choices}, ensure_ascii=False)}\n\n"

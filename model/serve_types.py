"""What OpenAI's API sends on both routes, and which of it this server understands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from model.json_format import ANY_OBJECT

Json = dict[str, Any]

MAX_LOGPROBS: Final = 20
"""Most alternatives a token that a request may ask for."""

_NOT_APPLIED: Final[dict[str, tuple[Any, ...]]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "prompt_logprobs": (None,),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "suffix": (None, ""),
}
"""Wishes that this server cannot fulfil, with the values that wish for nothing."""


class ApiError(Exception):
    """An answer in the shape of OpenAI's errors."""

    def __init__(self, status: int, message: str, *, param: str | None, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> Json:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """A client that is told to come back later is told when."""
        return {"Retry-After": "1"} if self.status == 429 else {}


def refused(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="unsupported_value")


class RepetitionStop(BaseModel):
    """Ours: the reply also ends (`repetition`) after `tokens` in a row, each likelier than
    `probability`."""

    tokens: int = Field(ge=1)
    probability: float = Field(gt=0, lt=1)


class StreamOptions(BaseModel):
    include_usage: bool = False


class CommonRequest(BaseModel):
    """What both routes understand. Other fields are ignored, unless they ask for something that
    this server is known not to do (`check`)."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int | None = Field(None, ge=1, le=64)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    repetition_stop: RepetitionStop | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    response_format: Json | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stops if text)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def json_schema(self) -> Json | None:
        """The schema that the reply must follow, or None for free text. Raises `ApiError`."""
        wanted = self.response_format or {"type": "text"}
        kind = wanted.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return dict(ANY_OBJECT)
        if kind != "json_schema":
            raise refused("response_format", 'type is "text", "json_object" or "json_schema"')
        inner = wanted.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, dict):
            raise refused("response_format", 'expected {"json_schema": {"name": …, "schema": {…}}}')
        return schema

    def check(self) -> None:
        """Raises `ApiError` for what this server cannot do: it never drops a wish in silence."""
        for name, nothing in _NOT_APPLIED.items():
            if (self.model_extra or {}).get(name) not in nothing:
                raise refused(name, "this is not applied here; leave it out")
        if any("\ud800" <= char <= "\udfff" for text in self.stops for char in text):
            raise refused("stop", "the text is not Unicode: it holds half a surrogate pair")
        self.json_schema()


class ChatRequest(CommonRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Json] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def choice_name(self) -> str | None:
        """tool_choice as "none", "auto", "required", or the name of the tool to call."""
        if not isinstance(self.tool_choice, dict):
            return self.tool_choice
        inner = self.tool_choice.get("function", self.tool_choice)
        name = inner.get("name") if isinstance(inner, dict) else None
        return name if isinstance(name, str) else ""

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs or self.return_token_ids)

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", 'it needs "logprobs": true')
        kinds = ("none", "auto", "required", None)
        if not isinstance(self.tool_choice, dict) and self.tool_choice not in kinds:
            raise refused("tool_choice", 'use "none", "auto", "required" or a named function')
        if isinstance(self.tool_choice, dict) and not self.choice_name:
            raise refused("tool_choice", 'expected {"type": "function", "function": {"name": …}}')
        if self.json_schema() is not None and self.tools and self.choice_name != "none":
            raise refused("response_format", 'not together with tools; set tool_choice to "none"')


class TextRequest(CommonRequest):
    """Body of POST /v1/completions. A prompt is text or token ids, or a list of either.

    `max_tokens` 0 goes with `echo`: the prompt is scored and nothing is written.
    """

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(id, int) for id in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None or bool(self.return_token_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probs of the prompt's tokens are asked for."""
        return bool(self.echo) and self.logprobs is not None

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", '0 needs "echo": true')
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refused("best_of", "all n replies are returned; leave it out")

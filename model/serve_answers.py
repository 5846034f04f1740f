"""What the server answers in OpenAI's shapes: choices, log-probs, usage, events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from model.chat_format import ParsedReply
from model.serve_types import Json


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its natural log-prob under the unmasked softmax at the request's temperature
    (None for a prompt's first token), and the likeliest tokens in its place."""

    text: str
    raw: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()

    def body(self) -> Json:
        top = [entry._own() for entry in self.top]
        return self._own() | {"top_logprobs": top}

    def _own(self) -> Json:
        return {"token": self.text, "logprob": self.logprob, "bytes": list(self.raw)}


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> Json | None:
    """The `logprobs` of a chat choice."""
    return None if logprobs is None else {"content": [entry.body() for entry in logprobs]}


def text_logprobs(logprobs: Sequence[TokenLogprob] | None, offset: int = 0) -> Json | None:
    """The `logprobs` of a text choice; `offset` is the number of characters before them.

    As in vLLM the token itself is always among its `top_logprobs`.
    """
    if logprobs is None:
        return None
    offsets = []
    for entry in logprobs:
        offsets.append(offset)
        offset += len(entry.text)
    return {
        "tokens": [entry.text for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [
            None if e.logprob is None else {x.text: x.logprob for x in (*e.top, e)}
            for e in logprobs
        ],
        "text_offset": offsets,
    }


@dataclass(frozen=True)
class Choice:
    """One reply of either route. `reply.content` is the text of a text completion; `version` and
    `versions` are those of `Generation`."""

    reply: ParsedReply
    finish_reason: str
    constrained: bool
    version: int
    versions: list[tuple[int, int, int]]
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    prompt_token_ids: list[int] | None
    tool_call_error: str | None = None
    repaired: bool = False
    cached: int = 0

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

    def ids(self) -> Json:
        """The ids, if they were asked for."""
        if self.prompt_token_ids is None:
            return {}
        return {"prompt_token_ids": self.prompt_token_ids, "token_ids": self.token_ids}

    def extras(self) -> Json:
        """What training and agents must know beside text, ids and log-probs."""
        body: Json = {"constrained": self.constrained, "version": self.version}
        body["versions"] = [list(span) for span in self.versions]
        if self.tool_call_error:
            body["tool_call_error"] = self.tool_call_error
        if self.repaired:
            body["repaired"] = True
        return body


@dataclass(frozen=True)
class Head:
    """What all parts of one answer begin with. `created` is Unix seconds."""

    id: str
    created: int
    model: str

    def body(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class Completion:
    """All choices of one request, those of one prompt side by side."""

    head: Head
    prompts: Sequence[Sequence[int]]
    choices: Sequence[Choice]

    def usage(self) -> Json:
        """Each prompt counts once, whatever `n`; `cached_tokens` of it were not computed anew."""
        read = sum(len(ids) for ids in self.prompts)
        written = sum(len(choice.token_ids) for choice in self.choices)
        cached = sum(c.cached for c in self.choices[:: len(self.choices) // len(self.prompts)])
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def chat_body(self) -> Json:
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "finish_reason": choice.finish_reason,
                "logprobs": chat_logprobs(choice.logprobs),
                **choice.ids(),
                **choice.extras(),
            }
            for index, choice in enumerate(self.choices)
        ]
        body = self._body("chat.completion", choices)
        if self.choices[0].prompt_token_ids is not None:
            body["prompt_token_ids"] = self.choices[0].prompt_token_ids
        return body

    def text_body(self) -> Json:
        choices = [
            {
                "index": index,
                "text": choice.reply.content,
                "finish_reason": choice.finish_reason,
                "logprobs": text_logprobs(choice.logprobs),
                **choice.ids(),
                **choice.extras(),
            }
            for index, choice in enumerate(self.choices)
        ]
        return self._body("text_completion", choices)

    def _body(self, kind: str, choices: list[Json]) -> Json:
        constrained = any(choice.constrained for choice in self.choices)
        return self.head.body(kind) | {
            "choices": choices,
            "usage": self.usage(),
            "constrained": constrained,
        }


def event(body: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


END_OF_EVENTS: Final = "data: [DONE]\n\n"

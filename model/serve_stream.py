"""Answers as server-sent events, sent while they are written."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from model.errors import ModelError
from model.generate import Generation, Piece
from model.reply_stream import TextSoFar, before_stop, chat_so_far, rest_of
from model.serve_answers import (
    END_OF_EVENTS,
    Choice,
    Completion,
    Head,
    TokenLogprob,
    chat_logprobs,
    event,
    text_logprobs,
)
from model.serve_types import ApiError, ChatRequest, Json, TextRequest
from model.service import REPLY_TIMEOUT_S, Plan, Service, failure


@dataclass
class News:
    """What came for one choice since the last look."""

    pieces: list[Piece] = field(default_factory=list)
    made: Future[Generation] | None = None


class TokenFeed:
    """From the generating thread to the event loop; tokens gather while the loop is busy."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._bell = asyncio.Event()
        self._lock = threading.Lock()
        self._news: dict[int, News] = {}

    def hear(self, index: int, piece: Piece) -> None:
        """New tokens of choice `index` (generating thread)."""
        with self._lock:
            rings = not self._news
            self._news.setdefault(index, News()).pieces.append(piece)
        if rings:
            self._ring()

    def finish(self, index: int, made: Future[Generation]) -> None:
        """Choice `index` has ended (any thread)."""
        with self._lock:
            rings = not self._news
            self._news.setdefault(index, News()).made = made
        if rings:
            self._ring()

    async def next(self) -> dict[int, News]:
        """Whatever came, by choice; waits for it. Raises TimeoutError."""
        await asyncio.wait_for(self._bell.wait(), REPLY_TIMEOUT_S)
        self._bell.clear()
        with self._lock:
            news, self._news = self._news, {}
        return news

    def _ring(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._bell.set)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return


@dataclass
class _Sent:
    """How much of one choice has been sent."""

    text: TextSoFar
    thinking: str = ""
    content: str = ""
    begun: bool = False
    characters: int = 0  # of the tokens whose log-probs were sent


class _Stream(ABC):
    """One request's events; the two routes differ in what they make of a choice's tokens.

    Raises `ApiError` at once where the request cannot be started.
    """

    kind: str

    def __init__(self, service: Service, plan: Plan, head: Head, usage: bool) -> None:
        self.service, self.plan, self.head, self._usage = service, plan, head, usage
        self._feed = TokenFeed()
        self._sent = [_Sent(TextSoFar(service.tokenizer)) for _ in plan.requests]
        listeners = [partial(self._feed.hear, index) for index in range(len(plan.requests))]
        self._futures = service.start(plan, listeners)
        for index, future in enumerate(self._futures):
            future.add_done_callback(partial(self._feed.finish, index))

    async def events(self) -> AsyncIterator[str]:
        """Until all choices have ended; whoever stops listening ends them."""
        done: dict[int, Choice] = {}
        try:
            for index in range(len(self._sent)):
                for part in self.opening(index):
                    yield self._chunk(index, part)
            while len(done) < len(self._futures):
                for index, news in (await self._feed.next()).items():
                    sent = self._sent[index]
                    for piece in news.pieces:
                        sent.text.add(piece.ids)
                        for part in self.parts(index, sent, piece):
                            yield self._chunk(index, part)
                    if news.made is not None:
                        done[index] = self.choice(index, news.made.result())
                        for part in self.ending(sent, done[index]):
                            yield self._chunk(index, part)
            if self._usage:
                choices = [done[index] for index in sorted(done)]
                usage = Completion(self.head, self.plan.prompts, choices).usage()
                yield event(self.head.body(self.kind) | {"choices": [], "usage": usage})
        except (TimeoutError, ModelError, RuntimeError, ValueError) as error:
            yield event(failure(error).body())
        except ApiError as error:
            yield event(error.body())
        finally:
            self.cancel()
        yield END_OF_EVENTS

    def cancel(self) -> None:
        """End the replies, if nobody listens any more."""
        for future in self._futures:
            future.cancel()

    def _chunk(self, index: int, part: Json) -> str:
        choice = {"index": index, "finish_reason": None, **part}
        return event(self.head.body(self.kind) | {"choices": [choice]})

    @abstractmethod
    def opening(self, index: int) -> list[Json]:
        """What a choice begins with."""

    @abstractmethod
    def parts(self, index: int, sent: _Sent, piece: Piece) -> list[Json]:
        """What new tokens add to a choice."""

    @abstractmethod
    def choice(self, index: int, made: Generation) -> Choice:
        """The finished choice."""

    @abstractmethod
    def ending(self, sent: _Sent, choice: Choice) -> list[Json]:
        """What is left of the finished choice."""

    def entries(self, piece: Piece) -> list[TokenLogprob]:
        return self.service.entries(piece.ids, piece.logprobs, piece.top)


class ChatStream(_Stream):
    """Events of /v1/chat/completions: thinking and text as they are written, calls when whole."""

    kind = "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self._body = body
        head = service.head("chatcmpl")
        super().__init__(service, service.plan_chat(body), head, body.wants_usage)

    def opening(self, index: int) -> list[Json]:
        part: Json = {"delta": {"role": "assistant", "content": ""}}
        if self._body.return_token_ids:
            part["prompt_token_ids"] = self.plan.prompt_of(index)
        return [part]

    def parts(self, index: int, sent: _Sent, piece: Piece) -> list[Json]:
        text = before_stop(sent.text.text, self.plan.stops)
        thinking, content = chat_so_far(text, bool(self.plan.tools))
        parts = self._text_parts(sent, thinking, content)
        if self._body.wants_logprobs:
            parts = parts or [{"delta": {}}]
            parts[-1]["logprobs"] = chat_logprobs(self.entries(piece))
        if self._body.return_token_ids:
            parts[-1]["token_ids"] = piece.ids
        return parts

    def choice(self, index: int, made: Generation) -> Choice:
        return self.service.chat_choice(self._body, self.plan, index, made, self.head.id)

    def ending(self, sent: _Sent, choice: Choice) -> list[Json]:
        parts = self._text_parts(sent, choice.reply.reasoning, choice.reply.content)
        for position, call in enumerate(choice.tool_calls()):
            parts.append({"delta": {"tool_calls": [{"index": position, **call}]}})
        last: Json = {"delta": {}, "logprobs": None, "finish_reason": choice.finish_reason}
        return [*parts, last | choice.extras()]

    @staticmethod
    def _text_parts(sent: _Sent, thinking: str, content: str) -> list[Json]:
        parts: list[Json] = []
        if new := rest_of(thinking, sent.thinking):
            sent.thinking = thinking
            parts.append({"delta": {"reasoning_content": new}})
        if new := rest_of(content, sent.content):
            sent.content = content
            parts.append({"delta": {"content": new}})
        return parts


class TextStream(_Stream):
    """Events of /v1/completions."""

    kind = "text_completion"

    def __init__(self, service: Service, body: TextRequest) -> None:
        self._body = body
        super().__init__(service, service.plan_text(body), service.head("cmpl"), body.wants_usage)

    def opening(self, index: int) -> list[Json]:
        if not self._body.return_token_ids:
            return []
        return [{"text": "", "prompt_token_ids": self.plan.prompt_of(index)}]

    def parts(self, index: int, sent: _Sent, piece: Piece) -> list[Json]:
        body, parts = self._body, []
        if body.echo and not sent.begun:
            text, scored = self.service.echo(self.plan.prompt_of(index), piece.prompt)
            sent.content = text
            parts.append(self._part(sent, text, scored))
        sent.begun = True
        if body.max_tokens != 0:
            text = self._before(index) + before_stop(sent.text.text, self.plan.stops)
            entries = self.entries(piece) if body.wants_logprobs else []
            part = self._part(sent, rest_of(text, sent.content), entries)
            sent.content = text
            if body.return_token_ids:
                part["token_ids"] = piece.ids
            if part["text"] or body.wants_logprobs:
                parts.append(part)
        return parts

    def choice(self, index: int, made: Generation) -> Choice:
        return self.service.text_choice(self._body, self.plan, index, made)

    def ending(self, sent: _Sent, choice: Choice) -> list[Json]:
        left = rest_of(choice.reply.content, sent.content)
        last: Json = {"text": left, "logprobs": None, "finish_reason": choice.finish_reason}
        return [last | choice.extras()]

    def _before(self, index: int) -> str:
        if not self._body.echo:
            return ""
        return self.service.tokenizer.decode(self.plan.prompt_of(index))

    def _part(self, sent: _Sent, text: str, entries: list[TokenLogprob]) -> Json:
        logprobs = None
        if self._body.wants_logprobs:
            logprobs = text_logprobs(entries, sent.characters)
            sent.characters += sum(len(entry.text) for entry in entries)
        return {"text": text, "logprobs": logprobs}

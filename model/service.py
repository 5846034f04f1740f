"""Requests in, choices out: what a served checkpoint consists of, apart from HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from model.batching import (
    Batcher,
    BatcherClosedError,
    Listener,
    QueueFullError,
    ResumedError,
)
from model.chat_format import ParsedReply, read_reply, render_ids
from model.errors import ModelError
from model.generate import Constraint, Generation, GenRequest, PromptScores, Top
from model.grammar import GrammarError
from model.json_format import ReplyGrammars
from model.reload import NewWeights
from model.reply_stream import Both, StopText, cut_at_stop
from model.serve_answers import Choice, Completion, Head, TokenLogprob
from model.serve_types import ApiError, ChatRequest, CommonRequest, Json, TextRequest
from model.tokenizer import Tokenizer
from model.transformer import Transformer

DEFAULT_CHAT_TOKENS: Final = 1024
DEFAULT_TEXT_TOKENS: Final = 16
"""Lengths of a reply where the request names none, within what the context leaves."""

REPLY_TIMEOUT_S: Final = 3600.0


@dataclass(frozen=True)
class Plan:
    """A checked request: its prompts, and `n` engine requests for each, one prompt after the
    other. `stops` are the stop texts to cut at."""

    prompts: list[list[int]]
    requests: list[GenRequest]
    stops: tuple[str, ...]
    tools: list[Json] | None
    constrained: bool

    def prompt_of(self, index: int) -> list[int]:
        """The prompt of choice `index`."""
        return self.prompts[index * len(self.prompts) // len(self.requests)]


class Service:
    """`context` is the most tokens that prompt and reply may have together; `like` is the model in
    use, whose sizes new weights must have."""

    def __init__(
        self,
        *,
        name: str,
        tokenizer: Tokenizer,
        batcher: Batcher,
        context: int,
        vocab_size: int,
        like: Transformer | None = None,
    ) -> None:
        self.name = name
        self._like = like
        self.tokenizer = tokenizer
        self.batcher = batcher
        self.context = context
        self.created = int(time.time())
        self._grammars = ReplyGrammars(tokenizer, vocab_size)

    def plan_chat(self, body: ChatRequest) -> Plan:
        """Checks a chat request against this model; raises `ApiError`."""
        self._check(body)
        choice = body.choice_name
        tools = body.tools if body.tools and choice != "none" else None
        try:
            prompt = render_ids(body.messages, tools, self.tokenizer)
        except ModelError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        forced = choice not in (None, "none", "auto")
        limit = body.max_completion_tokens or body.max_tokens or DEFAULT_CHAT_TOKENS
        # A call that a grammar spells ends by itself: a stop text would only break it.
        stops = () if forced else body.stops
        schema = body.json_schema()
        requests = []
        for index in range(body.n or 1):
            grammar: Constraint | None = None
            if forced:
                grammar = self._call_grammar(body, str(choice))
            elif schema is not None:
                grammar = self._json_grammar(schema, chat=True)
            request = self._request(body, prompt, limit, index, grammar, stops, "messages")
            requests.append(replace(request, top_logprobs=body.top_logprobs or 0))
        return Plan([prompt], requests, stops, tools, forced or schema is not None)

    def plan_text(self, body: TextRequest) -> Plan:
        """Checks a text completion against this model; raises `ApiError`."""
        self._check(body)
        try:
            prompts = [
                self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                for prompt in body.prompts
            ]
        except ModelError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt", code="invalid_value") from error
        if not prompts or not all(prompts):
            reason = "prompt: it is empty; give at least one token"
            raise ApiError(400, reason, param="prompt", code="invalid_value")
        schema, count = body.json_schema(), body.n or 1
        if len(prompts) * count > self.batcher.limit:
            reason = (
                f"prompt: {len(prompts)} prompts × {count} replies are more than the "
                f"{self.batcher.limit} that may run and wait here; send fewer at once"
            )
            raise ApiError(400, reason, param="prompt", code="invalid_value")
        limit = DEFAULT_TEXT_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)
        requests = []
        for index in range(len(prompts) * count):
            grammar = None if schema is None else self._json_grammar(schema, chat=False)
            prompt, n = prompts[index // count], index % count
            request = self._request(body, prompt, limit, n, grammar, body.stops, "prompt")
            request = replace(
                request,
                top_logprobs=body.logprobs or 0,
                prompt_logprobs=body.scores_prompt,
            )
            requests.append(request)
        return Plan(prompts, requests, body.stops, None, schema is not None)

    def start(
        self, plan: Plan, listeners: Sequence[Listener] | None = None
    ) -> list[Future[Generation]]:
        """Queues all of a plan's requests. Raises `ApiError`."""
        try:
            return self.batcher.submit(plan.requests, listeners)
        except (BatcherClosedError, QueueFullError) as error:
            raise failure(error) from error
        except ModelError as error:
            raise ApiError(400, str(error), param=None, code="invalid_value") from error

    async def wait(self, futures: Sequence[Future[Generation]]) -> list[Generation]:
        """All generations. Raises `ApiError`; whoever stops waiting cancels them."""
        wrapped = [asyncio.wrap_future(future) for future in futures]
        try:
            return await asyncio.wait_for(asyncio.gather(*wrapped), REPLY_TIMEOUT_S)
        except (TimeoutError, ModelError, RuntimeError, ValueError) as error:
            raise failure(error) from error
        finally:
            for future in futures:
                future.cancel()

    def head(self, kind: str) -> Head:
        """A new answer's id and time."""
        return Head(f"{kind}-{uuid.uuid4().hex}", int(time.time()), self.name)

    async def chat(self, body: ChatRequest) -> Completion:
        """A whole chat completion. Raises `ApiError`."""
        plan = self.plan_chat(body)
        generations = await self.wait(self.start(plan))
        head = self.head("chatcmpl")
        choices = [
            self.chat_choice(body, plan, index, made, head.id)
            for index, made in enumerate(generations)
        ]
        return Completion(head, plan.prompts, choices)

    async def text(self, body: TextRequest) -> Completion:
        """A whole text completion. Raises `ApiError`."""
        plan = self.plan_text(body)
        generations = await self.wait(self.start(plan))
        choices = [self.text_choice(body, plan, i, made) for i, made in enumerate(generations)]
        return Completion(self.head("cmpl"), plan.prompts, choices)

    def chat_choice(
        self, body: ChatRequest, plan: Plan, index: int, made: Generation, answer_id: str
    ) -> Choice:
        """A finished reply, taken apart into thinking, text and calls."""
        text, ids, finish = self._text(plan, made)
        salt = f"{answer_id}/{index}"
        reply, error, repaired = read_reply(text, plan.tools, finish, salt)
        return Choice(
            reply=reply,
            finish_reason="tool_calls" if reply.tool_calls and finish != "abort" else finish,
            constrained=plan.constrained,
            version=made.version,
            versions=made.versions,
            token_ids=ids,
            logprobs=self.entries(ids, made.logprobs, made.top) if body.wants_logprobs else None,
            prompt_token_ids=plan.prompt_of(index) if body.return_token_ids else None,
            tool_call_error=error,
            repaired=repaired,
            cached=made.cached,
        )

    def text_choice(self, body: TextRequest, plan: Plan, index: int, made: Generation) -> Choice:
        """A finished continuation, behind its prompt if the request wants an echo."""
        text, ids, finish = self._text(plan, made)
        entries = self.entries(ids, made.logprobs, made.top) if body.wants_logprobs else []
        versions = made.versions
        if body.max_tokens == 0:
            text, ids, entries, versions = "", [], [], []
            finish = "abort" if finish == "abort" else "length"
        if body.echo:
            before, scored = self.echo(plan.prompt_of(index), made.prompt)
            text, entries = before + text, scored + entries
        return Choice(
            reply=ParsedReply(text, "", []),
            finish_reason=finish,
            constrained=plan.constrained,
            version=made.version,
            versions=versions,
            token_ids=ids,
            logprobs=entries if body.wants_logprobs else None,
            prompt_token_ids=plan.prompt_of(index) if body.return_token_ids else None,
            cached=made.cached,
        )

    def echo(
        self, prompt: Sequence[int], scores: PromptScores | None
    ) -> tuple[str, list[TokenLogprob]]:
        """A prompt's text, and one entry for each of its tokens if they were scored."""
        text = self.tokenizer.decode(prompt)
        if scores is None:
            return text, []
        first = TokenLogprob(*self._token(prompt[0]), None)
        return text, [first, *self.entries(prompt[1:], scores.logprobs, scores.top)]

    def entries(
        self, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Top]
    ) -> list[TokenLogprob]:
        """One entry a token; `top` is empty where no alternatives were asked for."""
        return [
            TokenLogprob(
                *self._token(id),
                logprob,
                tuple(TokenLogprob(*self._token(other), value) for other, value in best),
            )
            for id, logprob, best in zip(ids, logprobs, top or [[]] * len(ids), strict=True)
        ]

    def _token(self, id: int) -> tuple[str, bytes]:
        return self.tokenizer.decode([id]), self.tokenizer.token_bytes(id)

    async def load(self, path: Path, version: int) -> float:
        """Serve another checkpoint of the same sizes and tokenizer; the seconds that this took,
        waiting for what runs left out. Raises `ApiError`, and then the old weights go on serving.

        The folder is read and checked beside what runs.
        """
        start = time.perf_counter()
        try:
            weights = await asyncio.to_thread(self._read, path)
            read = time.perf_counter() - start
            return read + await asyncio.wrap_future(self.batcher.load(weights, version))
        except BatcherClosedError as error:
            raise failure(error) from error
        except ModelError as error:
            raise ApiError(400, str(error), param="path", code="invalid_checkpoint") from error

    def _read(self, path: Path) -> NewWeights:
        if self._like is None:
            raise ModelError("this server takes no other weights")
        found = Tokenizer.load(path).hash
        if found != self.tokenizer.hash:
            raise ModelError(
                f"{path}: its tokenizer ({found[:12]}) is not the served one "
                f"({self.tokenizer.hash[:12]}); start another server for it"
            )
        return NewWeights.read(path, self._like)

    def models(self) -> Json:
        entry = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "selfevo",
            "max_model_len": self.context,
            "tokenizer_hash": self.tokenizer.hash,
        }
        return {"object": "list", "data": [entry]}

    def _check(self, body: CommonRequest) -> None:
        if body.model is not None and body.model != self.name:
            raise ApiError(
                404,
                f"model {body.model!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        body.check()
        try:
            self.batcher.check_room()  # before any work for it is done
        except QueueFullError as error:
            raise failure(error) from error

    def _request(
        self,
        body: CommonRequest,
        prompt: list[int],
        limit: int,
        index: int,
        grammar: Constraint | None,
        stops: Sequence[str],
        param: str,
    ) -> GenRequest:
        room = self.context - len(prompt)
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens but the context is {self.context}; "
                f"shorten the {param}",
                param=param,
                code="context_length_exceeded",
            )
        ends = [] if body.ignore_eos and grammar is None else [self.tokenizer.eos_id]
        constraint = grammar
        if stops:
            stop = StopText(self.tokenizer, stops)
            constraint = stop if grammar is None else Both(grammar, stop)
        asked = body.repetition_stop
        repetition = None if asked is None else (asked.tokens, asked.probability)
        return GenRequest(
            prompt_ids=tuple(prompt),
            max_new_tokens=min(limit, room),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            seed=_choice_seed(body.seed, index),
            stop_ids=frozenset([*ends, *(body.stop_token_ids or ())]),
            constraint=constraint,
            repetition=repetition,
        )

    def _call_grammar(self, body: ChatRequest, choice: str) -> Constraint | None:
        parallel = body.parallel_tool_calls is not False
        try:
            return self._grammars.tool_call(body.tools, choice, parallel=parallel)
        except GrammarError as error:
            raise ApiError(400, str(error), param="tools", code="invalid_value") from error

    def _json_grammar(self, schema: Json, *, chat: bool) -> Constraint:
        try:
            return self._grammars.json(schema, chat=chat)
        except GrammarError as error:
            raise ApiError(
                400, f"response_format: {error}", param="response_format", code="invalid_value"
            ) from error

    def _text(self, plan: Plan, made: Generation) -> tuple[str, list[int], str]:
        """The text without stop text and end mark, the ids, and why it ended. The ids are those
        that the model was asked for: they hold the stop text or mark."""
        text = self.tokenizer.decode([i for i in made.ids if i != self.tokenizer.eos_id])
        cut = cut_at_stop(text, plan.stops)
        return text if cut is None else cut, made.ids, made.finish_reason


def failure(error: Exception) -> ApiError:
    """What a client is told when its reply could not be made."""
    if isinstance(error, BatcherClosedError):
        return ApiError(503, str(error), param=None, code="shutting_down")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), param=None, code="queue_full")
    if isinstance(error, ResumedError):
        return ApiError(409, str(error), param=None, code="resumed")
    if isinstance(error, TimeoutError):
        reason = f"no reply within {REPLY_TIMEOUT_S:.0f} seconds"
        return ApiError(504, reason, param=None, code="timeout")
    return ApiError(500, f"generation failed: {error}", param=None, code="engine_error")


def _choice_seed(seed: int | None, index: int) -> int | None:
    """The first choice takes the request's seed; the others draw apart from every other seed."""
    if seed is None:
        return None
    if index == 0:
        return seed & (2**63 - 1)
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

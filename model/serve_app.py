"""The OpenAI-compatible application round one engine. `model.serve` starts it as a process."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from model.batching import Batcher, BatcherClosedError
from model.chat_format import (
    ChatFormatError,
    ParsedReply,
    ToolCallError,
    parse,
    render_ids,
    repair,
)
from model.errors import ModelError
from model.generate import Constraint, Generation, GenRequest
from model.grammar import GrammarError, GrammarFactory
from model.serve_types import ApiError, ChatRequest, Choice, Completion, Json, TokenLogprob
from model.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS: Final = 1024
"""Length of a reply where the request names none, within what the context leaves."""

_REPLY_TIMEOUT_S: Final = 3600.0


class StopText:
    """A constraint that allows every token and ends the reply once a stop text appears in it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [text.encode() for text in stops]
        self._keep = max(len(text) for text in self._stops)
        self._tail = b""
        self._done = False

    def mask(self) -> torch.Tensor | None:
        return None

    def accept(self, token_id: int) -> None:
        tail = self._tail + self._tokenizer.token_bytes(token_id)
        self._done = self._done or any(stop in tail for stop in self._stops)
        self._tail = tail[-self._keep :]

    def done(self) -> bool:
        return self._done


@dataclass(frozen=True)
class Plan:
    """A checked request: the prompt, and one engine request a choice."""

    prompt_ids: list[int]
    requests: list[GenRequest]
    tools: list[Json] | None
    constrained: bool


class ChatService:
    """Requests in, completions out; holds what a served checkpoint consists of.

    `context` is the most tokens that prompt and reply may have together.
    """

    def __init__(
        self,
        *,
        name: str,
        tokenizer: Tokenizer,
        batcher: Batcher,
        context: int,
        vocab_size: int,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.batcher = batcher
        self.context = context
        self.created = int(time.time())
        self._grammars = GrammarFactory(tokenizer, vocab_size)

    def plan(self, body: ChatRequest) -> Plan:
        """Checks a request against this model; raises `ApiError`."""
        if body.model is not None and body.model != self.name:
            raise ApiError(
                404,
                f"model {body.model!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        body.check()
        choice = body.choice_name
        tools = body.tools if body.tools and choice != "none" else None
        try:
            prompt_ids = render_ids(body.messages, tools, self.tokenizer)
        except ChatFormatError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        room = self.context - len(prompt_ids)
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt_ids)} tokens but the context is {self.context}; "
                "shorten the messages",
                param="messages",
                code="context_length_exceeded",
            )
        limit = body.max_completion_tokens or body.max_tokens or DEFAULT_MAX_TOKENS
        forced = choice not in (None, "none", "auto")
        requests = []
        for index in range(body.n or 1):
            request = GenRequest(
                prompt_ids=tuple(prompt_ids),
                max_new_tokens=min(limit, room),
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=max(body.top_k or 0, 0),
                seed=_choice_seed(body.seed, index),
                stop_ids=frozenset({self.tokenizer.eos_id}),
                constraint=self._constraint(body, choice if forced else None),
            )
            requests.append(request)
        return Plan(prompt_ids, requests, tools, forced)

    def _constraint(self, body: ChatRequest, choice: str | None) -> Constraint | None:
        if choice is None:
            return StopText(self.tokenizer, body.stops) if body.stops else None
        parallel = body.parallel_tool_calls is not False
        try:
            return self._grammars.tool_call(body.tools, choice, parallel=parallel)
        except GrammarError as error:
            raise ApiError(400, str(error), param="tools", code="invalid_value") from error

    async def complete(self, body: ChatRequest) -> Completion:
        """Generates all choices of a request. Raises `ApiError`."""
        plan = self.plan(body)
        try:
            futures = [self.batcher.submit(request) for request in plan.requests]
            generations = await asyncio.wait_for(_all(futures), _REPLY_TIMEOUT_S)
        except BatcherClosedError as error:
            raise ApiError(503, str(error), param=None, code="shutting_down") from error
        except TimeoutError as error:
            reason = f"no reply within {_REPLY_TIMEOUT_S:.0f} seconds"
            raise ApiError(504, reason, param=None, code="timeout") from error
        except (ModelError, RuntimeError, ValueError) as error:
            reason = f"generation failed: {error}"
            raise ApiError(500, reason, param=None, code="engine_error") from error
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        choices = [
            self._choice(body, plan, generation, f"{answer_id}/{index}")
            for index, generation in enumerate(generations)
        ]
        return Completion(
            answer_id, int(time.time()), self.name, len(plan.prompt_ids), tuple(choices)
        )

    def _choice(self, body: ChatRequest, plan: Plan, made: Generation, salt: str) -> Choice:
        ids, finish = list(made.ids), made.finish_reason
        text_ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_id else ids
        text = self.tokenizer.decode(text_ids)
        cut = min((at for stop in body.stops if (at := text.find(stop)) >= 0), default=None)
        if cut is not None and not plan.constrained:
            text, ids, finish = text[:cut], self._ids_through(text_ids, body.stops), "stop"
        reply, error, repaired = self._parse(text, plan.tools, finish, salt)
        logprobs = None
        if body.logprobs or body.return_token_ids:
            logprobs = [
                TokenLogprob(self.tokenizer.decode([i]), self.tokenizer.token_bytes(i), logprob)
                for i, logprob in zip(ids, made.logprobs, strict=False)
            ]
        return Choice(
            reply=reply,
            finish_reason="tool_calls" if reply.tool_calls else finish,
            constrained=plan.constrained,
            version=made.version,
            token_ids=ids,
            logprobs=logprobs,
            prompt_token_ids=plan.prompt_ids if body.return_token_ids else None,
            tool_call_error=error,
            repaired=repaired,
        )

    def _ids_through(self, ids: list[int], stops: Sequence[str]) -> list[int]:
        """The ids up to the one that completes the first stop text: those the model was asked."""
        watch = StopText(self.tokenizer, stops)
        for count, token_id in enumerate(ids, start=1):
            watch.accept(token_id)
            if watch.done():
                return ids[:count]
        return ids

    def _parse(
        self, text: str, tools: list[Json] | None, finish: str, salt: str
    ) -> tuple[ParsedReply, str | None, bool]:
        """The reply, why a call in it was no call, and whether it took the one repair.

        A reply cut off by its length is never repaired: half an argument must not be run.
        """
        try:
            return parse(text, tools, check_schema=False, id_salt=salt), None, False
        except ToolCallError as error:
            reason = str(error)
        if finish != "length":
            try:
                mended = repair(text, tools)
                return parse(mended, tools, check_schema=False, id_salt=salt), None, True
            except ToolCallError as error:
                reason = str(error)
        return parse(text, None, id_salt=salt), reason, False

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


async def _all(futures: Sequence[Future[Generation]]) -> list[Generation]:
    return list(await asyncio.gather(*(asyncio.wrap_future(future) for future in futures)))


def _choice_seed(seed: int | None, index: int) -> int | None:
    """The first choice takes the request's seed; the others draw apart from every other seed."""
    if seed is None:
        return None
    if index == 0:
        return seed & (2**63 - 1)
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def create_app(service: ChatService) -> FastAPI:
    """Routes /v1/chat/completions, /v1/models and /health over one service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close, 1.0)

    app = FastAPI(title="model.serve", lifespan=lifespan)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), status_code=error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        fault = ApiError(400, message, param=where or None, code="invalid_value")
        return JSONResponse(fault.body(), status_code=400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        fault = ApiError(error.status_code, message, param=None, code="unknown_url")
        return JSONResponse(fault.body(), status_code=error.status_code)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        completion = await service.complete(body)
        if not body.stream:
            return JSONResponse(completion.body())
        usage = bool(body.stream_options and body.stream_options.include_usage)
        events = completion.events(include_usage=usage)
        return StreamingResponse(events, media_type="text/event-stream")

    @app.get("/v1/models")
    async def models() -> Json:
        return service.models()

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Json:
        if name != service.name:
            raise ApiError(
                404, f"model {name!r} does not exist", param="model", code="model_not_found"
            )
        entry: Json = service.models()["data"][0]
        return entry

    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok", "model": service.name}

    return app

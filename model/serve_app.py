"""The OpenAI-compatible HTTP application round one service. `model.serve` starts it as a process.

A client that goes away ends its requests, whether they run or wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.serve_answers import Completion
from model.serve_control import add_control
from model.serve_stream import ChatStream, TextStream
from model.serve_types import ApiError, ChatRequest, Json, TextRequest
from model.service import Service, failure

MAX_BODY = 16 * 2**20
_CLIENT_GONE = 499  # nobody reads it; the access log shows it


def create_app(service: Service, *, control: bool = False) -> FastAPI:
    """Routes /v1/chat/completions, /v1/completions, /v1/models and /health over one service; with
    `control` those of `model.serve_control` too."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close, 1.0)

    app = FastAPI(title="model.serve", lifespan=lifespan)
    app.add_middleware(BodyLimit, most=MAX_BODY)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers())

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
        code = "unknown_url" if error.status_code in (404, 405) else "invalid_body"
        fault = ApiError(error.status_code, message, param=None, code=code)
        return JSONResponse(fault.body(), status_code=error.status_code)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        # The trace goes to the server's log; a client gets one line.
        fault = failure(error)
        return JSONResponse(fault.body(), status_code=fault.status)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        if body.stream:
            return _events(ChatStream(service, body))
        return await _answer(request, service.chat(body), Completion.chat_body)

    @app.post("/v1/completions")
    async def text(body: TextRequest, request: Request) -> Response:
        if body.stream:
            return _events(TextStream(service, body))
        return await _answer(request, service.text(body), Completion.text_body)

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
        running, waiting = service.batcher.counts
        return {"status": "ok", "model": service.name, "running": running, "waiting": waiting}

    if control:
        add_control(app, service)
    return app


class BodyLimit:
    """Refuses bodies of more than `most` bytes before they are held in memory."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                reason = f"the body has more than {self._most} bytes; send less at once"
                raise HTTPException(413, reason)
            return message

        await self._app(scope, counted, send)


def _events(stream: ChatStream | TextStream) -> Response:
    # The task ends replies of a client that went away before the first event.
    after = BackgroundTask(stream.cancel)
    return StreamingResponse(stream.events(), media_type="text/event-stream", background=after)


async def _answer(
    request: Request, work: Coroutine[None, None, Completion], body: Callable[[Completion], Json]
) -> Response:
    """The work's result as `body` writes it; a client that goes away first ends the work."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=_CLIENT_GONE)
        return JSONResponse(body(task.result()))
    finally:
        gone.cancel()
        task.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

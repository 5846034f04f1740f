"""The gateway's ASGI application: paths, keys, bodies, streams; nothing about calls.

`/e/<episode>/v1/…`, or `/v1/…` with the episode as API key. A `/v1` that a client's base URL
doubles or leaves out is forgiven. Plain ASGI, because a framework's routing and validation cost
more than the gateway's own work.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from starlette.types import Receive, Scope, Send

from rl.gateway.core import Gateway, as_message, digest_of
from rl.gateway.dialects import reading
from rl.gateway.dialects.chat import Chat
from rl.gateway.dialects.completions import Completions
from rl.gateway.dialects.messages import Messages
from rl.gateway.dialects.openai_errors import OpenAIErrors
from rl.gateway.dialects.responses import Responses, response_id, said_before
from rl.gateway.episodes import Episode
from rl.gateway.settings import filled, only
from rl.gateway.types import Answer, Ask, Dialect, GatewayError, Json

CONTROL_KEY = "SELFEVO_GATEWAY_KEY"
"""Variable of the environment: the API key that the control routes then want."""

_JSON = (b"content-type", b"application/json")
_EVENTS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


class App:
    """`max_body`: bytes of a request. `ping_s`: a stream that has nothing to say for so long gets a
    comment, that its client may wait on. `control_key`: without it /control is shut."""

    def __init__(
        self, gateway: Gateway, *, max_body: int, ping_s: float, control_key: str = ""
    ) -> None:
        self._control_key = control_key
        self._gateway = gateway
        self._ping_s = ping_s
        self._max_body = max_body
        self._dialects: dict[str, Dialect] = {
            "chat/completions": Chat(gateway.tokenizer),
            "completions": Completions(gateway.tokenizer),
            "responses": Responses(),
            "messages": Messages(),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        headers = dict(scope["headers"])
        errors: Any = OpenAIErrors()
        try:
            if path.startswith("/control/"):
                await self._control(scope, headers, receive, send)
                return
            if path in ("/healthz", "/health"):
                await _send(send, 200, self._gateway.health())
                return
            name, route = _route(path)
            counts = route == "messages/count_tokens"
            route = route.removesuffix("/count_tokens")
            errors = self._dialects.get(route, errors)
            if route == "models" or route.startswith("models/"):
                await _send(send, 200, self._models(route))
                return
            if route not in self._dialects:
                raise GatewayError(404, f"{path}: no such route", "unknown_url")
            if scope["method"] != "POST":
                raise GatewayError(405, f"{path}: POST only", "unknown_url")
            episode = self._gateway.of_caller(name, _key(headers))
            raw = await _body(receive, headers, self._max_body)
            if counts:
                ask = self._dialects[route].read(reading.parse(raw), {})
                tokens = self._gateway.count_tokens(episode, ask)
                await _send(send, 200, {"input_tokens": tokens})
                return
            await self._call(episode, route, raw, headers, receive, send)
        except GatewayError as error:
            await _send(send, error.status, errors.error(error))
        except _GoneError:
            return

    async def _call(
        self,
        episode: Episode,
        route: str,
        raw: bytes,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
    ) -> None:
        dialect = self._dialects[route]
        ask = dialect.read(reading.parse(raw), episode.responses)
        key = headers.get(b"idempotency-key", b"").decode("latin-1")
        retry = headers.get(b"x-stainless-retry-count", b"0") != b"0" or bool(key)
        digest = digest_of(route, raw, key)
        work = asyncio.ensure_future(self._answer(route, episode, digest, ask, retry))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            if ask.stream:
                await self._stream(dialect, ask, work, gone, send)
                return
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                answer = work.result()
                more = [(b"x-call-index", str(answer.index).encode())]
                await _send(send, 200, dialect.whole(ask, answer), more)
        finally:
            work.cancel()
            gone.cancel()

    async def _stream(
        self,
        dialect: Dialect,
        ask: Ask,
        work: asyncio.Future[Answer],
        gone: asyncio.Future[None],
        send: Send,
    ) -> None:
        """The events of an answer, which begin when it is recorded. Until the first ping an error
        still has its own status."""
        begun = False
        while not work.done():
            await asyncio.wait(
                (work, gone), timeout=self._ping_s, return_when=asyncio.FIRST_COMPLETED
            )
            if gone.done() and not work.done():
                return
            if not work.done():
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                begun = True
                await send({"type": "http.response.body", "body": dialect.ping, "more_body": True})
        try:
            answer = work.result()
        except GatewayError as error:
            if not begun:
                raise
            await send({"type": "http.response.body", "body": dialect.late_error(error)})
            return
        if not begun:
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        await send({"type": "http.response.body", "body": b"".join(dialect.events(ask, answer))})

    async def _answer(
        self, route: str, episode: Episode, digest: bytes, ask: Ask, retry: bool
    ) -> Answer:
        """The core's answer; what `previous_response_id` may name is kept."""
        answer = await self._gateway.answer(episode, digest, ask, retry=retry)
        if route == "responses" and ask.body.get("store") is not False:
            conversation = [*said_before(ask), as_message(answer.reply)]
            episode.responses[response_id(answer)] = conversation
        return answer

    # ---------------------------------------------------------- beside calls

    def _models(self, route: str) -> Json:
        card = self._gateway.engine.card | {"tokenizer_hash": self._gateway.tokenizer.hash}
        if route == "models":
            return {"object": "list", "data": [card]}
        return card | {"id": unquote(route.removeprefix("models/"))}

    async def _control(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        if self._control_key and not hmac.compare_digest(
            _key(headers).encode(), self._control_key.encode()
        ):
            raise GatewayError(401, f"/control wants the key in {CONTROL_KEY}", "wrong_key")
        what = scope["path"].removeprefix("/control/")
        if scope["method"] != "POST" or what not in ("open", "close"):
            raise GatewayError(404, "use POST /control/open or /control/close", "unknown_url")
        body = reading.parse(await _body(receive, headers, self._max_body))
        name = reading.text(body, "episode")
        if what == "close":
            await _send(send, 200, await self._gateway.close(name))
            return
        known = {"episode", "group", "sampling", "limits", "repeat", "key"}
        only(body, known)
        group = body.get("group", 0)
        if not isinstance(group, int) or isinstance(group, bool):
            raise GatewayError(400, "group: expected a whole number", "invalid_value", "group")
        repeat = body.get("repeat", self._gateway.repeat)
        if repeat not in ("join", "sample"):
            raise GatewayError(400, 'repeat: use "join" or "sample"', "invalid_value", "repeat")
        episode = self._gateway.open(
            name,
            group,
            filled(self._gateway.sampling, body.get("sampling"), "sampling"),
            filled(self._gateway.limits, body.get("limits"), "limits"),
            repeat,
            reading.text(body, "key"),
        )
        await _send(send, 200, {"episode": name, "path": f"/e/{name}/v1", "group": episode.group})


class _GoneError(Exception):
    """The client left before its body was whole."""


def _key(headers: Mapping[bytes, bytes]) -> str:
    """The API key, in Anthropic's header or OpenAI's."""
    bearer = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
    return (headers.get(b"x-api-key") or bearer).strip().decode("latin-1")


def _route(path: str) -> tuple[str | None, str]:
    """Episode, if it is named, and route of a path."""
    name = None
    if path.startswith("/e/"):
        name, _, path = path.removeprefix("/e/").partition("/")
        path = "/" + path
    while path == "/v1" or path.startswith("/v1/"):
        path = path.removeprefix("/v1")
    return name, path.strip("/")


async def _body(receive: Receive, headers: Mapping[bytes, bytes], most: int) -> bytes:
    fault = GatewayError(413, f"the body has more than {most} bytes", "body_too_large")
    with contextlib.suppress(ValueError):
        if int(headers.get(b"content-length", b"0")) > most:
            raise fault
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise fault
        if not message.get("more_body"):
            return b"".join(parts)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(
    send: Send, status: int, body: Json, more: list[tuple[bytes, bytes]] | None = None
) -> None:
    raw = reading.dumps(body)
    headers = [_JSON, (b"content-length", str(len(raw)).encode()), *(more or ())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})

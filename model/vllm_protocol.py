"""ASGI middleware that makes vLLM's server speak as our own does. Loaded with `--middleware`.

| what | vLLM alone | with this |
|---|---|---|
| `response_format` in chat | JSON lands in the reasoning | a short thought, then JSON as content |
| `tool_choice` required or named | a grammar with endless blanks | that of `model.grammar` |
| `return_token_ids` | ids only | ids in each choice, and log-probs |
| a bad tool call | dropped, or run although cut off | `tool_call_error`, or one repair |
| thinking | `reasoning` | `reasoning_content` too, without line breaks at its border |
| `constrained`, `version`, `versions` | – | in each choice |
| `routed_experts` | base64 of an array | a row of layers × experts a token, beside the ids |
| `POST /pause`, `POST /load` | other forms | `{"mode"}` and `{"path", "version"}`, as ours |

A request of another form passes untouched, and so does what it is answered.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.chat_format import read_reply
from model.config import load_config
from model.errors import ModelError
from model.grammar import MAX_CALLS, GrammarError, chosen_tools, reply_grammar
from model.json_format import json_reply
from model.serve_answers import Choice
from model.serve_types import ApiError, CommonRequest, Json
from model.tokenizer import Tokenizer
from model.vllm_spans import Replies, Spans

CHECKPOINT: Final = "SELFEVO_VLLM_CHECKPOINT"
MAX_BODY: Final = 16 * 2**20
_CHAT: Final = "/v1/chat/completions"
_TEXT: Final = "/v1/completions"
_DEFAULT_CHAT_TOKENS: Final = 1024


class Protocol:
    """Wraps vLLM's application. `version` is that of the weights of the last `/load`; before it,
    what SELFEVO_VLLM_VERSION says of the checkpoint."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        checkpoint = Path(os.environ[CHECKPOINT])
        self._tokenizer = Tokenizer.load(checkpoint)
        self._context = load_config(checkpoint).max_position_embeddings
        self._spans = Spans(int(os.environ.get("SELFEVO_VLLM_VERSION", "0")))
        self._pauses = 0  # that are not complete yet
        self._paused, self._loading = asyncio.Condition(), asyncio.Lock()

    @property
    def version(self) -> int:
        return self._spans.version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif path in (_CHAT, _TEXT):
            await self._complete(scope, receive, send)
        elif path == "/pause":
            await self._pause(scope, receive, send)
        elif path == "/load":
            await self._load(scope, receive, send)
        elif path == "/finish_weight_update":
            await self._finish(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await _body(receive)
        if len(raw) > MAX_BODY:
            reason = f"the body has more than {MAX_BODY} bytes; send less at once"
            fault = ApiError(413, reason, param=None, code="invalid_body")
            await _answer(send, fault.status, fault.body())
            return
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            await self._app(scope, _replay(raw, receive), send)
            return
        chat = scope["path"] == _CHAT
        ids = bool(body.get("return_token_ids"))
        tools = body.get("tools") if body.get("tool_choice") != "none" else None
        try:
            constrained = translate(body, self._tokenizer, self._context, chat=chat)
        except ApiError as error:
            await _answer(send, error.status, error.body())
            return
        if chat and tools and not body.get("stream"):
            body["return_token_ids"] = True  # to read the calls again, as our own server does
        self._spans.attach(_engine_of(scope))
        n = body["n"] if isinstance(body.get("n"), int) else 1
        with self._spans.following(n, texts=not chat) as replies:
            adapt = self._adapter(chat, constrained, ids, tools, replies)
            await self._app(
                scope, _replay(json.dumps(body).encode(), receive), _Rewriting(send, adapt).send
            )

    def _adapter(
        self, chat: bool, constrained: bool, ids: bool, tools: list[Json] | None, replies: Replies
    ) -> Callable[[Json], None]:
        begun = dict[int, _Thinking]()

        def adapt(body: Json) -> None:
            choices = body.get("choices")
            if not isinstance(choices, list):
                return
            whole = "usage" in body and not str(body.get("object")).endswith(".chunk")
            for choice in choices:
                if chat:
                    thinking = begun.setdefault(choice.get("index", 0), _Thinking())
                    thinking.adapt(choice.get("message"))
                    thinking.adapt(choice.get("delta"))
                    _tidy(choice.get("message"))
                    if tools and choice.get("message") and choice.get("token_ids"):
                        self._read_calls(choice, tools, str(body.get("id")))
                    if ids and body.get("prompt_token_ids") is not None:
                        choice["prompt_token_ids"] = body["prompt_token_ids"]
                    elif not ids:
                        choice.pop("token_ids", None)
                if whole or choice.get("finish_reason"):
                    spans = replies.spans(choice.get("index", 0))
                    choice |= {
                        "constrained": constrained,
                        "version": spans[-1][2] if spans else self.version,
                    }
                    if spans is not None:
                        choice["versions"] = spans
                experts = choice.pop("routed_experts", None)
                if ids and experts is not None:
                    choice["routed_experts"] = experts_of(experts)
            if whole:
                body["constrained"] = constrained
            if not ids:
                body.pop("prompt_token_ids", None)

        return adapt

    def _read_calls(self, choice: Json, tools: list[Json], answer_id: str) -> None:
        """vLLM drops a call of an unknown tool in silence and takes one that was cut off for
        whole: read the reply as our own server does, with its one repair and its reasons."""
        eos, finish = self._tokenizer.eos_id, choice.get("finish_reason")
        finish = "stop" if finish == "tool_calls" else str(finish)
        text = self._tokenizer.decode([id for id in choice["token_ids"] if id != eos])
        salt = f"{answer_id}/{choice.get('index', 0)}"
        try:
            reply, error, repaired = read_reply(text, tools, finish, salt)
        except ModelError:
            return  # tools that only vLLM understands
        read = Choice(
            reply=reply,
            finish_reason="tool_calls" if reply.tool_calls else finish,
            constrained=False,
            version=self.version,
            versions=[],
            token_ids=[],
            logprobs=None,
            prompt_token_ids=None,
            tool_call_error=error,
            repaired=repaired,
        )
        choice["message"].pop("tool_calls", None)
        choice["message"] |= read.message()
        extras = read.extras()
        del extras["version"], extras["versions"]  # these are known elsewhere
        choice |= {"finish_reason": read.finish_reason, **extras}

    async def _pause(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await _body(receive)
        try:
            mode = json.loads(raw).get("mode") if raw else None
        except (ValueError, AttributeError):
            await _refuse(send, 'the body must be {"mode": "wait", "keep" or "abort"}')
            return
        if mode is not None:
            scope = {**scope, "query_string": f"mode={mode}".encode()}
        self._pauses += 1
        try:
            await self._app(scope, _replay(b"", receive), send)
        finally:
            self._pauses -= 1
            async with self._paused:
                self._paused.notify_all()

    async def _finish(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The end of an update by ipc; its `weight_version` is the version from now on."""
        raw = await _body(receive)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    await self._spans.turn(int(json.loads(raw)["weight_version"]))
            await send(message)

        await self._app(scope, _replay(raw, receive), noting)

    async def _load(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Weights of a checkpoint folder of the same sizes. Pauses where nobody has paused."""
        if os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
            await self._app(scope, _replay(b"", receive), send)  # no such route
            return
        try:
            body = json.loads(await _body(receive))
            path, version = body["path"], body["version"]
        except (ValueError, KeyError, TypeError):
            path, version = None, None
        if not isinstance(path, str) or not isinstance(version, int):
            await _refuse(send, 'the body must be {"path": checkpoint folder, "version": number}')
            return
        if not (Path(path) / "config.json").is_file():
            await _refuse(send, f"path: no checkpoint in {path!r}")
            return
        async with self._loading:
            async with self._paused:
                await self._paused.wait_for(lambda: not self._pauses)
            await self._replace(_engine_of(scope), path, version)
        await _answer(send, 200, {"version": version})

    async def _replace(self, engine: Any, path: str, version: int) -> None:
        paused = await engine.is_paused()
        if not paused:
            await engine.pause_generation(mode="wait")
        try:
            await engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
            # a reply that a pause has frozen is read again with the new weights
            await engine.reset_prefix_cache(reset_running_requests=True)
            await self._spans.turn(version)
        finally:
            if not paused:
                await engine.resume_generation()


def translate(body: Json, tokenizer: Tokenizer, context: int, *, chat: bool) -> bool:
    """Turns a request of ours into one of vLLM's, in place; whether a grammar limits its reply.

    Raises `ApiError` where our own server would.
    """
    if body.get("return_token_ids"):
        if chat:
            body["logprobs"] = True
        elif body.get("logprobs") is None:
            body["logprobs"] = 0
    if chat and body.get("max_completion_tokens") is None and body.get("max_tokens") is None:
        body["max_tokens"] = _DEFAULT_CHAT_TOKENS
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], context)  # vLLM cuts it to the room that is left
    grammar = _grammar(body, tokenizer, chat)
    if grammar is None:
        return bool(body.get("structured_outputs"))
    body["structured_outputs"] = {"grammar": grammar}
    for name in ("response_format", "ignore_eos"):
        body.pop(name, None)
    return True


def experts_of(text: str) -> list[list[int]]:
    """vLLM's `routed_experts`, base64 of a saved array (tokens − 1, layers, experts a token), as a
    row of layers × experts for each token that was read: prompt and reply without the last."""
    import numpy as np

    rows = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    flat: list[list[int]] = rows.reshape(len(rows), -1).tolist()
    return flat


def _engine_of(scope: Scope) -> Any:
    app = scope.get("app")
    return None if app is None else app.state.engine_client


def _grammar(body: Json, tokenizer: Tokenizer, chat: bool) -> str | None:
    wanted = {"response_format": body.get("response_format")}
    if wanted["response_format"] is not None and not isinstance(wanted["response_format"], dict):
        return None  # vLLM refuses it
    choice = _choice_name(body.get("tool_choice")) if chat else None
    if choice not in (None, "none", "auto"):
        body["tool_choice"] = "auto"
        body.pop("stop", None)
        parallel = body.get("parallel_tool_calls") is not False
        try:
            tools = chosen_tools(body.get("tools"), str(choice))
            return reply_grammar(tools, tokenizer, max_calls=MAX_CALLS if parallel else 1)
        except GrammarError as error:
            raise ApiError(400, str(error), param="tools", code="invalid_value") from error
    schema = CommonRequest.model_validate(wanted).json_schema()
    return None if schema is None else json_reply(schema, tokenizer, chat=chat)


def _choice_name(choice: Any) -> str | None:
    if not isinstance(choice, dict):
        return choice if choice is None else str(choice)
    inner = choice.get("function", choice)
    return str(inner.get("name")) if isinstance(inner, dict) else ""


class _Thinking:
    """One reply's thought and text, in one piece or in many: the line break that ends the thought
    and the two that begin the text belong to neither."""

    def __init__(self) -> None:
        self._thought, self._text, self._begun = "", "", False

    def adapt(self, part: Any) -> None:
        if not isinstance(part, dict):
            return
        if isinstance(part.get("reasoning"), str):
            thought = self._thought + part["reasoning"]
            part["reasoning_content"] = thought.removesuffix("\n")
            self._thought = thought[len(part["reasoning_content"]) :]
        if isinstance(part.get("content"), str) and not self._begun:
            text = self._text + part["content"]
            self._begun = not "\n\n".startswith(text)
            part["content"] = text.removeprefix("\n\n") if self._begun else ""
            self._text = text


def _tidy(message: Any) -> None:
    """Fields that our own server always has."""
    if isinstance(message, dict):
        message.setdefault("reasoning_content", "")
        message["content"] = message.get("content") or (None if message.get("tool_calls") else "")


class _Rewriting:
    """Lets `adapt` change a JSON answer, or each event of a stream, on its way to `send`."""

    def __init__(self, send: Send, adapt: Callable[[Json], None]) -> None:
        self._send, self._adapt = send, adapt
        self._start: Message | None = None
        self._stream = False
        self._held = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._stream = kind.startswith(b"text/event-stream")
            self._start = message
            if self._stream:
                await self._send(message)
            return
        if message["type"] != "http.response.body" or self._start is None:
            await self._send(message)
            return
        self._held += message.get("body", b"")
        more = message.get("more_body", False)
        if self._stream:
            *events, self._held = self._held.split(b"\n\n")
            sent = b"".join(self._event(event) + b"\n\n" for event in events)
            if not more:
                sent += self._held
            await self._send({"type": message["type"], "body": sent, "more_body": more})
        elif not more:
            whole = self._changed(self._held)
            headers = [(k, v) for k, v in self._start["headers"] if k != b"content-length"]
            headers.append((b"content-length", str(len(whole)).encode()))
            await self._send({**self._start, "headers": headers})
            await self._send({"type": message["type"], "body": whole, "more_body": False})

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {"):
            return event
        return b"data: " + self._changed(event.removeprefix(b"data: "))

    def _changed(self, text: bytes) -> bytes:
        try:
            body = json.loads(text)
        except ValueError:
            return text
        if isinstance(body, dict):
            self._adapt(body)
        return json.dumps(body, ensure_ascii=False).encode()


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while sum(map(len, parts)) <= MAX_BODY:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            break
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever else comes: a client that leaves is still noticed."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, status: int, body: Json) -> None:
    raw = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})


async def _refuse(send: Send, reason: str) -> None:
    await _answer(send, 400, ApiError(400, reason, param=None, code="invalid_value").body())

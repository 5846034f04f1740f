"""A scripted OpenAI-compatible server over real HTTP: what it answers is decided by a function."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Answer = Callable[[dict[str, Any]], str | dict[str, Any] | int]
"""A request → the text of the reply, a whole message, or an HTTP status to fail with."""


class ModelDouble:
    """Serves on a free loopback port; keeps every request."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def reply(self, request: dict[str, Any]) -> str | dict[str, Any] | int:
        with self._lock:
            self.requests.append(request)
            return self.answer(request)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def prompt_of(request: dict[str, Any]) -> str:
    """All messages as one text."""
    return "\n".join(str(message.get("content") or "") for message in request["messages"])


def is_criticism(request: dict[str, Any]) -> bool:
    return "Criticise this step" in prompt_of(request)


def review(request: dict[str, Any]) -> dict[str, Any]:
    """The tool call that AIDE asks for: the score that the script printed, or a bug."""
    text = prompt_of(request)
    printed = re.findall(r"cross-validation score: ([-\d.e]+)", text.rpartition("output")[2])
    values = {
        "is_bug": "Traceback" in text or not printed,
        "summary": "It ran." if printed else "It failed.",
        "metric": float(printed[-1]) if printed else None,
        "lower_is_better": True,
    }
    name = request["tools"][0]["function"]["name"]
    call = {"name": name, "arguments": json.dumps(values)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call-0", "type": "function", "function": call}],
    }


def _handler(double: ModelDouble) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            double.keys.append(str(self.headers.get("Authorization")))
            found = double.reply(json.loads(body))
            status = found if isinstance(found, int) else 200
            message = found if isinstance(found, dict) else {"role": "assistant", "content": found}
            reply = {
                "id": "reply",
                "object": "chat.completion",
                "created": 0,
                "model": "double",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            }
            data = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    return Handler

"""Fixtures of the loop's tests: a real lab (git), and a fast compute plane beside the real one."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selfevo_driver import Sessions
from selfevo_lab import new_lab
from selfevo_outcome import signature

from selfevo.arms import Commands

DOUBLE = Path(__file__).with_name("selfevo_double.py")


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfevo.campaign.POLL_S", 0.02)
    monkeypatch.setenv("LANGGRAPH_STRICT_MSGPACK", "true")


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    return new_lab(tmp_path / "lab")


@pytest.fixture
def commands() -> Commands:
    return Commands(
        train=(sys.executable, str(DOUBLE), "train"),
        evaluate=(sys.executable, str(DOUBLE), "evaluate"),
        check_machine=False,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The signature of the rules campaign on the template's lab, with nothing in its way."""
    lab = new_lab(tmp_path_factory.mktemp("undisturbed") / "lab")
    with Sessions() as sessions:
        assert sessions.run(lab, "start") == 0, lab.with_suffix(".log").read_text()
    return signature(lab)


class Model:
    """A chat endpoint with prepared replies, in a thread; `requests` holds what it was asked.

    A reply is an assistant message, raw bytes (garbage), or an HTTP status. The last reply is
    repeated for ever.
    """

    def __init__(self, replies: list[object]) -> None:
        self.replies = list(replies)
        self.keys: list[str] = []
        self.requests: list[dict[str, Any]] = []
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, json.dumps({"object": "list", "data": []}).encode())

            def do_POST(self) -> None:
                model.keys.append(self.headers["Authorization"])
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                model.requests.append(json.loads(raw))
                reply = model.replies.pop(0) if len(model.replies) > 1 else model.replies[0]
                if isinstance(reply, int):
                    self._send(reply, b'{"error": {"message": "no"}}')
                elif isinstance(reply, bytes):
                    self._send(200, reply)
                else:
                    body = {
                        "id": "x",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "m",
                        "choices": [{"index": 0, "message": reply, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
                    }
                    self._send(200, json.dumps(body).encode())

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def model() -> Iterator[Callable[..., Model]]:
    """Start a scripted endpoint: `model(reply, …)`."""
    started: list[Model] = []

    def start(*replies: object) -> Model:
        started.append(Model(list(replies)))
        return started[-1]

    yield start
    for one in started:
        one.close()

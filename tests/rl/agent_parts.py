"""A gateway process before an engine, for tests of agents: the real nano, or a scripted one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from model.tokenizer import Tokenizer
from rl.checkpoints import bundled_checkpoint
from rl.pool import Pool
from rl.types import CallRecord

TOKENIZER = Tokenizer.load(bundled_checkpoint())


class ScriptedEngine:
    """Serves `/v1/models` and `/v1/completions` like `model.serve`; what it says is decided by a
    function from the prompt's text to a reply. Keeps the ids that it gave."""

    def __init__(self, say: Callable[[str], str]) -> None:
        self.say = say
        self.drawn: list[tuple[list[int], list[int]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        text = "</think>\n\n" + self.say(TOKENIZER.decode(request["prompt"]))
        ids = [*TOKENIZER.encode(text, specials=True), TOKENIZER.eos_id]
        self.drawn.append((request["prompt"], ids))
        choice = {
            "index": 0,
            "text": text,
            "token_ids": ids,
            "logprobs": {"token_logprobs": [-0.5 - i / 1024 for i in range(len(ids))]},
            "finish_reason": "stop",
            "version": 3,
        }
        return {"id": "x", "object": "text_completion", "choices": [choice]}

    def __enter__(self) -> ScriptedEngine:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(engine: ScriptedEngine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            card = {"id": "nano", "max_model_len": 8192, "tokenizer_hash": TOKENIZER.hash}
            self._send({"object": "list", "data": [card]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._send(engine.answer(json.loads(body)))

        def _send(self, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    return Handler


@dataclass(frozen=True)
class Stage:
    """A running gateway and its pool."""

    url: str
    pool: Path

    def open(self, episode: str, **more: Any) -> str:
        """Open an episode; returns its base URL."""
        body = {"episode": episode, **more}
        reply = httpx.post(f"{self.url}/control/open", json=body, timeout=30)
        assert reply.status_code == 200, reply.text
        return f"{self.url}/e/{episode}/v1"

    def close(self, episode: str) -> list[CallRecord]:
        """Close an episode; returns its records."""
        reply = httpx.post(f"{self.url}/control/close", json={"episode": episode}, timeout=30)
        assert reply.status_code == 200, reply.text
        with Pool(self.pool, create=False) as pool:
            return pool.calls(episode)


@contextmanager
def gateway(engine_url: str, folder: Path, *options: str) -> Iterator[Stage]:
    """A gateway process with the nano's tokenizer and a pool in `folder`."""
    port_file, pool = folder / "gateway-port", folder / "pool.sqlite"
    argv = [sys.executable, "-m", "rl.gateway", "--engine", engine_url, "--pool", str(pool)]
    argv += ["--model", str(bundled_checkpoint()), "--port", "0", "--port-file", str(port_file)]
    argv += ["--max-tokens", "64", "--exit-with-parent", "--quiet", *options]
    process = subprocess.Popen(argv)
    try:
        end = time.monotonic() + 120
        while not port_file.is_file():
            assert process.poll() is None, "the gateway ended"
            assert time.monotonic() < end, "the gateway does not listen"
            time.sleep(0.05)
        port = json.loads(port_file.read_text())["port"]
        yield Stage(f"http://127.0.0.1:{port}", pool)
    finally:
        process.terminate()
        process.wait(20)

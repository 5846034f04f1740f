"""A scripted engine behind real HTTP, and the gateway as a process, for tests of rl.gateway."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai

from model.tokenizer import Tokenizer
from rl.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "model" / "checkpoints" / "nano"
TOKENIZER = Tokenizer.load(NANO)
EOS = TOKENIZER.eos_id
HTTP = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
"""One client for all tests, because making one costs more than a call."""
Json = dict[str, Any]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "run",
            "description": "Runs code.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string"}, "options": {"type": "object"}},
                "required": ["code"],
            },
        },
    }
]
HELLO = [{"role": "user", "content": "Hello."}]
ANTHROPIC_TOOLS = [
    {
        "name": "run",
        "description": "Runs code.",
        "input_schema": TOOLS[0]["function"]["parameters"],
    }
]
FLAT_TOOLS = [{"type": "function", **TOOLS[0]["function"]}]
PATHS = ["chat/completions", "completions", "responses", "messages"]
CALLING = (
    "I must run it.\n</think>\n\nRunning:\n<minimax:tool_call>\n"
    '<invoke name="run">\n<parameter name="code">print(1)</parameter>\n'
    '<parameter name="options">{"b": 1.0, "a": [1, 2]}</parameter>\n</invoke>\n'
    "</minimax:tool_call>"
)


def odd_ids(text: str) -> list[int]:
    """Ids of a text that no encoder would choose: the rest of each third character apart."""
    ids: list[int] = []
    for mark in ("</think>", "<minimax:tool_call>", "</minimax:tool_call>"):
        head, found, tail = text.partition(mark)
        if found:
            return [*odd_ids(head), TOKENIZER.token_id(mark), *odd_ids(tail)]
    for at in range(0, len(text), 3):
        ids += TOKENIZER.encode(text[at : at + 3], specials=False)
    return ids


def answer(text: str = "Done.\n</think>\n\nAll is well.", **more: Any) -> Json:
    """A choice of the engine."""
    ids = more.pop("ids", None) or [*odd_ids(text), EOS]
    choice: Json = {
        "index": 0,
        "text": text,
        "finish_reason": "stop",
        "token_ids": ids,
        "logprobs": {"token_logprobs": [-0.5 - i / 64 for i in range(len(ids))]},
        "version": 7,
        "versions": [[0, len(ids), 7]],
        "constrained": False,
    }
    return choice | more


@dataclass
class ScriptedEngine:
    """`reply(body)` gives a choice, or (status, body). `bodies` are the requests that came."""

    url: str = ""
    reply: Callable[[Json], Any] = lambda body: answer()
    bodies: list[Json] = field(default_factory=list)
    hash: str = TOKENIZER.hash
    gate: threading.Event = field(default_factory=threading.Event)
    left: int = 0  # connections that their client closed before the answer
    server: ThreadingHTTPServer | None = None
    wires: list[socket.socket] = field(default_factory=list)

    def start(self, port: int = 0) -> None:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                engine.wires.append(self.connection)

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                card = {"id": "fake", "max_model_len": 4096, "tokenizer_hash": engine.hash}
                self.say(200, {"object": "list", "data": [card]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                engine.bodies.append(body)
                found = engine.reply(body)
                while not engine.gate.wait(0.02):
                    self.connection.settimeout(0.001)
                    with contextlib.suppress(TimeoutError):
                        if not self.connection.recv(1):
                            engine.left += 1
                            self.close_connection = True
                            return
                    self.connection.settimeout(None)
                if found is None:
                    self.close_connection = True
                    return
                if isinstance(found, tuple):
                    self.say(*found)
                    return
                self.say(200, {"choices": [found], "usage": {}})

            def say(self, status: int, body: Any) -> None:
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(raw)

        self.gate.set()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        assert self.server is not None
        self.server.shutdown()
        self.server.server_close()
        for wire in self.wires:
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)

    def prompts(self) -> list[list[int]]:
        return [body["prompt"] for body in self.bodies]


@dataclass
class Running:
    """A gateway process."""

    url: str
    pool_path: Path
    process: subprocess.Popen[str]

    def open(self, episode: str, **settings: Any) -> str:
        """Opens an episode; its base URL."""
        self.control("open", {"episode": episode, "group": 3, **settings}).raise_for_status()
        return f"{self.url}/e/{episode}/v1"

    def control(self, what: str, body: Json) -> httpx.Response:
        return HTTP.post(f"{self.url}/control/{what}", json=body)

    def counts(self) -> Json:
        found: Json = HTTP.get(f"{self.url}/healthz").json()["counts"]
        return found

    def pool(self) -> Pool:
        return Pool(self.pool_path, create=False)


def start_gateway(engine: str, folder: Path, *options: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rl.gateway", "--engine", engine, "--model", str(NANO)]
    command += ["--pool", str(folder / "pool.db"), "--port", "0", "--quiet"]
    command += ["--port-file", str(folder / "gateway.json"), "--exit-with-parent", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | more.pop("env", {})
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, **more)


@contextlib.contextmanager
def gateway(engine: str, folder: Path, *options: str, **more: Any) -> Iterator[Running]:
    """A gateway before an engine, for as long as the block runs."""
    process = start_gateway(engine, folder, *options, **more)
    try:
        port_file = folder / "gateway.json"
        until = time.monotonic() + 60
        while not port_file.exists():
            assert process.poll() is None and time.monotonic() < until, process.stderr.read()
            time.sleep(0.02)
        port = json.loads(port_file.read_text())["port"]
        yield Running(f"http://127.0.0.1:{port}", folder / "pool.db", process)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        process.stderr.close()
        (folder / "gateway.json").unlink(missing_ok=True)


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def client(url: str, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", **({"max_retries": 0} | more))


def ask_of(path: str, **more: Any) -> Json:
    """The least request of a dialect."""
    body: Json = {"model": "m", "messages": HELLO}
    if path == "completions":
        body = {"model": "m", "prompt": "Hello.", "max_tokens": 50}
    elif path == "responses":
        body = {"model": "m", "input": "Hello."}
    elif path == "messages":
        body |= {"max_tokens": 50}
    return body | more


def post(url: str, path: str, body: Any, **more: Any) -> httpx.Response:
    return HTTP.post(f"{url}/{path}", json=body, **more)

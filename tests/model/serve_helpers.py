"""A tiny random model behind the real server, for the tests of serving."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import openai
import uvicorn

from model.batching import Batcher
from model.config import PRESETS
from model.generate import Engine, GenRequest, Row
from model.running import RunningBatch
from model.serve_app import create_app
from model.service import Service
from model.tokenizer import Tokenizer, train_tokenizer
from model.transformer import Transformer

CONTEXT = 1200
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two small numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"type": "integer", "minimum": 0, "maximum": 99},
                "mood": {"type": "string", "enum": ["calm", "hasty"]},
            },
            "required": ["a", "b", "mood"],
        },
    },
}
HELLO = [{"role": "user", "content": "say some words"}]


class Counting(RunningBatch):
    """The real runner; it also notes how many rows each step had, and can be held: by the gate, or
    by a semaphore that every step takes from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: deque[int] = deque(maxlen=100_000)
        self.gate = threading.Event()
        self.gate.set()
        self.pace: threading.Semaphore | None = None

    def step(self) -> list[Row]:
        assert self.gate.wait(600)
        assert self.pace is None or self.pace.acquire(timeout=600)
        self.sizes.append(self.running)
        return super().step()


@dataclass
class Scripted:
    """A runner that writes given texts, for replies that a random model would never write."""

    tokenizer: Tokenizer
    texts: list[str] = field(default_factory=list)
    finish: str = "stop"
    broken: Exception | None = None
    rows: dict[Row, list[int]] = field(default_factory=dict)
    version: int = 4

    def check(self, request: GenRequest) -> None:
        pass

    def room(self, waiting: Sequence[GenRequest]) -> int:
        return len(waiting)

    def join(self, rows: Sequence[Row]) -> None:
        if self.broken is not None:
            raise self.broken
        for row in rows:
            self.rows[row] = self.tokenizer.encode(self.texts.pop(0))

    def step(self) -> list[Row]:
        ended = []
        for row, ids in self.rows.items():
            row.add(ids.pop(0), -0.5)
            if row.finish is None and not ids:
                row.finish = self.finish
            if row.finish is not None:
                ended.append(row)
        self.drop(ended)
        return ended

    def drop(self, rows: Collection[Row]) -> None:
        for row in rows:
            del self.rows[row]

    def clear(self) -> None:
        self.rows.clear()

    def load(self, source: object, version: int) -> None:
        raise AssertionError("not used here")


@dataclass
class Served:
    url: str
    service: Service
    model: Transformer
    runner: Counting
    tokenizer: Tokenizer
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def health(self) -> dict[str, Any]:
        return self.http.get(f"{self.url}/health").json()

    def until(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Asks for the server's health until it is as wanted."""
        for _ in range(6000):
            if done(health := self.health()):
                return health
            time.sleep(0.01)
        raise AssertionError(f"the server stays at {health}")

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The parsed events of a stream, which must end as OpenAI's do."""
        url, wanted = f"{self.url}/v1/{path}", {**body, "stream": True}
        with self.http.stream("POST", url, json=wanted) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def tiny_tokenizer() -> Tokenizer:
    text = '\n<invoke name="add">\n<parameter name="a"> say some words to learn </parameter>'
    return train_tokenizer([text] * 50, vocab_size=400)


def tiny_model(vocab_size: int) -> Transformer:
    config = replace(
        PRESETS["nano"],
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rotary_dim=4,
        num_local_experts=4,
        max_position_embeddings=CONTEXT,
    )
    return Transformer(config, seed=3)


@contextmanager
def serving(service: Service, *, control: bool = False) -> Iterator[str]:
    """The server in a thread; gives its address."""
    app = create_app(service, control=control)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(1500):
        if server.started:
            break
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def served(
    *, max_batch: int = 64, max_queue: int = 512, control: bool = False, **more: Any
) -> Iterator[Served]:
    """A tiny random model behind a real server; `more` goes to the running batch."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.vocab_size + 16)
    runner = Counting(Engine(model, device="cpu"), max_batch=max_batch, **more)
    service = Service(
        name="tiny",
        tokenizer=tokenizer,
        batcher=Batcher(runner, max_batch=max_batch, max_queue=max_queue),
        context=CONTEXT,
        vocab_size=model.config.vocab_size,
        like=model,
    )
    with serving(service, control=control) as url:
        server = Served(url, service, model, runner, tokenizer)
        yield server
        server.http.close()

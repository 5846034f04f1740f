"""A tiny random model behind the real server, for the tests of serving."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import openai
import uvicorn

from model.config import PRESETS
from model.generate import Engine, Generation, GenRequest
from model.serve_app import ChatService, create_app
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


class CountingEngine(Engine):
    """The real engine; it also notes how many requests came in each batch."""

    def generate(self, requests: list[GenRequest]) -> list[Generation]:
        self.batches = [*getattr(self, "batches", []), len(requests)]
        return super().generate(requests)


@dataclass
class Scripted:
    """An engine that writes given texts, for replies that a random model would never write."""

    tokenizer: Tokenizer
    texts: list[str] = field(default_factory=list)
    finish: str = "stop"

    def generate(self, requests: list[GenRequest]) -> list[Generation]:
        made = []
        for _ in requests:
            ids = self.tokenizer.encode(self.texts.pop(0))
            made.append(Generation(ids, [-0.5] * len(ids), self.finish, False, 4))
        return made

    def load(self, source: object, version: int) -> None:
        raise AssertionError("not used here")


@dataclass
class Served:
    url: str
    service: ChatService
    model: Transformer
    engine: CountingEngine
    tokenizer: Tokenizer

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


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


def running(service: ChatService) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(600):
        if server.started:
            break
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)

"""A canned engine for `benchmarks.gateway`: token ids in, one of a few fixed replies out, at once.

The replies are hostile to whoever renders a conversation anew: they think, they call a tool with
JSON inside, and their ids are not those that an encoder would choose. Which one is given depends
on the prompt's ids alone, so that a record can be checked without the engine.

`python -m benchmarks.gateway_engine FILE` serves on a free port of 127.0.0.1 and writes it to FILE.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from benchmarks.common import ROOT
from model.port_file import write_port_file
from model.serve_answers import TokenLogprob, text_logprobs
from model.tokenizer import CALL, CALL_END, EOS, THINK_END, Tokenizer

NANO = ROOT / "model" / "checkpoints" / "nano"
REPLIES = 32
CONTEXT = 100_000


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(NANO)


def pieces(rng: random.Random, text: str) -> list[int]:
    """Ids of a text as a model may write them: encoded in pieces of random lengths."""
    ids: list[int] = []
    at = 0
    while at < len(text):
        size = rng.choice((2, 3, 7, 19))
        ids += tokenizer().encode(text[at : at + size], specials=False)
        at += size
    return ids


@cache
def replies() -> list[list[int]]:
    """The fixed replies: thought, text, a call with nested JSON, and the end mark."""
    found = []
    mark = tokenizer().token_id
    for number in range(REPLIES):
        rng = random.Random(number)
        words = " ".join(
            rng.choice(("train", "model", "fold", "mean", "42", "é")) for _ in range(9)
        )
        call = (
            f'\n<invoke name="run">\n<parameter name="code">x = {{"n": {number}}}\nprint(x)'
            f'</parameter>\n<parameter name="options">{{"b": {number}.0,   "a": [1, {{"z": null, '
            f'"k": "{words[:6]}"}}]}}</parameter>\n</invoke>\n'
        )
        ids = [*pieces(rng, f"Let me see: {words}.\n"), mark(THINK_END)]
        ids += [*pieces(rng, f"\n\nStep {number}: {words}\n"), mark(CALL), *pieces(rng, call)]
        found.append([*ids, mark(CALL_END), mark(EOS)])
    return found


def logprobs(number: int) -> list[float]:
    """One for each id of a reply."""
    rng = random.Random(number)
    return [-rng.random() for _ in replies()[number]]


def choice_of(prompt: Sequence[int]) -> int:
    """Which reply a prompt gets."""
    return (len(prompt) * 31 + prompt[-4] * 7 + prompt[len(prompt) // 2]) % REPLIES


@cache
def answers() -> list[bytes]:
    """The replies as whole HTTP answers, in the shape that `model.serve` gives."""
    found = []
    for number, ids in enumerate(replies()):
        entries = [
            TokenLogprob(tokenizer().decode([id]), tokenizer().token_bytes(id), value)
            for id, value in zip(ids, logprobs(number), strict=True)
        ]
        choice: dict[str, Any] = {
            "index": 0,
            "text": tokenizer().decode(ids[:-1]),
            "finish_reason": "stop",
            "logprobs": text_logprobs(entries),
            "token_ids": ids,
            "constrained": False,
            "version": 3,
            "versions": [[0, len(ids), 3]],
        }
        usage = {"prompt_tokens": 0, "completion_tokens": len(ids), "total_tokens": len(ids)}
        body = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "canned"}
        found.append(_http(orjson.dumps(body | {"choices": [choice], "usage": usage})))
    return found


def _http(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


class Connection(asyncio.Protocol):
    """Just enough HTTP for one client that sends whole requests with a Content-Length."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            _, _, rest = head.partition(b"content-length:")
            size = int(rest.split(b"\r\n")[0]) if rest else 0
            body = self._buffer[end + 4 : end + 4 + size]
            if len(body) < size:
                return
            self._buffer = self._buffer[end + 4 + size :]
            if head.startswith(b"get"):
                card = {
                    "id": "canned",
                    "max_model_len": CONTEXT,
                    "tokenizer_hash": tokenizer().hash,
                }
                self._transport.write(_http(orjson.dumps({"data": [card]})))
            else:
                self._transport.write(answers()[choice_of(orjson.loads(body)["prompt"])])


async def serve(port_file: Path) -> None:
    """Until the process is ended."""
    answers()
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    write_port_file(port_file, server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))

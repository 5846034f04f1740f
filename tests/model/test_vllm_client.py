"""The HTTP engine client: against our own server, and what it asks of which kind of server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_helpers import HELLO, Served, served, tiny_model

from model.checkpoint import load_model
from model.generate import Engine, GenRequest
from rl.engine import LocalClient
from rl.engine_http import HttpEngine, wire
from rl.errors import ConfigError, InfraError
from rl.weight_sync import WeightPush

REQUEST = GenRequest(prompt_ids=(11, 12, 13), max_new_tokens=6, temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as found:
        yield found


class Recorder(ThreadingHTTPServer):
    """A server that notes what it is asked and answers from a table of paths."""

    def __init__(self, answers: dict[str, tuple[int, Any]]) -> None:
        self.answers, self.asked = answers, list[tuple[str, Any]]()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Recorder

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _reply(self, body: Any) -> None:
        path = self.path.partition("?")[0]
        status, value = self.server.answers.get(path, (404, {"detail": "Not Found"}))
        if body is not None and status == 200:
            self.server.asked.append((self.path, body))
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def recording(*paths: str, **answers: Any) -> Iterator[Recorder]:
    """A recorder whose `paths` answer {}."""
    table = {path: (200, {}) for path in paths} | answers
    with Recorder(table) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()


def test_ids_and_logprobs_are_those_of_the_engine(server: Served) -> None:
    requests = [
        replace(REQUEST, seed=seed, temperature=heat, prompt_ids=(11, 12 + seed))
        for seed in range(5)
        for heat in (0.0, 1.0)
    ]
    expected = Engine(server.model, device="cpu").generate(requests)
    with HttpEngine(f"{server.url}/v1") as engine:
        assert not engine.is_vllm
        made = engine.generate(requests)
    for mine, theirs in zip(made, expected, strict=True):
        assert mine.ids == theirs.ids and mine.finish_reason == theirs.finish_reason
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert mine.version == 0 and not mine.constrained


def test_a_reply_ends_at_the_ids_that_are_named(server: Served) -> None:
    with HttpEngine(server.url) as engine:
        whole = engine.submit(REQUEST)
        stop = whole.ids[2]
        made = engine.submit(replace(REQUEST, stop_ids=frozenset({stop})))
    assert made.ids == whole.ids[: whole.ids.index(stop) + 1] and made.finish_reason == "stop"


def test_a_chat_client_works_over_it(server: Served) -> None:
    with HttpEngine(server.url) as engine:
        client = LocalClient(engine.submit, server.tokenizer, context=1200)
        reply = client.chat(HELLO, max_tokens=8, seed=3)
    assert len(reply.response_ids) == len(reply.logprobs) == 8 and reply.versions == ((0, 8, 0),)


def test_our_own_server_gets_its_forms() -> None:
    with recording("/pause", "/load", "/resume") as found, HttpEngine(found.url) as engine:
        engine.pause("keep")
        engine.load(Path("/some/where"), 4)
        engine.resume()
        assert engine.version == 4
    assert found.asked == [
        ("/pause", {"mode": "keep"}),
        ("/load", {"path": "/some/where", "version": 4}),
        ("/resume", {}),
    ]


def test_a_plain_vllm_gets_its_own_forms() -> None:
    paths = ("/version", "/pause", "/collective_rpc", "/reset_prefix_cache", "/resume")
    with recording(*paths) as found, HttpEngine(found.url) as engine:
        assert engine.is_vllm
        engine.pause("wait")
        engine.load(Path("/some/where"), 4)
        engine.resume()
        assert engine.version == 4
    reload = {"method": "reload_weights", "kwargs": {"weights_path": "/some/where"}}
    assert found.asked == [
        ("/pause?mode=wait", {"mode": "wait"}),
        ("/collective_rpc", reload),
        ("/reset_prefix_cache", {}),
        ("/resume", {}),
    ]


def test_weights_by_file_are_the_models_and_the_engine_goes_on(tmp_path: Path) -> None:
    model = tiny_model(400)
    with recording("/pause", "/load", "/resume") as found, HttpEngine(found.url) as engine:
        push = WeightPush(engine, "file", folder=tmp_path / "w", dtype=torch.float32)
        push.push(model, 1)
        again = load_model(tmp_path / "w")
        for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        found.answers["/load"] = (500, {"error": {"message": "no room"}})
        with pytest.raises(InfraError, match="no room"):
            push.push(model, 2)
        assert engine.version == 1
        asked = [path for path, _ in found.asked]
        assert asked == ["/pause", "/load", "/resume", "/pause", "/resume"]
        push.close()
        assert not (tmp_path / "w").exists()


def test_weights_by_ipc_want_vllm_and_a_card(server: Served) -> None:
    with HttpEngine(server.url) as engine:
        with pytest.raises(ConfigError, match="need a vLLM engine; use way file"):
            WeightPush(engine, "ipc")
        with pytest.raises(ConfigError, match="need a folder"):
            WeightPush(engine, "file")
    with recording("/version") as found, HttpEngine(found.url) as engine:
        with pytest.raises(ConfigError, match="need a model on a card, not on cpu"):
            WeightPush(engine, "ipc").push(tiny_model(400), 1)
        assert not found.asked


def test_a_server_without_control_says_how_to_start_it(server: Served) -> None:
    with HttpEngine(server.url) as engine, pytest.raises(ConfigError, match="with --control"):
        engine.pause()


def test_a_repetition_stop_goes_along() -> None:
    body = wire(replace(REQUEST, repetition=(5, 0.9)))
    assert body["repetition_stop"] == {"tokens": 5, "probability": 0.9}
    assert "repetition_stop" not in wire(REQUEST)


def test_a_constraint_stays_at_home() -> None:
    with pytest.raises(ConfigError, match="cannot go over HTTP"):
        wire(replace(REQUEST, constraint=object()))  # type: ignore[arg-type]


COMPLETIONS = "/v1/completions"
GOOD = {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("status", "body", "error", "reason"),
    [
        (429, {"error": {"message": "queue is full"}}, InfraError, "answered 429: queue is full"),
        (503, b"nothing", InfraError, "answered 503: nothing"),
        (400, {"error": {"message": "too\nlong"}}, ConfigError, "refused the request: too long"),
        (200, b"<html>", InfraError, "no JSON"),
        (200, {"choices": []}, InfraError, "no ids with log-probs"),
        (200, {"choices": [GOOD | {"logprobs": None}], "usage": {}}, InfraError, "no ids"),
        (200, {"choices": [GOOD | {"token_ids": [5, 6]}], "usage": {}}, InfraError, "2 ids and 1"),
        (
            200,
            b'{"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [NaN]},'
            b' "finish_reason": "stop"}], "usage": {}}',
            InfraError,
            "not finite",
        ),
    ],
)
def test_what_is_no_answer_is_an_error_with_its_reason(
    status: int, body: Any, error: type[Exception], reason: str
) -> None:
    with (
        recording(**{COMPLETIONS: (status, body)}) as found,
        HttpEngine(found.url) as engine,
        pytest.raises(error, match=reason),
    ):
        engine.submit(REQUEST)


def test_a_server_that_is_not_there_is_an_infra_error() -> None:
    with pytest.raises(InfraError, match="is not reachable"):
        HttpEngine("http://127.0.0.1:9")


def test_a_server_that_does_not_answer_is_an_infra_error(server: Served) -> None:
    with HttpEngine(server.url, timeout_s=0.3) as engine:
        server.runner.gate.clear()
        try:
            with pytest.raises(InfraError, match="no answer in time"):
                engine.submit(REQUEST)
        finally:
            server.runner.gate.set()

"""The control routes over HTTP: pause, load, resume, and what clients see of them."""

import concurrent.futures
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serve_helpers import CONTEXT, HELLO, Served, served, tiny_model, tiny_tokenizer
from small_model import spoil
from test_serve_process import start, wait_for

from model.checkpoint import save_checkpoint
from model.serve import main
from model.tokenizer import train_tokenizer
from model.transformer import Transformer

ASK = {"prompt": [20, 30, 40], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
ASK |= {"return_token_ids": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes checkpoints of the served sizes: `folders(name, change)`."""
    root = tmp_path_factory.mktemp("control")
    tokenizer = tiny_tokenizer()
    tokenizer.save(root / "tokenizer")

    def made(name: str, change: Callable[[Transformer], None] = lambda _: None, **more) -> Path:
        model = tiny_model(more.pop("vocab", tokenizer.vocab_size + 16))
        with torch.no_grad():
            change(model)
        more = {"tokenizer_from": root / "tokenizer", "dtype": "float32"} | more
        return save_checkpoint(model, root / name, **more)

    return made


@pytest.fixture(scope="module", name="served")
def a_server() -> Iterator[Served]:
    with served(control=True, max_batch=4, max_queue=4) as server:
        yield server


@pytest.fixture(autouse=True)
def _moving(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        server = request.getfixturevalue("served")
        server.runner.pace = None
        server.runner.gate.set()
        server.http.post(f"{server.url}/pause", json={"mode": "abort"})
        server.http.post(f"{server.url}/resume")


def post(server: Served, route: str, body: Any = None, status: int = 200) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/{route}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def ask(server: Served, **more: Any) -> dict[str, Any]:
    [choice] = post(server, "v1/completions", ASK | more)["choices"]
    return choice


def hold_after(server: Served, steps: int, pool: concurrent.futures.Executor, **more: Any):
    """A request that stands still, paused with "keep", after this many steps."""
    server.runner.pace = pace = threading.Semaphore(steps)
    before = len(server.runner.sizes)
    future = pool.submit(ask, server, **more)
    server.until(lambda health: health["running"] and len(server.runner.sizes) == before + steps)
    paused = pool.submit(post, server, "pause", {"mode": "keep"})
    while server.service.batcher.paused is None:
        pass
    server.runner.pace = None
    pace.release()  # the step that waits for the semaphore still runs
    assert paused.result(60)["status"] == "paused"
    return future


def test_a_reply_spans_versions(served: Served, folders) -> None:
    other = folders("other", lambda model: model.lm_head.mul_(-1))
    plain = ask(served)
    assert plain["version"] == 0 and plain["versions"] == [[0, 30, 0]]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        future = hold_after(served, 9, pool)
        state = served.http.get(f"{served.url}/is_paused").json()
        assert state == {
            "is_paused": True,
            "mode": "keep",
            "running": 1,
            "waiting": 0,
            "version": 0,
        }
        loaded = post(served, "load", {"path": str(other), "version": 4})
        assert loaded["status"] == "loaded" and loaded["version"] == 4 and loaded["seconds"] > 0
        assert not future.done()
        assert post(served, "resume")["is_paused"] is False
        choice = future.result(60)
    assert choice["version"] == 4 and choice["versions"] == [[0, 10, 0], [10, 30, 4]]
    assert choice["token_ids"][:10] == plain["token_ids"][:10]
    assert choice["token_ids"][10:] != plain["token_ids"][10:]
    # A stream says the same at its end, and a new request is the new weights' alone.
    [last] = served.events("completions", **ASK)[-1]["choices"]
    assert last["versions"] == [[0, 30, 4]]
    post(served, "load", {"path": str(folders("first")), "version": 0})
    assert ask(served)["token_ids"] == plain["token_ids"]


def test_abort_answers_with_what_there_is(served: Served) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        future = hold_after(served, 5, pool)
        assert post(served, "pause")["mode"] == "abort"  # as vLLM, where no mode is named
        choice = future.result(60)
    assert choice["finish_reason"] == "abort" and len(choice["token_ids"]) == 6
    assert choice["versions"] == [[0, 6, 0]]


def test_an_aborted_chat_is_told_so(served: Served) -> None:
    served.runner.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        body = {"messages": HELLO, "max_tokens": 50, "n": 2, "ignore_eos": True}
        whole = pool.submit(post, served, "v1/chat/completions", body)
        stream = pool.submit(served.events, "chat/completions", **body)
        served.until(lambda health: health["running"] + health["waiting"] == 4)
        paused = pool.submit(post, served, "pause", {"mode": "abort"})
        while served.service.batcher.paused is None:
            pass
        served.runner.gate.set()
        paused.result(60)
        choices = whole.result(60)["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["abort", "abort"]
        ends = [choice for event in stream.result(60) for choice in event["choices"]]
        assert [c["finish_reason"] for c in ends if c["finish_reason"]] == ["abort", "abort"]


def test_wait_ends_what_runs_and_holds_what_comes(served: Served) -> None:
    served.runner.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, served)
        served.until(lambda health: health["running"])
        paused = pool.submit(post, served, "pause?mode=wait")
        while served.service.batcher.paused is None:
            pass
        second = pool.submit(ask, served)
        served.until(lambda health: health["waiting"])
        assert not paused.done()
        served.runner.gate.set()
        assert paused.result(60)["running"] == 0 and paused.result(60)["waiting"] == 1
        assert first.result(60)["finish_reason"] == "length" and not second.done()
        post(served, "resume")
        assert second.result(60)["finish_reason"] == "length"


def test_resuming_a_pause_that_is_not_complete(served: Served) -> None:
    served.runner.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, served)
        served.until(lambda health: health["running"])
        paused = pool.submit(post, served, "pause", {"mode": "wait"}, 409)
        while served.service.batcher.paused is None:
            pass
        post(served, "resume")
        assert paused.result(60)["error"]["code"] == "resumed"
        served.runner.gate.set()
        assert first.result(60)["finish_reason"] == "length"


def test_without_a_pause_weights_wait_for_what_runs(served: Served, folders) -> None:
    other = folders("later", lambda model: model.lm_head.mul_(-1))
    served.runner.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, served)
        served.until(lambda health: health["running"])
        loaded = pool.submit(post, served, "load", {"path": str(other), "version": 8})
        while not served.service.batcher._reloads:
            assert not loaded.done()
        second = pool.submit(ask, served)
        served.until(lambda health: health["waiting"])
        served.runner.gate.set()
        assert first.result(60)["versions"] == [[0, 30, 0]]
        assert loaded.result(60)["version"] == 8
        assert second.result(60)["versions"] == [[0, 30, 8]]
    post(served, "load", {"path": str(folders("first")), "version": 0})


NAN = "model.layers.0.self_attn.o_proj.weight"


def test_weights_that_cannot_be_used_leave_the_old_ones_serving(
    served: Served, folders, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(["quite other words"] * 50, vocab_size=400)
    tokenizer.save(tmp_path)
    before = ask(served)
    cut = folders("cut")
    shard = max(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    extra = folders("extra")
    index = json.loads((extra / "model.safetensors.index.json").read_text())
    index["weight_map"]["one.more"] = next(iter(index["weight_map"].values()))
    (extra / "model.safetensors.index.json").write_text(json.dumps(index))
    for path, reason in (
        (spoil(folders("nan"), NAN), "o_proj.weight holds NaN or infinity"),
        (folders("tokens", tokenizer_from=tmp_path), "its tokenizer"),
        (folders("wide", vocab=800), "vocab_size is 800, but the model in use has"),
        (cut, "damaged or cut off"),
        (extra, "tensor one.more does not belong"),
        (tmp_path / "nowhere", "nowhere"),
        (cut.parent / "tokenizer", "config.json"),
    ):
        error = post(served, "load", {"path": str(path), "version": 3}, 400)["error"]
        assert reason in error["message"] and "\n" not in error["message"]
        assert error["code"] == "invalid_checkpoint" and error["param"] == "path"
    after = ask(served)
    assert after["token_ids"] == before["token_ids"] and after["version"] == 0


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("pause", {"mode": "stop"}, "mode"),
        ("pause", {"mood": "keep"}, "mood"),
        ("pause?mode=stop", None, "query.mode"),
        ("load", {"version": 1}, "path"),
        ("load", {"path": "x"}, "version"),
        ("load", {"path": "x", "version": -1}, "version"),
        ("load", {"path": "x", "version": "1"}, "version"),
        ("load", {"path": "", "version": 1}, "path"),
        ("load", [], ""),
    ],
)
def test_requests_at_fault(served: Served, route: str, body: Any, param: str) -> None:
    error = post(served, route, body, 400)["error"]
    assert (error["param"] or "") == param and error["code"] == "invalid_value"
    assert served.http.get(f"{served.url}/is_paused").json()["is_paused"] is False


def test_a_client_that_leaves_while_paused_frees_its_place(served: Served) -> None:
    post(served, "pause", {"mode": "keep"})
    post(served, "resume")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        kept = hold_after(served, 3, pool, max_tokens=CONTEXT - 3)
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                body = ASK | {"stream": stream}
                httpx.post(f"{served.url}/v1/completions", json=body, timeout=0.2)
            served.until(lambda health: not health["waiting"])
        assert served.health()["running"] == 1 and not kept.done()
        post(served, "pause", {"mode": "abort"})
        assert kept.result(60)["finish_reason"] == "abort"


def test_a_running_client_that_leaves_while_paused_frees_its_slot(served: Served) -> None:
    with httpx.Client(timeout=60) as client:
        served.runner.pace = pace = threading.Semaphore(3)
        body = ASK | {"stream": True, "max_tokens": CONTEXT - 3}
        with client.stream("POST", f"{served.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # kept: dropping it would close the stream
            assert next(lines)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                paused = pool.submit(post, served, "pause", {"mode": "keep"})
                while served.service.batcher.paused is None:
                    pass
                served.runner.pace = None
                pace.release(9)
                paused.result(60)
            assert served.health()["running"] == 1
    served.until(lambda health: not health["running"])
    assert served.runner.running == 0


def test_the_routes_are_off_unless_asked_for() -> None:
    with served() as server:
        for route in ("pause", "resume", "load"):
            assert httpx.post(f"{server.url}/{route}", json={}).status_code == 404
        assert httpx.get(f"{server.url}/is_paused").status_code == 404


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "some-host"])
def test_the_routes_are_refused_where_others_could_reach_them(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tmp_path), "--control", "--host", host]) == 2
    assert f"--control on {host}" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_served(
    folders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(spoil(folders("broken"), NAN)), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "o_proj.weight holds NaN or infinity" in told and told.count("\n") == 1


def test_a_paused_server_stops_at_a_signal(folders, tmp_path: Path) -> None:
    process = start(folders("served"), tmp_path / "port.json", "--control")
    try:
        url = f"http://127.0.0.1:{wait_for(tmp_path / 'port.json', process)['port']}"
        assert httpx.post(f"{url}/pause", json={"mode": "keep"}).json()["status"] == "paused"
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(httpx.post, f"{url}/v1/completions", json=ASK, timeout=60)
            while httpx.get(f"{url}/health").json()["waiting"] == 0:
                pass
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
            assert process.returncode == 143
            error = waiting.exception(30)  # told so, or cut off: never left waiting
            assert isinstance(error, httpx.HTTPError) or waiting.result().status_code >= 500
    finally:
        process.kill()

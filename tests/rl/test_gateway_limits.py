"""rl.gateway as a process: limits, forbidden settings, bad input, and engines that fail."""

import concurrent.futures
import json
import socket
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_fakes import (
    ANTHROPIC_TOOLS,
    HELLO,
    HTTP,
    TOKENIZER,
    TOOLS,
    ScriptedEngine,
    answer,
    ask_of,
    client,
    post,
    start_gateway,
    until,
)

from model.chat_format import render_ids

Json = dict[str, Any]


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "code"), [({"calls": 2}, "episode_calls"), ({"tokens": 5}, "episode_tokens")]
)
def test_an_episode_ends_at_its_limits(both: Any, name: str, limits: Json, code: str) -> None:
    engine, running = both
    ids = TOKENIZER.encode("a b c")[:3]
    engine.reply = lambda body: answer(ids=ids[: body["max_tokens"]], finish_reason="length")
    url = running.open(name, limits=limits)
    for number in range(2):
        body = ask_of("chat", user=str(number))
        post(url, "chat/completions", body).raise_for_status()
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client(url, max_retries=2).chat.completions.create(model="m", messages=HELLO)
    assert caught.value.code == code
    if "tokens" in limits:
        assert [body["max_tokens"] for body in engine.bodies] == [5, 2]
    assert len(engine.bodies) == 2


def test_an_agent_that_never_ends_meets_its_deadline(both: Any, name: str) -> None:
    engine, running = both
    url = running.open(name, limits={"deadline_s": 0.4})
    engine.gate.clear()
    started = time.monotonic()
    running_call = post(url, "chat/completions", ask_of("chat"))
    assert running_call.status_code == 403
    assert running_call.json()["error"]["code"] == "episode_deadline"
    assert post(url, "chat/completions", ask_of("chat", user="b")).status_code == 403
    assert time.monotonic() - started < 20
    until(lambda: engine.left == 1)
    engine.gate.set()
    with running.pool() as pool:
        assert pool.calls(name) == []


def test_a_closed_episode_takes_no_calls_and_ends_those_that_run(both: Any, name: str) -> None:
    engine, running = both
    url = running.open(name)
    assert running.open(name) == url  # the same again changes nothing
    assert running.control("open", {"episode": name, "group": 4}).status_code == 409
    engine.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, url, "responses", ask_of("responses"))
        until(lambda: len(engine.bodies) == 1)
        first = running.control("close", {"episode": name}).json()
        assert asked.result().status_code == 410
    engine.gate.set()
    assert first == running.control("close", {"episode": name}).json()
    assert first["calls"] == 0
    late = post(url, "chat/completions", ask_of("chat"))
    assert late.status_code == 410 and late.json()["error"]["code"] == "episode_closed"
    assert running.control("open", {"episode": name, "group": 3}).status_code == 409
    with running.pool() as records:
        assert records.calls(name) == []


# ---------------------------------------------------------------- bad input

FORBIDDEN = [
    ("chat/completions", {"temperature": 0.3}),
    ("chat/completions", {"n": 2}),
    ("chat/completions", {"top_p": 0.9}),
    ("chat/completions", {"logit_bias": {"5": 1}}),
    ("chat/completions", {"response_format": {"type": "json_object"}}),
    ("chat/completions", {"tool_choice": "required", "tools": TOOLS}),
    ("chat/completions", {"presence_penalty": 0.1}),
    ("completions", {"echo": True}),
    ("completions", {"best_of": 3}),
    ("responses", {"temperature": 0.3}),
    ("responses", {"text": {"format": {"type": "json_object"}}}),
    ("messages", {"top_k": 5}),
    ("messages", {"tool_choice": {"type": "any"}, "tools": ANTHROPIC_TOOLS}),
]


@pytest.mark.parametrize(("path", "more"), FORBIDDEN)
def test_sampling_that_the_run_forbids_is_refused(
    both: Any, name: str, path: str, more: Json
) -> None:
    engine, running = both
    url = running.open(name)
    assert post(url, path, ask_of(path, **more)).status_code == 400
    error = post(url, path, ask_of(path, **more)).json()["error"]
    assert error["type"] == "invalid_request_error" and error["code"] == "forbidden_setting"
    assert next(iter(more)) in error["message"] or "response_format" in error["message"]
    assert engine.bodies == []
    fine = {"temperature": 1.0, "top_p": 1, **({"n": 1} if "chat" in path else {})}
    post(url, path, ask_of(path, **fine)).raise_for_status()


def test_sampling_can_be_overridden_where_the_answer_keeps_its_shape(both: Any, name: str) -> None:
    engine, running = both
    url = running.open(name, sampling={"on_conflict": "override", "temperature": 0.7})
    body = ask_of("chat", temperature=0.0, top_p=0.5)
    post(url, "chat/completions", body).raise_for_status()
    assert engine.bodies[0]["temperature"] == 0.7 and engine.bodies[0]["top_p"] == 1.0
    assert post(url, "chat/completions", ask_of("chat", n=2)).status_code == 400
    counts = running.control("close", {"episode": name}).json()["counts"]
    assert counts["overridden_temperature"] == counts["overridden_top_p"] == 1


WRONG = [
    ("chat/completions", b"{", 400),
    ("chat/completions", b"[]", 400),
    ("chat/completions", b'{"messages": []}', 400),
    ("chat/completions", b'{"messages": [5]}', 400),
    ("chat/completions", b'{"messages": [{"role": "robot", "content": ""}]}', 400),
    ("chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    ("chat/completions", b'{"messages": [{"role": "user"}], "max_tokens": 0}', 400),
    ("chat/completions", b'{"messages": [{"role": "user"}], "tools": [{"name": 5}]}', 400),
    ("chat/completions", b'{"messages": [{"role": "user"}], "stop": [5]}', 400),
    ("chat/completions", b'{"a":' * 5000, 400),
    ("chat/completions", b" " * 100_001, 413),
    ("completions", b'{"prompt": ["a", "b"]}', 400),
    ("completions", b'{"prompt": [999999]}', 400),
    ("completions", b'{"prompt": ""}', 400),
    ("responses", b'{"input": [{"type": "image"}]}', 400),
    ("responses", b'{"input": "a", "tools": [{"type": "web_search"}]}', 400),
    ("messages", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', 400),
    ("messages", b'{"messages": [{"role": "user", "content": "a"}], "system": 5}', 400),
    ("nothing", b"{}", 404),
]


@pytest.mark.parametrize(("path", "raw", "status"), WRONG, ids=range(len(WRONG)))
def test_a_request_that_is_none_gets_the_dialects_error(
    both: Any, name: str, path: str, raw: bytes, status: int
) -> None:
    engine, running = both
    got = HTTP.post(f"{running.open(name)}/{path}", content=raw)
    assert got.status_code == status, got.text
    assert got.json()["error"]["message"]
    assert got.json().get("type") == ("error" if path == "messages" else None)
    assert engine.bodies == []
    assert "failed_internal" not in running.counts()


def test_strangers_are_told_what_to_do(both: Any) -> None:
    _, running = both
    assert post(f"{running.url}/e/g9-9.9/v1", "messages", ask_of("messages")).status_code == 404
    assert post(f"{running.url}/v1", "chat/completions", ask_of("chat")).status_code == 401
    assert HTTP.get(f"{running.url}/e/g9-9.9/v1/messages").status_code == 405
    assert HTTP.get(f"{running.url}/v1/models").json()["data"][0]["id"] == "fake"
    for body in (
        {"episode": "a/b"},
        {"episode": "a", "group": "3"},
        {"episode": "a", "sampling": {"temperature": -1}},
        {"episode": "a", "sampling": {"heat": 1}},
        {"episode": "a", "sampling": {"repetition": [3]}},
        {"episode": "a", "sampling": {"repetition": [0, 0.5]}},
        {"episode": "a", "sampling": {"repetition": [3, 1.0]}},
        {"episode": "a", "limits": {"calls": 0}},
        {"episode": "a", "colour": 1},
    ):
        assert running.control("open", body).status_code == 400, body


def test_an_episode_with_a_key_is_closed_to_others(both: Any, name: str) -> None:
    _, running = both
    url = running.open(name, key="s3cret")
    for base, key, status in (
        (url, "s3cret", 200),
        (url, "other", 401),
        (f"{running.url}/v1", "s3cret", 200),
        (f"{running.url}/v1", name, 401),
    ):
        for header in ({"x-api-key": key}, {"Authorization": f"Bearer {key}"}):
            assert post(base, "messages", ask_of("messages"), headers=header).status_code == status
    running.control("close", {"episode": name})
    late = post(
        f"{running.url}/v1", "messages", ask_of("messages"), headers={"x-api-key": "s3cret"}
    )
    assert late.status_code == 410


def test_a_prompt_longer_than_the_context_is_the_agents_to_mend(both: Any, name: str) -> None:
    engine, running = both
    long = [{"role": "user", "content": "word " * 8000}]
    got = post(running.open(name), "chat/completions", {"messages": long})
    assert got.status_code == 400 and got.json()["error"]["code"] == "context_length_exceeded"
    counted = post(f"{running.url}/e/{name}/v1", "messages/count_tokens", ask_of("messages"))
    assert counted.json() == {"input_tokens": len(render_ids(HELLO, None, TOKENIZER))}
    assert engine.bodies == []


# ---------------------------------------------------------------- a bad engine


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), None])
def test_log_probs_that_are_no_numbers_are_kept_counted_and_told(
    both: Any, name: str, bad: float | None
) -> None:
    engine, running = both
    values = [-0.5, *[bad] * (len(answer()["token_ids"]) - 1)]
    engine.reply = lambda body: answer(logprobs={"token_logprobs": values})
    before = running.counts().get("nonfinite_logprobs", 0)
    body = ask_of("chat", logprobs=True)
    got = post(running.open(name), "chat/completions", body)
    shown = json.loads(got.content, parse_constant=pytest.fail)["choices"][0]["logprobs"]["content"]
    assert shown[0]["logprob"] == -0.5 and shown[1]["logprob"] is None
    with running.pool() as pool:
        (record,) = pool.calls(name)
    assert not abs(record.logprobs[1]) < float("inf")
    assert len(record.logprobs) == len(record.response_ids)
    health = HTTP.get(f"{running.url}/healthz").json()
    assert health["counts"]["nonfinite_logprobs"] == before + len(values) - 1
    assert health["alarms"] == ["nonfinite_logprobs"]


BAD_ANSWERS = [
    (answer(logprobs={"token_logprobs": [-0.5]}), "ids and 1 log-probs"),
    (answer(token_ids=["a"], logprobs={"token_logprobs": [-0.5]}), "no ids"),
    (answer(token_ids=[2**40], logprobs={"token_logprobs": [-0.5]}), "no ids"),
    (answer(logprobs=None), "no ids"),
    (answer(tokenizer_hash="other"), "tokenizer other"),
    ((200, b"hello"), "no ids"),
    ((200, {"choices": []}), "no ids"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ANSWERS, ids=range(len(BAD_ANSWERS)))
def test_an_answer_that_cannot_be_a_record_is_none(
    both: Any, name: str, bad: Any, reason: str
) -> None:
    engine, running = both
    engine.reply = lambda body: bad
    got = post(running.open(name), "chat/completions", ask_of("chat"))
    assert got.status_code == 502 and reason in got.json()["error"]["message"]
    with running.pool() as pool:
        assert pool.calls(name) == []


def test_a_reply_that_a_pause_cut_off_goes_on_under_its_versions(both: Any, name: str) -> None:
    engine, running = both
    ids = answer()["token_ids"]

    def reply(body: Json) -> Json:
        begin, version = [(0, 1), (3, 1), (3, 1), (5, 2)][len(engine.bodies) - 1]
        end = [3, 3, 5, len(ids)][len(engine.bodies) - 1]
        part, turn = ids[begin:end], len(engine.bodies)
        read = len(body["prompt"]) + len(part) - 1
        return answer(
            ids=part or [0],
            **({} if part else {"token_ids": []}),
            finish_reason="stop" if end == len(ids) else "abort",
            logprobs={"token_logprobs": [-0.25] * len(part)},
            versions=[[0, len(part), version]],
            routed_experts=[[at, turn] for at in range(read)],
        )

    engine.reply = reply
    post(running.open(name), "chat/completions", ask_of("chat")).raise_for_status()
    with running.pool() as pool:
        (record,) = pool.calls(name)
    assert list(record.response_ids) == ids and len(record.logprobs) == len(ids)
    assert record.versions == ((0, 5, 1), (5, len(ids), 2))
    assert engine.prompts()[-1] == [*engine.prompts()[0], *ids[:5]]
    assert engine.bodies[-1]["max_tokens"] == engine.bodies[0]["max_tokens"] - 5
    assert record.routed_experts is not None  # each token's are those of the draw behind it
    at, turn = zip(*record.routed_experts, strict=True)
    prompt, new = len(record.prompt_ids), len(ids)
    assert at == tuple(range(prompt + new - 1))
    assert turn == (1,) * (prompt + 2) + (3,) * 2 + (4,) * (new - 5)


def test_an_engine_that_fails_is_asked_again(both: Any, name: str) -> None:
    engine, running = both
    faults = [None, (429, {"error": {"message": "full"}}), (500, b"oops"), answer()]
    engine.reply = lambda body: faults[len(engine.bodies) - 1]
    post(running.open(name), "chat/completions", ask_of("chat")).raise_for_status()
    assert len(engine.bodies) == 4
    with running.pool() as pool:
        assert len(pool.calls(name)) == 1


def test_an_engine_that_stays_away_is_told_after_a_while(both: Any, name: str) -> None:
    engine, running = both
    port = int(engine.url.rpartition(":")[2])
    engine.stop()
    try:
        got = post(running.open(name), "messages", ask_of("messages"))
        assert got.status_code == 503 and got.json()["error"]["type"] == "overloaded_error"
        engine.hash = "another tokenizer"
        engine.start(port)
        got = post(running.open(name), "messages", ask_of("messages"))
        assert got.status_code == 502 and "tokenizer" in got.json()["error"]["message"]
    finally:
        engine.hash = TOKENIZER.hash
    post(running.open(name), "messages", ask_of("messages")).raise_for_status()


# ---------------------------------------------------------------- the wire


def test_a_body_in_pieces_and_a_kept_connection(both: Any, name: str) -> None:
    _, running = both
    running.open(name)
    raw = json.dumps(ask_of("chat")).encode()
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as wire:
        for key in (b"1", b"2"):
            head = b"POST /e/%b/v1/v1/chat/completions HTTP/1.1\r\nHost: a\r\n" % name.encode()
            head += b"Idempotency-Key: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % key
            wire.sendall(head)
            for part in (raw[:20], raw[20:]):
                wire.sendall(b"%x\r\n%b\r\n" % (len(part), part))
                time.sleep(0.02)
            wire.sendall(b"0\r\n\r\n")
            got = b""
            while b"All is well." not in got:
                got += wire.recv(65536)
            assert got.startswith(b"HTTP/1.1 200")
    with running.pool() as pool:
        assert len(pool.calls(name)) == 2


def test_a_gateway_before_the_wrong_engine_does_not_start(tmp_path: Path) -> None:
    engine = ScriptedEngine(hash="0123456789abcdef")
    engine.start()
    try:
        process = start_gateway(engine.url, tmp_path)
        _, log = process.communicate(timeout=60)
    finally:
        engine.stop()
    assert process.returncode == 2 and "serves the tokenizer 0123456789ab" in log
    process = start_gateway(engine.url, tmp_path, "--engine-wait", "0.1")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 5 and "start the engine" in log
    process = start_gateway(engine.url, tmp_path, "--port", "70000")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 2 and "--port: '70000' is no port" in log

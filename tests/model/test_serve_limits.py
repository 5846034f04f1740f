"""What bounds the server: its queue, clients that leave, and requests at fault."""

import concurrent.futures
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_helpers import ADD, CONTEXT, HELLO, Served, served

from model.serve_app import MAX_BODY

LONG = {"prompt": [20, 30], "max_tokens": CONTEXT - 2, "ignore_eos": True}


@pytest.fixture(scope="module", name="served")
def a_server() -> Iterator[Served]:
    with served(max_batch=2, max_queue=2, cache_tokens=8 * CONTEXT) as server:
        yield server


@pytest.fixture
def held(served: Served) -> Iterator[Served]:
    """A server that stands still until `gate` is set."""
    served.until(lambda health: not health["running"] + health["waiting"])
    served.runner.gate.clear()
    yield served
    served.runner.gate.set()
    served.until(lambda health: not health["running"] + health["waiting"])


def connect(served: Served, body: dict[str, Any]) -> socket.socket:
    """A client that has sent its request and not read the answer."""
    where = urlsplit(served.url)
    client = socket.create_connection((where.hostname, where.port), timeout=30)
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return client


def open_requests(health: dict[str, Any]) -> int:
    return health["running"] + health["waiting"]


def test_past_the_queue_is_429_and_all_that_were_accepted_are_answered(held: Served) -> None:
    url = f"{held.url}/v1/completions"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        accepted = [
            pool.submit(httpx.post, url, json=LONG | {"max_tokens": 5, "seed": i}, timeout=60)
            for i in range(4)
        ]
        held.until(lambda health: open_requests(health) == 4)
        for path, body in (
            ("completions", LONG),
            ("completions", LONG | {"stream": True}),
            ("chat/completions", {"messages": HELLO}),
            ("chat/completions", {"messages": HELLO, "stream": True}),
        ):
            answer = httpx.post(f"{held.url}/v1/{path}", json=body, timeout=30)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert error["type"] == "rate_limit_error" and error["code"] == "queue_full"
            assert "at most 2 may run and 2 wait" in error["message"]
        with pytest.raises(openai.RateLimitError):
            held.client.chat.completions.create(model="tiny", messages=HELLO)
        held.runner.gate.set()
        answers = [future.result() for future in accepted]
    assert [a.json()["usage"]["completion_tokens"] for a in answers] == [5] * 4
    assert max(held.runner.sizes) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(served: Served, stream: bool) -> None:
    served.until(lambda health: not open_requests(health))
    served.runner.gate.clear()
    try:
        clients = [connect(served, LONG | {"stream": stream}) for _ in range(4)]
        served.until(lambda health: open_requests(health) == 4)
        # One that runs and one that waits leave; the slot goes to the one that still waits.
        for client in clients:
            client.close()
        served.until(lambda health: not health["waiting"])
    finally:
        served.runner.gate.set()
    served.until(lambda health: not open_requests(health))
    # They left long before their replies' ends.
    assert served.runner.running == 0
    answer = httpx.post(f"{served.url}/v1/completions", json=LONG | {"max_tokens": 3}, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_a_stream_left_in_the_middle_stops_being_written(served: Served) -> None:
    served.until(lambda health: not open_requests(health))
    before = len(served.runner.sizes)
    served.runner.pace = pace = threading.Semaphore(5)
    url = f"{served.url}/v1/completions"
    with httpx.stream("POST", url, json=LONG | {"stream": True}, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert [next(lines)[:6] for _ in range(3)] == ["data: "] * 3
    # A step for every look at the server: it goes on only until it sees that nobody listens.
    served.until(lambda health: pace.release() or not open_requests(health))
    served.runner.pace = None
    pace.release(2)
    assert len(served.runner.sizes) - before < CONTEXT - 2


def test_more_prompts_than_there_can_be_is_no_matter_of_waiting(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": ["a"] * 5}, timeout=30)
    assert answer.status_code == 400
    assert "5 prompts × 1 replies are more than the 4" in answer.json()["error"]["message"]


def test_a_huge_body_is_refused(served: Served) -> None:
    answer = httpx.post(
        f"{served.url}/v1/completions",
        content=b"[" * (MAX_BODY + 1),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == 413 and str(MAX_BODY) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [-1]}, None),
        ("completions", {"prompt": [10**30]}, None),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "a", "best_of": 3}, "best_of"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("completions", {"prompt": "a", "temperature": "hot"}, "temperature"),
        ("completions", {"prompt": "a", "stop": ["\ud800"]}, "stop"),
        ("completions", {"prompt": "a", "min_p": 0.1}, "min_p"),
        ("completions", {"prompt": "a", "model": 5}, "model"),
        ("completions", {"prompt": [[[1]]]}, "prompt"),
        ("completions", {"prompt": {"text": "a"}}, "prompt"),
        ("completions", {"prompt": [1, "a"]}, "prompt"),
        ("completions", {"prompt": "a", "n": 0}, "n"),
        ("completions", {"prompt": "a", "n": 65}, "n"),
        ("completions", {"prompt": "a", "top_p": 0}, "top_p"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("completions", {"prompt": "a", "top_k": -2}, "top_k"),
        ("completions", {"prompt": "a", "seed": "x"}, "seed"),
        ("completions", {"prompt": "a", "stream": "perhaps"}, "stream"),
        ("completions", {"prompt": "a", "stop_token_ids": "x"}, "stop_token_ids"),
        ("completions", {"prompt": "a", "response_format": "json"}, "response_format"),
        ("chat/completions", {"messages": {"role": "user"}}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        (
            "chat/completions",
            {"messages": HELLO, "max_completion_tokens": 0},
            "max_completion_tokens",
        ),
        ("chat/completions", {"messages": HELLO, "tools": "add"}, "tools"),
        ("chat/completions", {"messages": HELLO, "tool_choice": "must"}, "tool_choice"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": ["user"]}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages"),
        (
            "chat/completions",
            {"messages": HELLO, "tools": [{"function": {"name": "a", "parameters": {"type": 5}}}]},
            "messages",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "tools": [ADD], "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_requests_at_fault_are_told_so(served: Served, path: str, body: Any, param: str) -> None:
    answer = httpx.post(
        f"{served.url}/v1/{path}",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
        timeout=30,
    )
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["code"] and error["message"] and "\n" not in error["message"]
    assert (error["param"] or "").partition(".")[0] == (param or "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SCHEMA_KEYS = ["type", "properties", "items", "enum", "anyOf", "required", "pattern", "minimum"]
SCHEMA = st.dictionaries(st.sampled_from(SCHEMA_KEYS), JSON | st.sampled_from(["object", "string"]))
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | JSON},
    optional={"content": JSON, "tool_calls": JSON, "reasoning_content": JSON},
)
TOOL = st.fixed_dictionaries({"name": st.just("a") | JSON}, optional={"parameters": SCHEMA | JSON})
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=2) | JSON, "max_tokens": st.just(2)},
    optional={
        "tools": st.lists(st.fixed_dictionaries({"function": TOOL}), max_size=2) | JSON,
        "tool_choice": st.sampled_from(["auto", "required", "none"]) | JSON,
        "response_format": st.builds(
            lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}, SCHEMA
        )
        | JSON,
        "stop": JSON,
        "seed": JSON,
        "logprobs": JSON,
        "stream_options": JSON,
        "logit_bias": JSON,
    },
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODY)
def test_no_body_is_the_servers_fault(served: Served, body: Any) -> None:
    # As raw text: JSON with NaN and Infinity, which no client library sends, is read by Python.
    raw, kind = json.dumps(body), {"content-type": "application/json"}
    answer = served.http.post(f"{served.url}/v1/chat/completions", content=raw, headers=kind)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]

"""Streams say what whole answers say, as it is written."""

import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from serve_helpers import ADD, CONTEXT, HELLO, Scripted, Served, served, serving, tiny_tokenizer

from model.batching import Batcher
from model.reply_stream import TextSoFar, before_stop, chat_so_far, rest_of
from model.service import Service
from model.tokenizer import Tokenizer

VARIED = [
    {"seed": 1, "max_tokens": 30},
    {"seed": 2, "max_tokens": 60, "n": 3, "logprobs": 2, "return_token_ids": True},
    {"seed": 3, "max_tokens": 40, "stop": ["a", "wor"], "logprobs": 0},
    {"seed": 4, "max_tokens": 9, "echo": True, "logprobs": 1, "prompt": ["say", "some words"]},
    {"seed": 5, "max_tokens": 0, "echo": True, "logprobs": 0, "return_token_ids": True},
    {"seed": 6, "max_tokens": 20, "temperature": 0, "prompt": [20, 30, 40, 50], "echo": True},
    {"seed": 7, "max_tokens": 25, "ignore_eos": True, "stop_token_ids": [50, 60, 70, 80, 90]},
]


@pytest.fixture(scope="module", name="served")
def a_server() -> Iterator[Served]:
    with served() as server:
        yield server


def post(served: Served, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = served.http.post(f"{served.url}/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def joined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a client of a stream knows at its end, by choice."""
    made: dict[int, dict[str, Any]] = {}
    for part in (choice for event in events for choice in event["choices"]):
        known = made.setdefault(
            part["index"],
            {"text": "", "thinking": "", "calls": [], "token_ids": [], "logprobs": None},
        )
        delta = part.get("delta", {})
        known["text"] += part.get("text", "") + (delta.get("content") or "")
        known["thinking"] += delta.get("reasoning_content") or ""
        known["calls"] += [{**call, "index": None} for call in delta.get("tool_calls", [])]
        known["token_ids"] += part.get("token_ids", [])
        if part.get("logprobs"):
            known["logprobs"] = known["logprobs"] or {key: [] for key in part["logprobs"]}
            for key, values in part["logprobs"].items():
                known["logprobs"][key] += values
        for key in ("finish_reason", "prompt_token_ids", "constrained", "version"):
            if part.get(key) is not None:
                assert key not in known, "said twice"
                known[key] = part[key]
    return made


@pytest.mark.parametrize("more", VARIED)
def test_a_streamed_completion_is_the_whole_one(served: Served, more: dict[str, Any]) -> None:
    body = {"prompt": "say some words", "stream_options": {"include_usage": True}, **more}
    whole = post(served, "completions", body)
    events = served.events("completions", **body)
    assert events[-1]["choices"] == [] and len({event["id"] for event in events}) == 1
    usage, expected = events[-1]["usage"], whole["usage"]
    # The whole one came first, so the stream's prompt may be known by now.
    for count in (usage, expected):
        count.pop("prompt_tokens_details")
    assert usage == expected
    made = joined(events)
    assert sorted(made) == list(range(len(whole["choices"])))
    for choice in whole["choices"]:
        got = made[choice["index"]]
        assert got["text"] == choice["text"]
        assert got["finish_reason"] == choice["finish_reason"]
        assert got["token_ids"] == choice.get("token_ids", [])
        assert got.get("prompt_token_ids") == choice.get("prompt_token_ids")
        assert (got["logprobs"] is None) == (choice["logprobs"] is None)
        if choice["logprobs"]:
            for key in ("tokens", "text_offset"):
                assert got["logprobs"][key] == choice["logprobs"][key]
            pairs = zip(
                got["logprobs"]["token_logprobs"],
                choice["logprobs"]["token_logprobs"],
                strict=True,
            )
            assert all(a == b or abs(a - b) < 1e-4 for a, b in pairs)


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 1, "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
        {"seed": 2, "stop": [" w", "o"]},
        {"seed": 3, "tools": [ADD], "tool_choice": "auto"},
        {"seed": 4, "tools": [ADD], "tool_choice": "required"},
        {"seed": 5, "response_format": {"type": "json_object"}, "max_tokens": 300},
    ],
)
def test_a_streamed_chat_is_the_whole_one(served: Served, more: dict[str, Any]) -> None:
    body = {"messages": HELLO, "max_tokens": 120} | more
    whole = post(served, "chat/completions", body)
    made = joined(served.events("chat/completions", **body))
    for choice in whole["choices"]:
        got, message = made[choice["index"]], choice["message"]
        assert got["text"] == (message["content"] or "")
        assert got["thinking"] == message["reasoning_content"]
        calls = [call["function"] for call in message.get("tool_calls", [])]
        assert [call["function"] for call in got["calls"]] == calls
        for key in ("finish_reason", "constrained", "version"):
            assert got[key] == choice[key]
        assert got["token_ids"] == choice.get("token_ids", [])
        if choice["logprobs"]:
            tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
            assert [entry["token"] for entry in got["logprobs"]["content"]] == tokens


def test_tokens_come_as_they_are_written(served: Served) -> None:
    body = {"prompt": "say", "max_tokens": 50, "ignore_eos": True, "stream": True}
    served.runner.pace = pace = threading.Semaphore(0)
    heard = threading.Event()

    def step_until_heard() -> None:
        """A token may be half a character, which is no text yet; never to the reply's end."""
        for _ in range(40):
            pace.release()
            if heard.wait(0.1):
                return

    stepping = threading.Thread(target=step_until_heard)
    stepping.start()
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        try:
            assert next(line for line in lines if line).startswith("data: {")
            assert served.health()["running"] == 1
        finally:
            heard.set()
            stepping.join()
            served.runner.pace = None
            pace.release()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_the_stock_client_streams_both_routes(served: Served) -> None:
    text = served.client.completions.create(
        model="tiny", prompt="say some", max_tokens=12, seed=1, stream=True
    )
    whole = served.client.completions.create(model="tiny", prompt="say some", max_tokens=12, seed=1)
    assert "".join(part.choices[0].text for part in text) == whole.choices[0].text
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "seed": 1}
    parts = [part.choices[0] for part in served.client.chat.completions.create(**ask, stream=True)]
    again = served.client.chat.completions.create(**ask).choices[0]
    assert "".join(part.delta.content or "" for part in parts) == again.message.content
    assert parts[-1].finish_reason == again.finish_reason


# ---------------------------------------------------------------- written replies


@pytest.fixture(scope="module")
def written() -> Iterator[tuple[str, Scripted]]:
    tokenizer = tiny_tokenizer()
    runner = Scripted(tokenizer)
    service = Service(
        name="tiny",
        tokenizer=tokenizer,
        batcher=Batcher(runner),
        context=CONTEXT,
        vocab_size=tokenizer.vocab_size,
    )
    with serving(service) as url:
        yield url, runner


def said(written: tuple[str, Scripted], text: str, **more: Any) -> tuple[dict, dict, list[str]]:
    """A reply whole, the same reply's stream joined, and the pieces of text in the stream."""
    url, runner = written
    runner.texts = [text, text]
    runner.finish = more.pop("finish", "stop")
    body = {"messages": HELLO, **more}
    whole = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()["choices"][0]
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=30
    ) as answer:
        lines = [line for line in answer.iter_lines() if line][:-1]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    pieces = [c["delta"].get("content") or "" for e in events for c in e["choices"]]
    return whole, joined(events)[0], [piece for piece in pieces if piece]


CALL = (
    "Hm.\n</think>\n\nI add.\n<minimax:tool_call>\n"
    '<invoke name="add">\n<parameter name="a">2</parameter>\n<parameter name="b">3</parameter>\n'
    "</invoke>\n</minimax:tool_call>[e~["
)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Hm.\n</think>\n\nsay some words to learn[e~[", "say some words to learn"),
        ("</think>\n\nπ ≈ 3 – “größer” 🙂 end[e~[", "π ≈ 3 – “größer” 🙂 end"),
        (CALL, "I add."),
        ("</think>\n\nno <call at all < here[e~[", "no <call at all < here"),
    ],
)
def test_written_replies_stream_the_same(written, text: str, content: str) -> None:
    whole, got, pieces = said(written, text, tools=[ADD])
    assert whole["message"]["content"] == got["text"] == content
    assert whole["message"]["reasoning_content"] == got["thinking"]
    assert got["finish_reason"] == whole["finish_reason"]
    assert "�" not in "".join(pieces) and len(pieces) > 1
    calls = [call["function"] for call in whole["message"].get("tool_calls", [])]
    assert [call["function"] for call in got["calls"]] == calls
    assert bool(calls) == (text == CALL)


def test_a_stop_text_is_found_across_tokens_and_never_shown(written) -> None:
    tokenizer = tiny_tokenizer()
    text = "</think>\n\nsay some words to learn[e~["
    ids = tokenizer.encode(text)
    borders = {len(tokenizer.decode(ids[:n])) for n in range(len(ids))}
    stop = "e wor"
    assert any(0 < border - text.index(stop) < len(stop) for border in borders)
    more = {"logprobs": True, "return_token_ids": True}
    whole, got, pieces = said(written, text, stop=["never", stop], **more)
    assert whole["message"]["content"] == "".join(pieces) == "say som"
    assert whole["finish_reason"] == got["finish_reason"] == "stop"
    # The ids are what the model wrote, through the token that completes the stop text.
    kept = tokenizer.decode(whole["token_ids"])
    assert stop in kept and stop not in tokenizer.decode(whole["token_ids"][:-1])
    assert got["token_ids"] == whole["token_ids"]
    assert len(whole["logprobs"]["content"]) == len(whole["token_ids"])
    # Text that only begins like a stop text is sent in the end.
    _, got, pieces = said(written, "</think>\n\nsay some wo[e~[", stop=[stop])
    assert "".join(pieces) == "say some wo"


def test_a_call_cut_off_by_length_is_streamed_as_an_error(written) -> None:
    text = CALL.partition("</invoke>")[0]
    whole, got, _ = said(written, text, tools=[ADD], finish="length")
    assert got["calls"] == [] and got["finish_reason"] == whole["finish_reason"] == "length"
    assert "cut off" in whole["tool_call_error"]


def test_an_error_in_the_middle_of_a_stream_is_an_event(written) -> None:
    url, runner = written
    runner.broken = RuntimeError("out of luck")
    try:
        body = {"messages": HELLO, "stream": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    finally:
        runner.broken = None
    lines = [line for line in answer.text.splitlines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "engine_error"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    runner.broken = RuntimeError("out of luck")
    try:
        with pytest.raises(openai.APIError, match="out of luck"):
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    finally:
        runner.broken = None


# ---------------------------------------------------------------- what is final of a text


def every_beginning(text: str) -> list[str]:
    return [text[:end] for end in range(len(text) + 1)]


@pytest.mark.parametrize(
    "text",
    [CALL.removesuffix("[e~["), "only a thought\nof two lines", "<think>\nHm.\n</think>\n\nYes.\n"],
)
def test_what_was_sent_always_stays_a_beginning(text: str) -> None:
    sent = [chat_so_far(part, True) for part in every_beginning(text)]
    for earlier, later in pairwise(sent):
        assert later[0].startswith(earlier[0]) and later[1].startswith(earlier[1])


def test_the_parts_of_a_text_that_may_be_sent() -> None:
    assert before_stop("abcab", ["abd"]) == "abc" and before_stop("abcabdx", ["abd"]) == "abc"
    assert before_stop("abc", []) == "abc"
    assert rest_of("abcd", "ab") == "cd" and rest_of("xbcd", "ab") == ""
    tokenizer: Tokenizer = tiny_tokenizer()
    so_far = TextSoFar(tokenizer)
    shown = []
    for id in tokenizer.encode("a🙂b"):
        so_far.add([id])
        shown.append(so_far.text)
    assert shown[-1] == "a🙂b" and all("�" not in text for text in shown)

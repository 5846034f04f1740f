"""rl.gateway as a process, between real clients and an engine behind real HTTP."""

import concurrent.futures
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_fakes import (
    CALLING,
    EOS,
    HTTP,
    TOKENIZER,
    TOOLS,
    Running,
    ScriptedEngine,
    answer,
    gateway,
    start_gateway,
    until,
)

from model.chat_format import render_ids, render_next_ids

Json = dict[str, Any]
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


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedEngine, Running]]:
    engine = ScriptedEngine()
    engine.start()
    folder = tmp_path_factory.mktemp("gateway")
    options = ["--linger", "0.4", "--ping", "0.3", "--max-body", "100000", "--engine-patience", "2"]
    with gateway(engine.url, folder, *options) as running:
        yield engine, running
    engine.stop()


@pytest.fixture
def both(shared: tuple[ScriptedEngine, Running]) -> tuple[ScriptedEngine, Running]:
    engine, running = shared
    engine.reply = lambda body: answer()
    engine.bodies.clear()
    engine.gate.set()
    engine.left = 0
    return engine, running


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An episode of this test's own."""
    kept = [c if c.isalnum() else "-" for c in request.node.name]
    return f"g3-{''.join(kept)}.0"[:150]


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


# ---------------------------------------------------------------- ids


def test_a_record_holds_the_ids_that_went_in_and_came_out(both: Any, name: str) -> None:
    engine, running = both
    url = running.open(name, sampling={"seed": 40, "max_tokens": 99, "temperature": 0.5})
    reply = client(url).chat.completions.create(model="any", messages=HELLO, tools=TOOLS)
    assert reply.choices[0].message.content == "All is well."
    assert reply.choices[0].message.reasoning_content == "Done."
    with running.pool() as pool:
        (record,) = pool.calls(name)
        assert pool.stats().damaged == ()
    sent = engine.bodies[0]
    assert list(record.prompt_ids) == sent["prompt"] == render_ids(HELLO, TOOLS, TOKENIZER)
    assert sent["seed"] == 40 and sent["temperature"] == 0.5 and sent["max_tokens"] == 99
    assert sent["stop_token_ids"] == [EOS] and sent["ignore_eos"] and sent["top_p"] == 1
    assert list(record.response_ids) == answer()["token_ids"]
    assert list(record.logprobs) == answer()["logprobs"]["token_logprobs"]
    assert record.versions == ((0, len(record.response_ids), 7),)
    assert (record.episode, record.group, record.index) == (name, 3, 0)
    assert record.temperature == 0.5 and record.tokenizer_hash == TOKENIZER.hash
    assert record.t_start <= record.t_end and record.finish_reason == "stop"


def _chat(url: str) -> list[Any]:
    """Three calls of one conversation, without thinking and with rewritten JSON: how each ended."""
    c = client(url)
    messages: list[Json] = [{"role": "system", "content": "Be good."}, *HELLO]
    ends = []
    for turn in range(3):
        got = c.chat.completions.create(model="m", messages=messages, tools=TOOLS).choices[0]
        ends.append(got.finish_reason)
        if turn == 2:
            return ends
        (call,) = got.message.tool_calls
        arguments = json.dumps(json.loads(call.function.arguments), indent=3, sort_keys=True)
        function = {"name": call.function.name, "arguments": arguments}
        calls = [{"id": call.id, "type": "function", "function": function}]
        messages += [
            {"role": "assistant", "content": got.message.content, "tool_calls": calls},
            {"role": "tool", "tool_call_id": call.id, "content": "1\n"},
            *([{"role": "user", "content": "Again."}] if turn else []),
        ]
    return ends


def _responses(url: str) -> list[Any]:
    c = client(url)
    items: list[Any] = [{"role": "user", "content": "Hello."}]
    ends = []
    for turn in range(3):
        got = c.responses.create(
            model="m", input=items, instructions="Be good.", tools=FLAT_TOOLS, store=False
        )
        assert got.status == "completed"
        calls = [item for item in got.output if item.type == "function_call"]
        ends.append("tool_calls" if calls else "stop")
        if turn == 2:
            return ends
        for item in got.output:
            if item.type == "message":
                items.append({"role": "assistant", "content": item.content[0].text})
            if item.type == "function_call":
                arguments = json.dumps(json.loads(item.arguments), separators=(",", ":"))
                items.append(item.model_dump() | {"arguments": arguments})
                output = {"type": "function_call_output", "call_id": item.call_id}
                items.append(output | {"output": "1\n"})
        if turn:
            items.append({"role": "user", "content": [{"type": "input_text", "text": "Again."}]})
    return ends


def _messages(url: str) -> list[Any]:
    messages: list[Json] = [{"role": "user", "content": "Hello."}]
    ends = []
    for turn in range(3):
        body = {"model": "m", "max_tokens": 500, "system": "Be good.", "tools": ANTHROPIC_TOOLS}
        got = post(url, "messages", body | {"messages": messages}).raise_for_status().json()
        ends.append({"tool_use": "tool_calls", "end_turn": "stop"}[got["stop_reason"]])
        if turn == 2:
            return ends
        (used,) = [block for block in got["content"] if block["type"] == "tool_use"]
        assert used["input"] == {"code": "print(1)", "options": {"b": 1.0, "a": [1, 2]}}
        result: Json = {"type": "tool_result", "tool_use_id": used["id"], "content": "1\n"}
        more = [{"type": "text", "text": "Again."}] if turn else []
        messages += [
            {"role": "assistant", "content": got["content"]},
            {"role": "user", "content": [result, *more]},
        ]
    return ends


@pytest.mark.parametrize("talk", [_chat, _responses, _messages])
def test_each_dialect_goes_on_from_the_sampled_ids(both: Any, name: str, talk: Any) -> None:
    engine, running = both
    engine.reply = lambda body: answer(CALLING) if len(engine.bodies) < 3 else answer()
    url = running.open(name)
    assert talk(url) == ["tool_calls", "tool_calls", "stop"]
    called, tool = answer(CALLING)["token_ids"], {"role": "tool", "content": "1\n"}
    expected = [render_ids([{"role": "system", "content": "Be good."}, *HELLO], TOOLS, TOKENIZER)]
    for new in ([tool], [tool, {"role": "user", "content": "Again."}]):
        expected.append([*expected[-1], *called, *render_next_ids(new, TOKENIZER, {})])
    assert engine.prompts() == expected
    with running.pool() as pool:
        records = pool.calls(name)
    assert [list(record.prompt_ids) for record in records] == expected
    assert [record.index for record in records] == [0, 1, 2]
    closed = running.control("close", {"episode": name}).json()
    assert closed["calls"] == 3
    assert closed["counts"] == {"calls": 3, "prompt_first": 1, "prompt_stored": 2}


def test_raw_completions_go_on_from_the_sampled_ids(both: Any, name: str) -> None:
    engine, running = both
    ids = [*TOKENIZER.encode("an"), *TOKENIZER.encode("swer"), EOS]
    engine.reply = lambda body: answer(ids=ids)
    c = client(running.open(name))
    first = c.completions.create(model="m", prompt="The ", max_tokens=50).choices[0]
    assert first.text == "answer"
    c.completions.create(model="m", prompt="The answer is", max_tokens=50)
    c.completions.create(model="m", prompt=[5, 6, 7], max_tokens=50)
    begin = TOKENIZER.encode("The ")
    assert engine.prompts() == [begin, [*begin, *ids[:-1], *TOKENIZER.encode(" is")], [5, 6, 7]]


# ---------------------------------------------------------------- streams


def _assembled(url: str, path: str) -> tuple[str, list[str], str]:
    """Text, arguments of calls, and end of an answer, put together from its events."""
    body = ask_of(path, stream=True)
    if path != "completions":
        body["tools"] = {"messages": ANTHROPIC_TOOLS, "responses": FLAT_TOOLS}.get(path, TOOLS)
    text, calls, end = "", [], ""
    with HTTP.stream("POST", f"{url}/{path}", json=body) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        for line in got.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            kind = event.get("type")
            if path == "chat/completions":
                choice = event["choices"][0]
                text += choice["delta"].get("content") or ""
                calls += [c["function"]["arguments"] for c in choice["delta"].get("tool_calls", [])]
                end = choice["finish_reason"] or end
            elif path == "completions":
                text += event["choices"][0]["text"]
                end = event["choices"][0]["finish_reason"] or end
            elif kind == "response.output_text.delta":
                text += event["delta"]
            elif kind == "response.function_call_arguments.done":
                calls.append(event["arguments"])
            elif kind == "response.completed":
                end = event["response"]["status"]
            elif kind == "content_block_delta" and event["delta"]["type"] == "text_delta":
                text += event["delta"]["text"]
            elif kind == "content_block_delta":
                calls.append(event["delta"]["partial_json"])
            elif kind == "message_delta":
                end = event["delta"]["stop_reason"]
    return text, calls, end


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_says_what_the_whole_answer_says(both: Any, name: str, path: str) -> None:
    engine, running = both
    engine.reply = lambda body: answer(CALLING)
    text, calls, end = _assembled(running.open(name), path)
    if path == "completions":
        assert text == CALLING and end == "stop"
    else:
        assert text == "Running:"
        assert [json.loads(c) for c in calls] == [
            {"code": "print(1)", "options": {"b": 1.0, "a": [1, 2]}}
        ]
        assert end in ("tool_calls", "completed", "tool_use")
    with running.pool() as pool:
        assert len(pool.calls(name)) == 1


def test_the_openai_client_reads_both_kinds_of_streams(both: Any, name: str) -> None:
    _, running = both
    c = client(running.open(name))
    options = {"include_usage": True}
    chunks = list(
        c.chat.completions.create(model="m", messages=HELLO, stream=True, stream_options=options)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "All is well." and chunks[-1].usage.completion_tokens > 0
    with c.responses.stream(model="m", input="Hi.") as events:
        kinds = [event.type for event in events]
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        assert events.get_final_response().output_text == "All is well."


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_is_kept_alive_and_may_still_fail(both: Any, name: str, path: str) -> None:
    engine, running = both
    url = running.open(name)
    engine.reply = lambda body: answer() if len(engine.bodies) == 1 else (400, {"error": "no room"})
    for good in (True, False):
        engine.gate.clear()
        body = ask_of(path, stream=True, user=str(good))
        with HTTP.stream("POST", f"{url}/{path}", json=body) as got:
            lines = got.iter_lines()
            first = next(lines)
            assert first == "event: ping" if path == "messages" else first.startswith(":")
            engine.gate.set()
            rest = "\n".join(lines)
        assert ("All is well." in rest) == good
        assert ("no room" in rest) != good
    with running.pool() as pool:
        assert len(pool.calls(name)) == 1
    # before the first event an error has its status
    assert post(url, path, ask_of(path, stream=True, user="c")).status_code == 400


def test_a_response_goes_on_from_an_earlier_one(both: Any, name: str) -> None:
    engine, running = both
    c = client(running.open(name))
    first = c.responses.create(model="m", input="Hello.", instructions="Be good.")
    c.responses.create(
        model="m", input="More.", instructions="Be good.", previous_response_id=first.id
    )
    new = render_next_ids([{"role": "user", "content": "More."}], TOKENIZER, {})
    assert engine.prompts()[1] == [*engine.prompts()[0], *answer()["token_ids"], *new]
    with pytest.raises(openai.BadRequestError, match="no response"):
        c.responses.create(model="m", input="More.", previous_response_id="resp_1")


# ---------------------------------------------------------------- repeats and cancellation


def test_an_equal_call_joins_the_running_one_and_later_gets_its_answer(
    both: Any, name: str
) -> None:
    engine, running = both
    url = running.open(name)
    engine.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(post, url, "messages", ask_of("messages")) for _ in range(4)]
        until(lambda: running.counts().get("joined", 0) >= 3)
        engine.gate.set()
        answers = [future.result() for future in asked]
    answers.append(post(url, "messages", ask_of("messages")))
    assert {found.status_code for found in answers} == {200}
    assert len({found.content for found in answers}) == 1
    assert len(engine.bodies) == 1
    with running.pool() as records:
        assert len(records.calls(name)) == 1
    # another body, another route, or another Idempotency-Key is another call
    post(url, "messages", ask_of("messages", metadata={"n": 2}))
    post(url, "messages", ask_of("messages"), headers={"Idempotency-Key": "b"})
    post(url, "chat/completions", ask_of("messages"))
    assert len(engine.bodies) == 4


def test_an_equal_call_can_be_asked_to_sample_again(both: Any, name: str) -> None:
    engine, running = both
    url = running.open(name, repeat="sample", sampling={"seed": 5})
    for count in ("0", "0", "1"):  # what OpenAI's and Anthropic's clients send with a retry
        headers = {"x-stainless-retry-count": count}
        post(url, "chat/completions", ask_of("chat"), headers=headers).raise_for_status()
    assert [body["seed"] for body in engine.bodies] == [5, 6]


def test_a_call_whose_client_left_is_ended_and_not_recorded(both: Any, name: str) -> None:
    engine, running = both
    url = running.open(name)
    engine.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(f"{url}/chat/completions", json=ask_of("chat"), timeout=0.2)
    until(lambda: engine.left == 1)  # the engine's own request was ended
    engine.gate.set()
    assert running.counts()["cancelled"] >= 1
    with running.pool() as pool:
        assert pool.calls(name) == []
    # the same request later is a new call
    assert post(url, "chat/completions", ask_of("chat")).json()["choices"][0]["call_index"] == 0
    assert len(engine.bodies) == 2


def test_a_retry_finds_the_call_that_its_timeout_left(both: Any, name: str) -> None:
    engine, running = both
    url = running.open(name)
    engine.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        options: Json = {"max_retries": 1, "timeout": httpx.Timeout(30, read=0.3)}
        c = client(url, **options)
        c._calculate_retry_timeout = lambda *_: 0.05
        made = pool.submit(c.chat.completions.create, model="m", messages=HELLO)
        until(lambda: running.control("open", {}).status_code and len(engine.bodies) == 1)
        before = running.counts().get("joined", 0)
        until(lambda: running.counts().get("joined", 0) > before)
        engine.gate.set()
        assert made.result().choices[0].message.content == "All is well."
    assert len(engine.bodies) == 1
    with running.pool() as records:
        assert len(records.calls(name)) == 1


def test_parallel_calls_and_sub_agents_get_a_record_each(both: Any, name: str) -> None:
    engine, running = both
    running.open(name)
    engine.gate.clear()

    def ask(number: int) -> int:
        # sub-agents share the key; a plain /v1 names the episode by it
        c = openai.OpenAI(base_url=f"{running.url}/v1", api_key=name, max_retries=0)
        messages = [{"role": "user", "content": f"Part {number}."}]
        made = c.chat.completions.create(model="m", messages=messages)
        return int(made.choices[0].call_index)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        until(lambda: len(engine.bodies) == 8)
        engine.gate.set()
        assert sorted(future.result() for future in asked) == list(range(8))
    with running.pool() as records:
        found = records.calls(name)
    assert {record.prompt_ids for record in found} == {tuple(ids) for ids in engine.prompts()}


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
        part = ids[begin:end]
        return answer(
            ids=part or [0],
            **({} if part else {"token_ids": []}),
            finish_reason="stop" if end == len(ids) else "abort",
            logprobs={"token_logprobs": [-0.25] * len(part)},
            versions=[[0, len(part), version]],
        )

    engine.reply = reply
    post(running.open(name), "chat/completions", ask_of("chat")).raise_for_status()
    with running.pool() as pool:
        (record,) = pool.calls(name)
    assert list(record.response_ids) == ids and len(record.logprobs) == len(ids)
    assert record.versions == ((0, 5, 1), (5, len(ids), 2))
    assert engine.prompts()[-1] == [*engine.prompts()[0], *ids[:5]]
    assert engine.bodies[-1]["max_tokens"] == engine.bodies[0]["max_tokens"] - 5


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

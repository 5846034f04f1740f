"""rl.gateway as a process, between real clients and an engine behind real HTTP: ids, streams,
repeats and cancellation."""

import concurrent.futures
import json
from typing import Any

import httpx
import openai
import pytest
from gateway_fakes import (
    ANTHROPIC_TOOLS,
    CALLING,
    EOS,
    FLAT_TOOLS,
    HELLO,
    HTTP,
    PATHS,
    TOKENIZER,
    TOOLS,
    answer,
    ask_of,
    client,
    post,
    until,
)

from model.chat_format import render_ids, render_next_ids

Json = dict[str, Any]


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


def test_a_reply_that_repeats_itself_is_cut_by_the_run_and_says_so_in_the_record_only(
    both: Any, name: str
) -> None:
    """Clients know `length`; the word `repetition` is the trainer's."""
    engine, running = both
    engine.reply = lambda body: answer(finish_reason="repetition")
    url = running.open(name, sampling={"repetition": [30, 0.9]})
    assert running.open(name, sampling={"repetition": [30, 0.9]}) == url
    chat = client(url).chat.completions.create(model="m", messages=HELLO)
    text = client(url).completions.create(model="m", prompt="a b")
    assert chat.choices[0].finish_reason == text.choices[0].finish_reason == "length"
    asked = {"tokens": 30, "probability": 0.9}
    assert [body["repetition_stop"] for body in engine.bodies] == [asked, asked]
    with running.pool() as pool:
        assert [call.finish_reason for call in pool.calls(name)] == ["repetition"] * 2


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

"""The server's API: stock clients against a tiny random model and against written replies."""

import concurrent.futures
import json
from collections.abc import Iterator

import httpx
import openai
import pytest
import torch
from serve_helpers import (
    ADD,
    CONTEXT,
    HELLO,
    Scripted,
    Served,
    served,
    serving,
    tiny_tokenizer,
)

from model.batching import Batcher
from model.errors import ModelError
from model.generate import GenRequest
from model.scoring import token_logprobs
from model.service import Service


@pytest.fixture(scope="module", name="served")
def a_server() -> Iterator[Served]:
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[openai.OpenAI, Scripted]]:
    tokenizer = tiny_tokenizer()
    engine = Scripted(tokenizer)
    service = Service(
        name="tiny",
        tokenizer=tokenizer,
        batcher=Batcher(engine),
        context=CONTEXT,
        vocab_size=tokenizer.vocab_size,
    )
    with serving(service) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), engine


# ---------------------------------------------------------------- stock openai client


def test_chat_with_the_stock_client(served: Served) -> None:
    reply = served.client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, temperature=0.7, top_p=0.9, seed=5
    )
    [choice] = reply.choices
    assert choice.finish_reason in ("stop", "length") and choice.message.role == "assistant"
    assert 0 < reply.usage.completion_tokens <= 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.model == "tiny" and choice.model_extra["constrained"] is False


def test_a_seed_fixes_the_reply_whatever_else_is_asked(served: Served) -> None:
    def ask(seed: int, n: int = 1) -> list[list[int]]:
        reply = served.client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=16,
            seed=seed,
            n=n,
            extra_body={"return_token_ids": True},
        )
        return [choice.model_extra["token_ids"] for choice in reply.choices]

    alone = ask(11)[0]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(ask, [11, 12, 13, 14, 15, 11, 17, 18]))
    assert crowd[0] == [alone] and crowd[5] == [alone]
    assert len({tuple(ids) for [ids] in crowd}) == 7
    three = ask(11, n=3)
    assert three[0] == alone and len({tuple(ids) for ids in three}) == 3
    assert three == ask(11, n=3)


def test_log_probs_and_ids_rescore_to_the_same(served: Served) -> None:
    for temperature, top_p in ((1.0, 1.0), (0.6, 0.8)):
        reply = served.client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=24,
            n=4,
            seed=1,
            logprobs=True,
            temperature=temperature,
            top_p=top_p,
            extra_body={"return_token_ids": True},
        )
        for choice in reply.choices:
            prompt, ids = choice.model_extra["prompt_token_ids"], choice.model_extra["token_ids"]
            logprobs = [entry.logprob for entry in choice.logprobs.content]
            assert len(logprobs) == len(ids) == len(choice.logprobs.content)
            row = torch.tensor([prompt + ids])
            with torch.no_grad():
                again = token_logprobs(served.model, row, torch.tensor([row.shape[1]]), temperature)
            torch.testing.assert_close(
                again[0, len(prompt) :], torch.tensor(logprobs), atol=1e-4, rtol=0
            )
            raw = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
            assert raw.decode(errors="replace") == served.tokenizer.decode(ids)
        assert reply.model_extra["prompt_token_ids"] == prompt


def test_constrained_log_probs_are_those_of_the_unmasked_softmax(served: Served) -> None:
    reply = served.client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        tools=[ADD],
        tool_choice="required",
        seed=2,
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    [choice] = reply.choices
    assert choice.model_extra["constrained"] is True and reply.model_extra["constrained"] is True
    prompt, ids = choice.model_extra["prompt_token_ids"], choice.model_extra["token_ids"]
    row = torch.tensor([prompt + ids])
    with torch.no_grad():
        again = token_logprobs(served.model, row, torch.tensor([row.shape[1]]))
    logprobs = torch.tensor([entry.logprob for entry in choice.logprobs.content])
    torch.testing.assert_close(again[0, len(prompt) :], logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_random_model_must_write_a_valid_call(served: Served, choice) -> None:
    for seed in range(4):
        reply = served.client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[ADD],
            tool_choice=choice,
            seed=seed,
            parallel_tool_calls=False,
        )
        [made] = reply.choices[0].message.tool_calls
        arguments = json.loads(made.function.arguments)
        assert made.function.name == "add" and set(arguments) == {"a", "b", "mood"}
        assert 0 <= arguments["a"] <= 99 and arguments["mood"] in ("calm", "hasty")
        assert reply.choices[0].finish_reason == "tool_calls"
        assert reply.choices[0].message.content is None


def test_auto_leaves_the_model_free_and_none_hides_the_tools(served: Served) -> None:
    def ask(**more) -> openai.types.chat.ChatCompletion:
        return served.client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=4, **more
        )

    auto, none = ask(tools=[ADD], tool_choice="auto"), ask(tools=[ADD], tool_choice="none")
    assert auto.choices[0].model_extra["constrained"] is False
    assert auto.usage.prompt_tokens > none.usage.prompt_tokens == ask().usage.prompt_tokens


def test_streaming_gives_the_same_reply(served: Served) -> None:
    ask = {"model": "tiny", "messages": HELLO, "seed": 4, "tools": [ADD], "tool_choice": "required"}
    whole = served.client.chat.completions.create(**ask).choices[0]
    chunks = list(
        served.client.chat.completions.create(
            **ask, stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    made = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(c.function.name, c.function.arguments) for c in made] == [
        (c.function.name, c.function.arguments) for c in whole.message.tool_calls
    ]
    thought = "".join((d.model_extra or {}).get("reasoning_content") or "" for d in deltas)
    assert thought == whole.message.model_extra["reasoning_content"]
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].usage.completion_tokens > 0 and deltas[0].role == "assistant"


def test_concurrent_requests_are_batched(served: Served) -> None:
    def ask(seed: int) -> int:
        reply = served.client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=40, seed=seed
        )
        return reply.usage.completion_tokens

    served.runner.gate.clear()
    served.runner.sizes.clear()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, seed) for seed in range(16)]
        served.until(lambda health: health["running"] + health["waiting"] == 16)
        served.runner.gate.set()
        lengths = [future.result() for future in asked]
    # The first came alone, or with whoever came while it was read; the others join it together.
    assert max(served.runner.sizes) >= 15 and len(served.runner.sizes) <= 41
    assert sum(served.runner.sizes) == sum(lengths)


def test_a_long_and_a_short_prompt_may_share_a_batch_at_the_context_limit(served: Served) -> None:
    def request(prompt: int, new: int) -> GenRequest:
        ids = tuple(10 + i % 300 for i in range(prompt))
        return GenRequest(prompt_ids=ids, max_new_tokens=new, seed=prompt)

    wanted = [request(CONTEXT - 10, 10), request(20, CONTEXT - 20)]
    futures = served.service.batcher.submit(wanted)
    assert [len(f.result(60).ids) for f in futures] == [10, CONTEXT - 20]
    assert 2 in served.runner.sizes


# ---------------------------------------------------------------- requests at fault


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"model": "other"}, 404, "model 'other' does not exist; this server has 'tiny'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, 400, "unknown role 'robot'"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty: this is not applied here"),
        ({"response_format": {"type": "poem"}}, 400, "response_format"),
        ({"tools": [ADD, ADD]}, 400, "two tools are named 'add'"),
        ({"tools": [ADD], "tool_choice": "sometimes"}, 400, "tool_choice"),
        ({"tool_choice": "required"}, 400, "no tools"),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            400,
            "'sub'",
        ),
        (
            {"messages": [{"role": "user", "content": " 1 2 3" * 1000}]},
            400,
            f"tokens but the context is {CONTEXT}",
        ),
    ],
)
def test_bad_requests_get_openai_shaped_errors(served: Served, change, status, reason) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2} | change
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == status and reason in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]
    assert "\n" not in error["message"]


def test_the_context_error_names_both_numbers(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": " 1 2 3" * 1000}]
        )
    assert caught.value.code == "context_length_exceeded"
    assert "30" in str(caught.value) and str(CONTEXT) in str(caught.value)


def test_broken_json_and_unknown_paths(served: Served) -> None:
    url = f"{served.url}/v1/chat/completions"
    broken = httpx.post(url, content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and broken.json()["error"]["message"]
    missing = httpx.get(f"{served.url}/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["message"].startswith("GET /v1")
    assert httpx.get(url).status_code == 405


def test_models_and_health(served: Served) -> None:
    [entry] = served.client.models.list().data
    assert entry.id == "tiny" and entry.model_extra["max_model_len"] == CONTEXT
    assert entry.model_extra["tokenizer_hash"] == served.tokenizer.hash
    assert served.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")
    idle = {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}
    assert served.until(lambda health: not health["running"]) == idle


# ---------------------------------------------------------------- replies written for the test


def say(scripted: tuple[openai.OpenAI, Scripted], text: str, finish: str = "stop", **more):
    client, engine = scripted
    engine.texts, engine.finish = [text], finish
    return client.chat.completions.create(model="tiny", messages=HELLO, **more).choices[0]


def test_thinking_comes_apart_and_a_bare_script_is_the_content(scripted) -> None:
    choice = say(scripted, "Hm.\n</think>\n\nYes.[e~[")
    assert (choice.message.content, choice.message.model_extra["reasoning_content"]) == (
        "Yes.",
        "Hm.",
    )
    script = "import numpy\nprint( 1 )\n"
    choice = say(scripted, f"</think>\n\n{script}[e~[")
    assert choice.message.content == script and choice.model_extra["version"] == 4


def test_stop_texts_cut_the_reply_and_its_ids(scripted) -> None:
    choice = say(
        scripted,
        "</think>\n\nsay some words to learn[e~[",
        stop=["words"],
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    assert choice.message.content == "say some " and choice.finish_reason == "stop"
    ids = choice.model_extra["token_ids"]
    kept = scripted[1].tokenizer.decode(ids)
    assert "words" in kept and "learn" not in kept
    assert len(choice.logprobs.content) == len(ids)


def test_a_malformed_call_is_repaired_once(scripted) -> None:
    text = (
        '</think>\n\n<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">1</invoke>[e~['
    )
    choice = say(scripted, text, tools=[ADD])
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 1}
    assert choice.model_extra["repaired"] is True and choice.finish_reason == "tool_calls"


def test_a_call_cut_off_by_length_is_an_error_and_never_run(scripted) -> None:
    text = '</think>\n\n<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">1'
    choice = say(scripted, text, finish="length", tools=[ADD])
    assert choice.message.tool_calls is None and choice.finish_reason == "length"
    assert "cut off" in choice.model_extra["tool_call_error"]
    assert "add(a: integer 0..99" in choice.model_extra["tool_call_error"]


def test_a_call_of_an_unknown_tool_is_reported_with_the_schema(scripted) -> None:
    text = (
        '</think>\n\n<minimax:tool_call>\n<invoke name="sub">\n</invoke>\n</minimax:tool_call>[e~['
    )
    choice = say(scripted, text, tools=[ADD])
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"
    assert "no tool 'sub'" in choice.model_extra["tool_call_error"]


def test_an_engine_failure_is_a_server_error(scripted) -> None:
    client, engine = scripted
    engine.broken = ModelError("out of luck")
    try:
        with pytest.raises(openai.InternalServerError, match="generation failed: out of luck"):
            client.chat.completions.create(model="tiny", messages=HELLO)
    finally:
        engine.broken = None
    assert say(scripted, "</think>\n\nYes.[e~[").message.content == "Yes."


# ---------------------------------------------------------------- LangGraph, unchanged


def test_a_langgraph_react_agent_runs_a_tool_round(scripted) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    from langchain_core.tools import tool
    from langgraph.prebuilt import create_react_agent

    @tool
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    client, engine = scripted
    engine.finish = "stop"
    engine.texts = [
        '</think>\n\n<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">2</parameter>\n'
        '<parameter name="b">40</parameter>\n</invoke>\n</minimax:tool_call>[e~[',
        "</think>\n\nIt is 42.[e~[",
    ]
    chat = langchain_openai.ChatOpenAI(
        model="tiny", base_url=str(client.base_url), api_key="none", max_retries=0
    )
    result = create_react_agent(chat, [add]).invoke({"messages": [("user", "2 + 40?")]})
    kinds = [message.type for message in result["messages"]]
    assert kinds == ["human", "ai", "tool", "ai"]
    assert result["messages"][2].content == "42"
    assert result["messages"][-1].content == "It is 42."


def test_a_langchain_model_with_a_forced_tool_on_a_random_model(served: Served) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(
        model="tiny", base_url=f"{served.url}/v1", api_key="none", max_retries=0, seed=3
    )
    [made] = (
        chat.bind_tools([ADD], tool_choice="any", parallel_tool_calls=False).invoke("go").tool_calls
    )
    assert made["name"] == "add" and set(made["args"]) == {"a", "b", "mood"}
    streamed = None
    for chunk in chat.bind_tools([ADD], tool_choice="any").stream("go"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["name"] == "add"

"""`/v1/completions` and `response_format`: ids, echo, log-probs, schemas."""

import concurrent.futures
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from serve_helpers import CONTEXT, HELLO, Served, served

from model.scoring import token_logprobs

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["calm", "hasty"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", name="served")
def a_server() -> Iterator[Served]:
    with served() as server:
        yield server


def complete(served: Served, **body: Any) -> dict[str, Any]:
    answer = served.http.post(f"{served.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def scores(served: Served, ids: list[int]) -> list[float]:
    """Log-probs of all ids but the first, by the trainer's forward pass."""
    with torch.no_grad():
        again_BT = token_logprobs(served.model, torch.tensor([ids]), torch.tensor([len(ids)]))
    return again_BT[0, 1:].tolist()


def test_a_prompt_is_text_or_ids_or_a_list_of_either(served: Served) -> None:
    texts = ["say some words", "learn"]
    ids = [served.tokenizer.encode(text) for text in texts]

    def ask(prompt: Any) -> list[tuple[Any, ...]]:
        answer = complete(served, prompt=prompt, max_tokens=9, seed=3, return_token_ids=True, n=2)
        keys = ("prompt_token_ids", "token_ids", "text", "finish_reason")
        choices = answer["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        read = sum(len(choice["prompt_token_ids"]) for choice in choices) // 2
        assert answer["usage"]["prompt_tokens"] == read
        return [tuple(choice[key] for key in keys) for choice in choices]

    alone = [ask(text) for text in texts]
    assert [ask(prompt) for prompt in ids] == alone
    assert ask(texts) == ask(ids) == alone[0] + alone[1]
    assert [choice[0] for choice in alone[0] + alone[1]] == [ids[0], ids[0], ids[1], ids[1]]


def test_ids_and_log_probs_rescore_to_the_same(served: Served) -> None:
    prompt = list(range(20, 70))
    for _ in range(2):  # the second time the prompt's beginning comes from the cache
        answer = complete(
            served, prompt=prompt, max_tokens=30, n=3, seed=5, logprobs=0, return_token_ids=True
        )
        for choice in answer["choices"]:
            again = scores(served, prompt + choice["token_ids"])[len(prompt) - 1 :]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(again, abs=1e-4)
            tokens = [served.tokenizer.decode([id]) for id in choice["token_ids"]]
            assert choice["logprobs"]["tokens"] == tokens
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 48


@pytest.mark.parametrize("new", [0, 6])
def test_echo_scores_the_prompt_as_training_does(served: Served, new: int) -> None:
    text = "say some words to learn"
    ids = served.tokenizer.encode(text)
    answer = complete(
        served, prompt=text, max_tokens=new, echo=True, logprobs=2, seed=1, return_token_ids=True
    )
    [choice] = answer["choices"]
    made = choice["token_ids"]
    assert len(made) == answer["usage"]["completion_tokens"] <= new
    assert bool(made) == bool(new) and choice["text"].startswith(text)
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + len(made)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    again = scores(served, ids + made)
    assert logprobs["token_logprobs"][1:] == pytest.approx(again, abs=1e-4)
    for token, own, top in zip(
        logprobs["tokens"][1:], again, logprobs["top_logprobs"][1:], strict=True
    ):
        assert top[token] == pytest.approx(own, abs=1e-4) and len(top) in (1, 2, 3)
        assert max(top.values()) >= own - 1e-4
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]


def test_a_reply_ends_after_tokens_in_a_row_that_were_all_too_likely(served: Served) -> None:
    ask: dict[str, Any] = {"prompt": [20, 30], "max_tokens": 30, "temperature": 0.001, "seed": 1}
    ask |= {"ignore_eos": True, "return_token_ids": True, "logprobs": 0}
    [free] = complete(served, **ask)["choices"]
    assert free["finish_reason"] == "length"
    stop = {"tokens": 5, "probability": 0.5}
    [cut] = complete(served, **ask, repetition_stop=stop)["choices"]
    sure = [value > math.log(0.5) for value in free["logprobs"]["token_logprobs"]]
    first = next(end for end in range(5, 31) if all(sure[end - 5 : end]))
    assert cut["finish_reason"] == "repetition" and cut["token_ids"] == free["token_ids"][:first]
    for wrong in ({"tokens": 0, "probability": 0.5}, {"tokens": 5, "probability": 1}, [5, 0.5]):
        body = ask | {"repetition_stop": wrong}
        assert served.http.post(f"{served.url}/v1/completions", json=body).status_code in (400, 422)


def test_the_stock_client_reads_it(served: Served) -> None:
    reply = served.client.completions.create(
        model="tiny", prompt=[30, 40, 50], max_tokens=7, logprobs=1, seed=2, stop=["xyz"]
    )
    [choice] = reply.choices
    assert choice.text == "".join(choice.logprobs.tokens).removesuffix("[e~[")
    assert reply.usage.completion_tokens == len(choice.logprobs.token_logprobs) <= 7


def test_a_reply_does_not_depend_on_what_else_is_asked(served: Served) -> None:
    def ask(seed: int) -> dict[str, Any]:
        body = {"prompt": [20 + seed % 3] * (5 + seed % 7), "max_tokens": 10 + seed, "seed": seed}
        answer = complete(served, **body, return_token_ids=True, logprobs=0)
        return answer["choices"][0]

    alone = [ask(seed) for seed in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(ask, range(12)))
    for one, other in zip(alone, crowd, strict=True):
        assert one["token_ids"] == other["token_ids"]
        pair = (one["logprobs"].pop("token_logprobs"), other["logprobs"].pop("token_logprobs"))
        assert pair[0] == pytest.approx(pair[1], abs=1e-4)


def test_a_prompt_beyond_the_context_names_both_numbers(served: Served) -> None:
    for length in (CONTEXT, CONTEXT + 7):
        with pytest.raises(openai.BadRequestError) as caught:
            served.client.completions.create(model="tiny", prompt=[20] * length)
        assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
        assert f"has {length} tokens but the context is {CONTEXT}" in str(caught.value)
    whole = complete(served, prompt=[20] * (CONTEXT - 1), max_tokens=50, ignore_eos=True)
    assert whole["usage"]["completion_tokens"] == 1
    assert whole["choices"][0]["finish_reason"] == "length"


# ---------------------------------------------------------------- JSON of a schema


def wanted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "wanted", "schema": schema}}


def test_a_random_model_writes_json_of_the_schema(served: Served) -> None:
    for seed in range(4):
        reply = served.client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            seed=seed,
            max_tokens=600,
            response_format=wanted(PERSON),
            logprobs=True,
            extra_body={"return_token_ids": True},
        )
        [choice] = reply.choices
        made = json.loads(choice.message.content)
        assert set(made) == set(PERSON["required"]) and 0 <= made["age"] <= 120
        assert made["name"].isalpha() and made["mood"] in ("calm", "hasty")
        assert choice.finish_reason == "stop" and choice.model_extra["constrained"] is True
        ids = [*choice.model_extra["prompt_token_ids"], *choice.model_extra["token_ids"]]
        again = scores(served, ids)[-len(choice.logprobs.content) :]
        got = [entry.logprob for entry in choice.logprobs.content]
        assert got == pytest.approx(again, abs=1e-4)
        text = complete(
            served, prompt="x", seed=seed, max_tokens=600, response_format=wanted(PERSON)
        )
        assert set(json.loads(text["choices"][0]["text"])) == set(PERSON["required"])


def test_a_json_object_without_a_schema(served: Served) -> None:
    reply = complete(
        served, prompt="x", seed=1, max_tokens=900, response_format={"type": "json_object"}
    )
    [choice] = reply["choices"]
    assert choice["text"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["text"]), dict)


def test_langchain_asks_for_structured_output(served: Served) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(
        model="tiny", base_url=f"{served.url}/v1", api_key="none", max_retries=0, seed=3
    )
    structured = chat.with_structured_output({"title": "person", **PERSON}, method="json_schema")
    assert set(structured.invoke("who?")) == set(PERSON["required"])


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        ({"type": "json_schema"}, 'expected {"json_schema"'),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, 'expected {"json_schema"'),
        (wanted({"type": "poem"}), "the schema gives no grammar"),
        (wanted({"$ref": "#/nowhere"}), "the schema gives no grammar"),
        (wanted({"type": "string", "pattern": "("}), "the schema gives no grammar"),
        ({"type": "xml"}, 'type is "text"'),
    ],
)
def test_a_schema_that_cannot_be_used_is_named(served: Served, format: Any, reason: str) -> None:
    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": HELLO})):
        answer = httpx.post(
            f"{served.url}/v1/{path}", json={**body, "response_format": format}, timeout=30
        )
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "response_format"
        assert reason in error["message"] and "\n" not in error["message"]

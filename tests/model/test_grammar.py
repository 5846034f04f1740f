"""Grammar-constrained tool calls: a model that draws at random still writes valid calls."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat_format import parse, render_reply_ids
from model.grammar import GrammarConstraint, GrammarError, GrammarFactory
from model.tokenizer import Tokenizer, train_tokenizer


def tool(name: str, properties: dict, required: list[str] | None = None) -> dict:
    schema = {"type": "object", "properties": properties, "required": required or []}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


EDIT = tool(
    "propose_edit",
    {
        "key": {"enum": ["optim.lr", "optim.lr_decay", "env.cpu_seconds"]},
        "direction": {"type": "string", "enum": ["increase", "decrease"]},
        "value": {"type": "number", "minimum": 0, "maximum": 1},
        "why": {"type": "string", "maxLength": 60},
    },
    ["key", "direction"],
)
MISC = tool(
    "misc",
    {
        "flag": {"type": "boolean"},
        "small": {"type": "integer", "minimum": -3, "exclusiveMaximum": 40},
        "big": {"type": "integer", "minimum": 0, "maximum": 999_999},
        "fixed": {"const": 5},
        "mixed": {"enum": ["a<b", 'say "hi"', 3, None, True]},
        "slug": {"type": "string", "pattern": "^[a-z]{2,4}-[0-9]+$", "maxLength": 20},
        "maybe": {"anyOf": [{"type": "string", "maxLength": 10}, {"type": "null"}]},
        "ratio": {"type": ["number", "null"]},
        "inner": {"$ref": "#/$defs/Inner"},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "text": {"type": "string", "minLength": 3, "maxLength": 5},
    },
    ["flag", "small", "big", "fixed", "mixed", "slug", "ratio", "inner", "list", "text"],
)
MISC["function"]["parameters"]["$defs"] = {
    "Inner": {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
}
EMPTY = tool("look", {})
TOOLS = [EDIT, MISC, EMPTY]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = '\n<invoke name="propose_edit">\n<parameter name="key">optim.lr</parameter> some words'
    return train_tokenizer([text] * 50, vocab_size=420)


@pytest.fixture(scope="module")
def factory(tokenizer: Tokenizer) -> GrammarFactory:
    return GrammarFactory(tokenizer, vocab_size=448)


def write_at_random(constraint: GrammarConstraint, eos_id: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    ids: list[int] = []
    while not constraint.done():
        allowed = constraint.mask().nonzero().flatten().tolist()
        ids.append(rng.choice(allowed))
        constraint.accept(ids[-1])
        assert len(ids) < 6000
    assert ids[-1] == eos_id and eos_id not in ids[:-1]
    return ids


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**9), parallel=st.booleans())
def test_random_tokens_under_the_grammar_are_valid_calls(
    factory: GrammarFactory, tokenizer: Tokenizer, seed: int, parallel: bool
) -> None:
    constraint = factory.tool_call(TOOLS, "required", parallel=parallel)
    ids = write_at_random(constraint, tokenizer.eos_id, seed)
    reply = parse(tokenizer.decode(ids), TOOLS)  # checks the schemas too
    assert 1 <= len(reply.tool_calls) <= (4 if parallel else 1)
    assert reply.content == "" and len(reply.reasoning) <= 200


def test_every_tool_and_optional_parameter_is_reached(
    factory: GrammarFactory, tokenizer: Tokenizer
) -> None:
    seen = set()
    for seed in range(60):
        constraint = factory.tool_call(TOOLS, "required", parallel=False)
        reply = parse(tokenizer.decode(write_at_random(constraint, 2, seed)), TOOLS)
        [made] = reply.tool_calls
        seen |= {made.name, *json.loads(made.arguments_json)}
    assert {"propose_edit", "misc", "look", "value", "why", "maybe"} <= seen


def test_a_named_tool_is_the_only_one(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        constraint = factory.tool_call(TOOLS, "propose_edit")
        reply = parse(tokenizer.decode(write_at_random(constraint, 2, seed)), TOOLS)
        assert {made.name for made in reply.tool_calls} == {"propose_edit"}


def test_the_calls_that_training_shows_are_allowed(
    factory: GrammarFactory, tokenizer: Tokenizer
) -> None:
    arguments = {"key": "optim.lr", "direction": "decrease", "value": 0.25, "why": "it fell"}
    call = {"name": "propose_edit", "arguments": arguments}
    for reasoning in ("", "Valid share fell from 0.9 to 0.1."):
        message = {"content": "", "reasoning_content": reasoning, "tool_calls": [call]}
        constraint = factory.tool_call(TOOLS, "required")
        for token_id in render_reply_ids(message, tokenizer):
            assert constraint.mask()[token_id]
            constraint.accept(token_id)
        assert constraint.done()


def test_the_mask_is_as_wide_as_the_model(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    mask = factory.tool_call(TOOLS, "required").mask()
    assert mask.shape == (448,) and not mask[tokenizer.vocab_size :].any()
    assert not mask[tokenizer.eos_id] and mask[tokenizer.token_id("</think>")]


def test_free_choices_are_not_constrained(factory: GrammarFactory) -> None:
    for choice in (None, "none", "auto"):
        assert factory.tool_call(TOOLS, choice) is None


def test_requests_do_not_share_a_state(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    first, second = factory.tool_call(TOOLS, "look"), factory.tool_call(TOOLS, "look")
    first.accept(tokenizer.token_id("</think>"))
    assert second.mask()[tokenizer.token_id("</think>")]
    with pytest.raises(GrammarError, match="breaks the grammar"):
        first.accept(tokenizer.token_id("</think>"))


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ([], "required", "no tools"),
        (TOOLS, "nope", "among the tools: propose_edit, misc, look"),
        ([EMPTY, EMPTY], "required", "two tools are named 'look'"),
        ([tool("f", {"x": {"type": "string", "pattern": "(?=a)"}}, ["x"])], "f", "look-around"),
        ([tool("f", {"x": {"type": "string", "pattern": "(((("}}, ["x"])], "f", "not a regular"),
        ([tool("f", {"x": {"type": "widget"}}, ["x"])], "f", "unknown parameter type"),
        ([tool("f", {"x": {"type": "integer", "minimum": 2, "maximum": 1}})], "f", "no integer"),
    ],
)
def test_impossible_grammars_are_refused(factory, tools, choice, reason) -> None:
    with pytest.raises(GrammarError, match=reason) as caught:
        factory.tool_call(tools, choice)
    assert "\n" not in str(caught.value)

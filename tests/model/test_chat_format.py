"""M2's chat syntax: the template to the letter, render then parse, and one repair."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat_format import (
    ChatFormatError,
    ToolCallError,
    parse,
    render,
    render_ids,
    render_reply,
    render_reply_ids,
    repair,
)
from model.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

EDIT = {
    "type": "function",
    "function": {
        "name": "propose_edit",
        "description": "Change one key.",
        "parameters": {
            "type": "object",
            "properties": {
                "key": {"type": "string", "enum": ["optim.lr", "env.cpu_seconds"]},
                "direction": {"type": "string", "enum": ["increase", "decrease"]},
                "value": {"type": "number", "minimum": 0, "maximum": 1},
                "why": {"type": "string", "maxLength": 80},
            },
            "required": ["key", "direction"],
        },
    },
}
MIXED = {
    "name": "mixed",
    "parameters": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "flag": {"type": "boolean"},
            "items": {"type": "array", "items": {"type": "number"}},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "nested": {"$ref": "#/$defs/Inner"},
        },
        "$defs": {"Inner": {"type": "object", "properties": {"x": {"type": "string"}}}},
    },
}
TOOLS = [EDIT, MIXED]


def call(name: str, arguments: dict, id: str = "c1") -> dict:
    return {
        "id": id,
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    }


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some words to learn from <tool> <response>"] * 20, vocab_size=400)


def test_the_template_to_the_letter() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Mend it."},
        {
            "role": "assistant",
            "reasoning_content": "The rate is high.",
            "content": "I lower it.",
            "tool_calls": [
                call("propose_edit", {"key": "optim.lr", "direction": "decrease", "value": 0.5}),
                call("mixed", {"text": 'a "b"\nc', "flag": True, "items": [1, 2.5]}),
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "tool", "tool_call_id": "c2", "content": "error"},
    ]
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {}}}]
    assert (
        render(messages, tools)
        == """]~!b[]~b]system
Be brief.

# Tools
You may call one or more tools to assist with the user query.
Here are the tools available in JSONSchema format:

<tools>
<tool>{"name": "f", "parameters": {"type": "object", "properties": {}}}</tool>
</tools>

When making tool calls, use XML format to invoke tools and pass parameters:

<minimax:tool_call>
<invoke name="tool-name-1">
<parameter name="param-key-1">param-value-1</parameter>
...
</invoke>
</minimax:tool_call>[e~[
]~b]user
Mend it.[e~[
]~b]ai
<think>
The rate is high.
</think>

I lower it.
<minimax:tool_call>
<invoke name="propose_edit">
<parameter name="key">optim.lr</parameter>
<parameter name="direction">decrease</parameter>
<parameter name="value">0.5</parameter>
</invoke>
<invoke name="mixed">
<parameter name="text">a "b"
c</parameter>
<parameter name="flag">true</parameter>
<parameter name="items">[1, 2.5]</parameter>
</invoke>
</minimax:tool_call>[e~[
]~b]tool
<response>done</response>
<response>error</response>[e~[
]~b]ai
<think>
"""
    )


def test_thinking_before_the_last_user_message_is_left_out() -> None:
    turn = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    first = {"role": "user", "content": "One?"}
    shown = render([first, turn], None, add_generation_prompt=False)
    assert shown.endswith("]~b]ai\n<think>\nHm.\n</think>\n\nYes.[e~[\n")
    hidden = render([first, turn, {"role": "user", "content": "Two?"}], None)
    assert "]~b]ai\nYes.[e~[\n" in hidden and "Hm." not in hidden


def test_thinking_inside_the_content_is_understood() -> None:
    inline = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    apart = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert render([inline], None) == render([apart], None)


def test_content_parts_and_developer_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": "hi"}]
    assert "]~b]system\nab[e~[" in render(messages, None)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "robot", "content": ""}], "unknown role 'robot'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "text parts only"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "not JSON",
        ),
    ],
)
def test_messages_the_template_cannot_express(messages, reason) -> None:
    with pytest.raises(ChatFormatError, match=reason):
        render(messages, None)


# Text that the reply syntax can carry: anything but its own marks.
PLAIN = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<]["))
REPLY_CALL = st.fixed_dictionaries(
    {},
    optional={
        "text": PLAIN,
        "count": st.integers(),
        "flag": st.booleans(),
        "items": st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
        "maybe": st.none() | PLAIN.filter(lambda text: text.strip() != "null"),
        "nested": st.fixed_dictionaries({"x": PLAIN}),
    },
).map(lambda arguments: call("mixed", arguments))


@settings(deadline=None)
@given(reasoning=PLAIN, content=PLAIN, calls=st.lists(REPLY_CALL, max_size=3))
def test_what_is_rendered_parses_to_the_same(reasoning, content, calls) -> None:
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    reply = parse(render_reply(message | {"tool_calls": calls}), TOOLS)
    assert (reply.content, reply.reasoning) == (content, reasoning)
    wanted = [json.loads(c["function"]["arguments"]) for c in calls]
    assert [json.loads(c.arguments_json) for c in reply.tool_calls] == wanted
    assert len({c.id for c in reply.tool_calls}) == len(calls)


@settings(deadline=None)
@given(reasoning=PLAIN, content=PLAIN, calls=st.lists(REPLY_CALL, max_size=2), result=PLAIN)
def test_prompts_grow_by_appending_inside_a_user_turn(reasoning, content, calls, result) -> None:
    before = [{"role": "user", "content": "go"}]
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    message["tool_calls"] = calls
    after = [*before, message, {"role": "tool", "content": result}]
    assert render(after, TOOLS).startswith(render(before, TOOLS) + render_reply(message))


@settings(deadline=None)
@given(text=st.lists(st.sampled_from([*SPECIAL_TOKENS, "x", " ", "\n"])).map("".join))
def test_message_text_cannot_forge_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    def messages(body: str) -> list[dict]:
        return [
            {"role": "system", "content": body},
            {"role": "user", "content": body},
            {"role": "assistant", "content": "", "tool_calls": [call("mixed", {"text": body})]},
            {"role": "tool", "content": body},
        ]

    tools = [{"name": "mixed", "description": text}]
    honest_tools = [{"name": "mixed", "description": "x"}]
    ids = render_ids(messages(text), tools, tokenizer)
    honest = render_ids(messages("x"), honest_tools, tokenizer)
    assert [i for i in ids if i < 8] == [i for i in honest if i < 8]
    assert tokenizer.decode(ids) == render(messages(text), tools)


def test_ids_of_trusted_text_equal_the_encoded_prompt(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "some words"},
        {"role": "user", "content": "to learn"},
        {"role": "assistant", "content": "from", "tool_calls": [call("mixed", {"count": 3})]},
        {"role": "tool", "content": "<response>"},
    ]
    assert render_ids(messages, TOOLS, tokenizer) == tokenizer.encode(render(messages, TOOLS))
    reply = {"role": "assistant", "content": "import numpy"}
    assert render_reply(reply) == "</think>\n\nimport numpy[e~["
    assert render_reply_ids(reply, tokenizer) == tokenizer.encode(render_reply(reply))


def reply_text(inner: str) -> str:
    return f"</think>\n\n<minimax:tool_call>\n{inner}</minimax:tool_call>"


GOOD = '<invoke name="propose_edit">\n<parameter name="key">optim.lr</parameter>\n'
DOWN = '<parameter name="direction">decrease</parameter>\n</invoke>\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (reply_text(GOOD + DOWN)[:-22], "cut off before </minimax:tool_call>"),
        (reply_text(""), "no <invoke> inside"),
        (reply_text(GOOD), "missing </invoke>"),
        (reply_text("hello " + GOOD + DOWN), "unexpected text 'hello"),
        (reply_text(GOOD + "</invoke>\n"), "parameter 'direction' is missing"),
        (reply_text(GOOD.replace("optim.lr", "optim.rl") + DOWN), "is none of"),
        (reply_text(GOOD.replace('"key"', '"kee"') + DOWN), "'key' is missing"),
        (reply_text(GOOD.replace("propose_edit", "propose") + DOWN), "no tool 'propose'"),
        (
            reply_text(GOOD + '<parameter name="value">high</parameter>\n' + DOWN),
            "not a JSON number",
        ),
        (reply_text(GOOD + '<parameter name="value">7</parameter>\n' + DOWN), "above the allowed"),
        (
            reply_text(GOOD + f'<parameter name="why">{"x" * 81}</parameter>\n' + DOWN),
            "longer than",
        ),
        (reply_text(GOOD + '<parameter name="direction">decrease\n</invoke>\n'), "</parameter>"),
    ],
)
def test_malformed_calls_say_what_is_wrong_and_show_the_schema(text: str, reason: str) -> None:
    with pytest.raises(ToolCallError) as caught:
        parse(text, TOOLS)
    assert reason in str(caught.value)
    assert "propose_edit(key: optim.lr|env.cpu_seconds, direction:" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_wrong_values_pass_where_the_schema_is_not_checked() -> None:
    text = reply_text(GOOD + '<parameter name="value">high</parameter>\n' + DOWN)
    [made] = parse(text, TOOLS, check_schema=False).tool_calls
    assert json.loads(made.arguments_json)["value"] == "high"


def test_text_without_the_end_of_thinking_is_thinking() -> None:
    reply = parse("still at it", None)
    assert (reply.reasoning, reply.content) == ("still at it", "")


def test_without_tools_nothing_is_a_call() -> None:
    text = reply_text(GOOD + DOWN)
    assert parse(text, None).content == text.removeprefix("</think>\n\n")


@pytest.mark.parametrize(
    "text",
    [
        reply_text(GOOD + DOWN)[:-21],
        "</think>\n\n<minimax:tool_call>\n" + GOOD + '<parameter name="direction">decrease',
        "</think>\n\n" + GOOD + DOWN,
        reply_text(GOOD.replace("optim.lr", '"optim.lr"') + DOWN),
        reply_text(GOOD.replace("optim.lr", 'optim.lr"') + DOWN),
        reply_text(GOOD.replace('"propose_edit"', "propose_edit") + DOWN),
        reply_text(GOOD.replace("</parameter>", "") + DOWN),
        '</think>\n\n```json\n{"name": "propose_edit", "arguments": '
        '{"key": "optim.lr", "direction": "decrease"}}\n```',
        '</think>\n\n{"name": "propose_edit", "arguments": '
        '{"key": "optim.lr", "direction": "decrease"}}',
    ],
)
def test_usual_faults_are_mended_once(text: str) -> None:
    [made] = parse(repair(text, TOOLS), TOOLS).tool_calls
    assert json.loads(made.arguments_json) == {"key": "optim.lr", "direction": "decrease"}


def test_repair_keeps_thinking_content_and_what_it_cannot_mend() -> None:
    reply = parse(repair("Hm.\n</think>\n\nSo:\n" + GOOD + DOWN, TOOLS), TOOLS)
    assert (reply.reasoning, reply.content, len(reply.tool_calls)) == ("Hm.", "So:", 1)
    assert repair("</think>\n\njust words", TOOLS) == "</think>\n\njust words"


@settings(deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            [
                "<minimax:tool_call>",
                "</minimax:tool_call>",
                "</think>",
                '<invoke name="mixed">',
                "</invoke>",
                '<parameter name="text">',
                '<parameter name="count">',
                "</parameter>",
                "\n",
                "1",
                "x",
                "{",
                "[e~[",
            ]
        )
    ).map("".join)
)
def test_any_reply_parses_or_is_refused(text: str) -> None:
    for attempt in (text, repair(text, TOOLS)):
        try:
            reply = parse(attempt, TOOLS)
        except ToolCallError as error:
            assert error.reason and error.schema
        else:
            assert all(json.loads(made.arguments_json) is not None for made in reply.tool_calls)


def test_no_torch_is_needed_here() -> None:
    code = "import sys, model.chat_format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

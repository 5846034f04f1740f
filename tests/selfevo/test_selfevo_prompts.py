"""The agent's prompt and tools: small enough for the nano, and in step with the template."""

from __future__ import annotations

import json

from selfevo.agent_prompts import (
    AGENT_TOOLS,
    DEFAULT_KEYS,
    DEFAULT_PROGRAM,
    agent_messages,
    call_message,
    memory_line,
    program_text,
    schema_error,
    tool_message,
)
from selfevo.config import load_space
from selfevo.lab import TEMPLATE


def test_template_program_is_what_the_nano_was_trained_on() -> None:
    assert program_text((TEMPLATE / "program.md").read_text()) == DEFAULT_PROGRAM


def test_template_space_has_the_default_keys_in_order() -> None:
    assert tuple(load_space((TEMPLATE / "search_space.yaml").read_text()).keys) == DEFAULT_KEYS


def test_at_most_six_tools_and_a_short_prompt() -> None:
    assert len(AGENT_TOOLS) <= 6
    memory = [
        memory_line(r, "rollout.max_new_tokens", "increase", "accept", -12.3) for r in range(6)
    ]
    messages = agent_messages(
        7,
        100,
        [f"control-s{i}" for i in range(4)],
        memory=memory,
        reviews=["r1 reject : " + "word " * 40] * 3,
    )
    words = sum(len(m["content"].split()) for m in messages)
    words += sum(len(json.dumps(tool).split()) for tool in AGENT_TOOLS)
    assert words < 500  # a white-space BPE makes about two tokens of such a word


def test_reviews_memory_and_revision_reach_the_user_message() -> None:
    messages = agent_messages(
        2,
        3,
        ["control-s0"],
        memory=["r1 no proposal"],
        reviews=["r1 reject : too bold"],
        revise="optim.lr decrease",
    )
    text = messages[1]["content"]
    assert "round 2 of 3" in text and "runs control-s0" in text
    assert "r1 no proposal" in text and "too bold" in text and "revise optim.lr decrease" in text


def test_call_and_tool_messages_have_the_openai_form() -> None:
    call = call_message("run_digest", {"run": "control-s0"}, "a")
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"run": "control-s0"}
    assert tool_message("x", "a") == {"role": "tool", "tool_call_id": "a", "content": "x"}


def test_schema_error_names_every_call_and_the_fault() -> None:
    text = schema_error("why is missing")
    assert "why is missing" in text
    assert all(tool["function"]["name"] in text for tool in AGENT_TOOLS)

"""Reading a model's reply: one repair of the form, never of the sense; the two baselines."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfevo.agent_prompts import AGENT_TOOLS
from selfevo.agents import (
    Call,
    Hint,
    Malformed,
    plain_message,
    random_decision,
    read_reply,
    repair_json,
    rules_decision,
)
from selfevo.config import load_space
from selfevo.lab import TEMPLATE

SPACE = load_space((TEMPLATE / "search_space.yaml").read_text())
VALUES = {
    "optim.lr": 3e-3,
    "optim.warmup_steps": 1,
    "rollout.group_size": 8,
    "env.cpu_seconds": 3.0,
    "optim.weight_decay": 0.0,
}
GOOD = '{"key": "optim.lr", "direction": "decrease", "why": "valid falls"}'


def reply(arguments: Any, name: str = "propose_edit") -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "x1", "type": "function", "function": {"name": name, "arguments": arguments}}
        ],
    }


def test_a_good_call_is_taken_as_it_is() -> None:
    step = read_reply(reply(GOOD), AGENT_TOOLS, "c")
    assert step == Call("propose_edit", json.loads(GOOD), "x1", False)


@pytest.mark.parametrize(
    "text",
    [
        "```json\n" + GOOD + "\n```",
        GOOD[:-1],
        GOOD[:-2],
        GOOD + "}",
        "sure: " + GOOD,
        GOOD[:-1] + ",}",
        GOOD.replace('"}', '", "value": "0.0003"}'),
        GOOD.replace('"}', '", "value": null}'),
    ],
)
def test_a_broken_form_is_repaired_once(text: str) -> None:
    step = read_reply(reply(text), AGENT_TOOLS, "c")
    assert isinstance(step, Call) and step.repaired
    assert step.arguments["key"] == "optim.lr"


@pytest.mark.parametrize(
    ("message", "word"),
    [
        (reply("lower the rate"), "not JSON"),
        (reply(GOOD, "set_value"), "no tool named"),
        (reply('{"key": "optim.lr", "direction": "decrease"}'), "why is missing"),
        (reply(GOOD.replace("optim.lr", "seed")), "key must be one of"),
        (reply(GOOD.replace("decrease", "down")), "direction must be one of"),
        (reply(GOOD.replace('"}', '", "value": true}')), "value must be a number"),
        (reply(GOOD.replace('"}', '", "path": "x"}')), "path is not an argument"),
        (reply("[1, 2]"), "not JSON"),
        ({"role": "assistant", "content": "I think all is well."}, "no tool call"),
        ({"role": "assistant", "content": None}, "no tool call"),
    ],
)
def test_a_wrong_sense_is_never_guessed(message: dict[str, Any], word: str) -> None:
    step = read_reply(message, AGENT_TOOLS, "c")
    assert isinstance(step, Malformed) and word in step.problem


def test_calls_written_into_the_text_are_found() -> None:
    xml = (
        '<minimax:tool_call><invoke name="abstain"><parameter name="why">fine</parameter>'
        "</invoke></minimax:tool_call>"
    )
    for content in (xml, xml[:-25], '{"name": "abstain", "arguments": {"why": "fine"}}'):
        step = read_reply({"content": content}, AGENT_TOOLS, "c9")
        assert isinstance(step, Call) and step.name == "abstain" and step.id == "c9"
        assert str(step.arguments["why"]).startswith("fine")


def test_history_never_holds_unreadable_arguments() -> None:
    bad = reply("lower the rate")
    step = read_reply(bad, AGENT_TOOLS, "c")
    assert "tool_calls" not in plain_message(bad, step)
    good = read_reply(reply(GOOD[:-2]), AGENT_TOOLS, "c")
    call = plain_message(reply(GOOD[:-2]), good)["tool_calls"][0]
    assert json.loads(call["function"]["arguments"])["key"] == "optim.lr"


@given(st.text(max_size=200))
def test_any_text_is_survived(text: str) -> None:
    repair_json(text)
    assert isinstance(read_reply(reply(text), AGENT_TOOLS, "c"), (Call, Malformed))
    assert isinstance(read_reply({"content": text}, AGENT_TOOLS, "c"), (Call, Malformed))


@given(st.integers(0, len(GOOD)))
def test_every_cut_of_a_call_is_a_call_or_an_error(end: int) -> None:
    step = read_reply(reply(GOOD[:end]), AGENT_TOOLS, "c")
    if isinstance(step, Call):
        assert step.arguments["key"] == "optim.lr" and step.arguments["direction"] == "decrease"


def test_rules_take_the_worst_finding_that_is_still_open() -> None:
    hints = [
        Hint("slow", "warning", "env.cpu_seconds", "increase", "…"),
        Hint("valid_falling", "critical", "optim.lr", "decrease", "0.8 then 0.1"),
    ]
    name, arguments = rules_decision(hints, SPACE, VALUES)
    assert name == "propose_edit" and arguments["key"] == "optim.lr"
    assert rules_decision(hints, SPACE, VALUES, [("optim.lr", "decrease")])[0] == "abstain"
    assert rules_decision([], SPACE, VALUES)[0] == "abstain"


def test_random_is_repeatable_and_only_names_keys_that_can_move() -> None:
    found = {
        (d["key"], d["direction"])
        for d in (random_decision(SPACE, VALUES, str(i))[1] for i in range(300))
    }
    assert ("env.cpu_seconds", "increase") not in found  # at its upper end
    assert ("optim.weight_decay", "decrease") not in found
    assert {key for key, _ in found} == set(VALUES)
    assert random_decision(SPACE, VALUES, "7") == random_decision(SPACE, VALUES, "7")


@pytest.mark.parametrize(
    ("state", "remarks", "again"),
    [
        ("closed", [{"answer": "close"}], False),
        ("closed", [], True),  # the loop itself closed it, nobody answered
        ("rejected", [], False),
        ("reverted", [], False),
        ("open", [{"answer": "comment"}], True),
    ],
)
def test_an_edit_that_a_person_closed_is_not_proposed_again(
    state: str, remarks: list[dict[str, str]], again: bool
) -> None:
    from types import SimpleNamespace as Plain

    from selfevo.nodes.propose import _problem

    proposal = {"key": "optim.lr", "after": 3e-4}
    pr = Plain(number=1, round=1, state=state, remarks=remarks, control_arm="a", proposal=proposal)
    view = Plain(prs={1: pr}, control_arm="a", now=Plain(pr=None))
    problem = _problem(Plain(view=view), "optim.lr", "decrease", 3e-3, 3e-4)  # type: ignore[arg-type]
    assert (problem is None) == again

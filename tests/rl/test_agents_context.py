"""Context management: what an edit may touch, its budget, and what the next call shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.chat_format import render_ids
from model.tokenizer import Tokenizer
from rl.agents.context import (
    INSTRUCTION,
    SUMMARY,
    Action,
    Drop,
    Policy,
    Summarise,
    Truncate,
    fit,
    protected,
)
from rl.agents.context_client import ContextClient, ContextFullError, TemplateCounter
from rl.checkpoints import bundled_checkpoint
from rl.prefix_tree import build_packs
from rl.types import CallRecord, ChatReply, Message

TOKENIZER = Tokenizer.load(bundled_checkpoint())


def words(messages: Sequence[Message]) -> int:
    """A count that is easy to reckon: words, and two for each message."""
    return sum(2 + len(str(m.get("content") or "").split()) for m in messages)


def no_ask(question: list[Message], most: int) -> str:
    raise AssertionError("nothing to summarise here")


def message(role: str, n: int, mark: str = "w") -> Message:
    return {"role": role, "content": " ".join([mark] * n)}


def loop(turns: int, result: int = 10) -> list[Message]:
    """System prompt, task, then assistant and tool messages in turn."""
    history = [message("system", 3), message("user", 4)]
    for i in range(turns):
        history += [message("assistant", 5, f"a{i}"), message("tool", result, f"t{i}")]
    return history


def test_a_history_within_its_budget_is_left_alone() -> None:
    history = loop(3)
    fitted = fit(history, Policy(words(history)), words, no_ask)
    assert list(fitted.messages) == history
    assert fitted.actions == ()
    assert fitted.fits


def test_old_results_are_dropped_oldest_first_and_as_few_as_are_enough() -> None:
    history = loop(4)
    policy = Policy(words(history) - 1, 1.0, (Drop(keep=1, stub="-"), Truncate()))
    fitted = fit(history, policy, words, no_ask)
    assert next(m["content"] for m in fitted.messages if m["role"] == "tool") == "-"
    assert list(fitted.messages[4:]) == history[4:]
    tight = fit(history, Policy(words(history) - 1, 0.0, (Drop(keep=2, stub="-"),)), words, no_ask)
    contents = [m["content"] for m in tight.messages if m["role"] == "tool"]
    assert contents[:2] == ["-", "-"]
    assert contents[2:] == [m["content"] for m in history if m["role"] == "tool"][2:]


def test_results_told_as_the_users_words_can_be_dropped_too_but_not_the_last_turn() -> None:
    history = [message("system", 1), message("user", 2)]
    for i in range(3):
        history += [message("assistant", 2), message("user", 9, f"r{i}")]
    policy = Policy(words(history) - 1, 0.0, (Drop(keep=0, stub="-", roles=("user",)),))
    fitted = fit(history, policy, words, no_ask)
    assert [m["content"] for m in fitted.messages if m["role"] == "user"] == [
        history[1]["content"], "-", "-", history[-1]["content"],
    ]  # fmt: skip


def test_truncation_leaves_out_whole_exchanges() -> None:
    history = loop(5)
    fitted = fit(history, Policy(60, 0.75, (Truncate(keep=1),)), words, no_ask)
    assert fitted.tokens <= 45
    kept = list(fitted.messages)
    assert kept[:2] == history[:2]
    assert kept[2:] == history[-len(kept[2:]) :]
    assert kept[2]["role"] == "assistant"
    one_more = [*history[:2], *history[-len(kept[2:]) - 2 :]]
    assert words(one_more) > 45  # no more went than had to


def test_the_reports_rule_drops_every_reply_and_result() -> None:
    history = loop(5)
    fitted = fit(history, Policy(30, 0.0, (Truncate(keep=0),)), words, no_ask)
    assert list(fitted.messages) == history[:2]


def test_a_summary_replaces_old_exchanges_and_is_itself_summed_up_later() -> None:
    history = loop(4)
    asked: list[list[Message]] = []

    def ask(question: list[Message], most: int) -> str:
        asked.append(question)
        return f"summary {len(asked)}, at most {most}"

    policy = Policy(86, 0.5, (Summarise(keep=1, max_tokens=7),))
    fitted = fit(history, policy, words, ask)
    assert asked[0][:2] == history[:2]
    assert asked[0][-1] == {"role": "user", "content": INSTRUCTION}
    assert asked[0][2:-1] == history[2:-2]
    summary = {"role": "user", "name": SUMMARY, "content": "summary 1, at most 7"}
    assert list(fitted.messages) == [*history[:2], summary, *history[-2:]]
    longer = [*fitted.messages, *loop(3)[2:]]
    again = fit(longer, policy, words, ask)
    assert asked[1][2] == summary
    assert [m["content"] for m in again.messages if m.get("name") == SUMMARY] == [
        "summary 2, at most 7"
    ]


def test_the_question_for_a_summary_keeps_the_budget_too() -> None:
    asked: list[list[Message]] = []

    def ask(question: list[Message], most: int) -> str:
        asked.append(question)
        return "short"

    fit(loop(30), Policy(60, 0.5, (Summarise(), Truncate())), words, ask)
    assert words(asked[0]) <= 60
    assert asked[0][:2] == loop(0)


def test_what_must_stay_may_be_too_much() -> None:
    history = [message("system", 50), message("user", 50)]
    assert not fit(history, Policy(60), words, no_ask).fits
    with pytest.raises(ValueError, match="budget 0"):
        Policy(0)


ROLES = st.sampled_from(["user", "assistant", "tool", "system"])
HISTORIES = st.lists(st.tuples(ROLES, st.integers(1, 12)), max_size=14).map(
    lambda rows: [
        message("system", 2, "system-prompt"),
        message("user", 2, "task"),
        *(message(role, n, f"{role[0]}{i}") for i, (role, n) in enumerate(rows)),
    ]
)
ACTIONS = st.lists(
    st.one_of(
        st.builds(Drop, st.integers(0, 2), st.just("-"), st.sampled_from([("tool",), ("user",)])),
        st.builds(Truncate, st.integers(0, 2)),
        st.builds(Summarise, st.integers(0, 2), st.integers(1, 9)),
    ),
    max_size=3,
)


@given(HISTORIES, ACTIONS, st.integers(1, 120), st.floats(0, 1))
def test_no_policy_loses_the_system_prompt_or_the_last_user_turn(
    history: list[Message], actions: list[Action], budget: int, target: float
) -> None:
    question: list[Message] = []

    def ask(messages: list[Message], most: int) -> str:
        question[:] = messages
        return "s " * most

    fitted = fit(history, Policy(budget, target, tuple(actions)), words, ask)
    kept = list(fitted.messages)
    users = [m for m in history if m["role"] == "user"]
    for needed in (history[0], history[1], users[-1]):
        assert needed in kept
    assert [m for m in kept if m["role"] == "system"] == [
        m for m in history if m["role"] == "system"
    ]
    assert fitted.fits == (words(kept) <= budget)
    assert fitted.tokens == words(kept)
    if question:
        assert words(question) <= budget
        assert question[0] == history[0]
    originals = [m for m in kept if m.get("name") != SUMMARY and m["content"] != "-"]
    positions = [history.index(m) for m in originals]
    assert positions == sorted(positions)  # nothing is invented or moved


@given(HISTORIES, st.integers(1, 120), st.floats(0, 1))
def test_truncation_holds_the_budget_wherever_it_can_be_held(
    history: list[Message], budget: int, target: float
) -> None:
    fitted = fit(history, Policy(budget, target, (Drop(), Truncate(keep=1))), words, no_ask)
    least = words([history[i] for i in protected(history)])
    assert fitted.fits == (least <= budget)


@given(HISTORIES, st.integers(1, 120))
def test_a_tool_result_never_stands_without_its_call(history: list[Message], budget: int) -> None:
    fitted = fit(history, Policy(budget, 0.5, (Truncate(),)), words, no_ask)
    kept = list(fitted.messages)
    for i, m in enumerate(history):
        if m["role"] == "tool" and m in kept:
            owner = max((j for j in range(i) if history[j]["role"] == "assistant"), default=None)
            assert owner is None or history[owner] in kept


# ------------------------------------------------------------------ the client


class Echo:
    """A chat client that records each call as the gateway would."""

    def __init__(self) -> None:
        self.calls: list[CallRecord] = []
        self.shown: list[list[Message]] = []

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
    ) -> ChatReply:
        self.shown.append([dict(m) for m in messages])
        text = "the summary" if messages[-1]["content"] == INSTRUCTION else f"x = {len(self.calls)}"
        prompt = tuple(render_ids(messages, tools, TOKENIZER))
        reply = tuple(TOKENIZER.encode(text))
        self.calls.append(
            CallRecord(
                "e", 0, len(self.calls), prompt, reply, (-1.0,) * len(reply), (), "stop", 0, 0
            )
        )
        return ChatReply(text, prompt, reply)


def play(client: ContextClient, turns: int) -> None:
    """A loop that keeps its whole history, as `MleEnv` does."""
    history: list[Message] = [
        {"role": "system", "content": "Write a script ."},
        {"role": "user", "content": "task regression metric rmse"},
    ]
    for turn in range(turns):
        reply = client.chat(history, seed=turn)
        history.append({"role": "assistant", "content": reply.text})
        history.append({"role": "user", "content": f"score 0.{turn} " + "percentile 37 " * 12})


def test_an_edit_starts_a_branch_and_the_calls_between_edits_share_one() -> None:
    echo = Echo()
    policy = Policy(160, 0.6, (Drop(0, "-", ("user",)), Truncate()))
    client = ContextClient(echo, policy, TemplateCounter(TOKENIZER))
    play(client, 9)
    assert client.edits, "the policy never acted"
    edited = {edit.call for edit in client.edits}
    for i, (before, call) in enumerate(zip(echo.calls, echo.calls[1:], strict=False), 1):
        assert len(call.prompt_ids) <= 160
        extends = call.prompt_ids[: len(before.prompt_ids) - 3] == before.prompt_ids[:-3]
        assert extends == (i not in edited)
    assert len(edited) < len(echo.calls) - 1  # hysteresis: not every call is an edit
    assert all(edit.after <= 0.6 * 160 < 160 < edit.before for edit in client.edits)
    (pack,) = build_packs(echo.calls, 4096)
    alone = sum(len(call.prompt_ids) + len(call.response_ids) for call in echo.calls)
    assert pack.tokens < 0.7 * alone  # calls between two edits share their prefix
    assert len(set(pack.call_n.tolist())) == len(echo.calls)  # and each one is trained


def test_a_summary_is_a_call_of_the_same_client_with_a_seed_of_its_own() -> None:
    echo = Echo()
    client = ContextClient(
        echo,
        Policy(150, 0.6, (Summarise(max_tokens=20), Truncate())),
        TemplateCounter(TOKENIZER),
    )
    play(client, 6)
    summaries = [i for i, shown in enumerate(echo.shown) if shown[-1]["content"] == INSTRUCTION]
    assert len(summaries) == len(client.edits) > 0
    following = echo.shown[summaries[0] + 1]
    assert following[2] == {"role": "user", "name": SUMMARY, "content": "the summary"}
    assert all(len(call.prompt_ids) <= 150 for call in echo.calls)


def test_a_history_that_does_not_continue_the_last_one_starts_anew() -> None:
    echo = Echo()
    client = ContextClient(echo, Policy(4000), TemplateCounter(TOKENIZER))
    first: list[Message] = [{"role": "user", "content": "one"}]
    client.chat(first)
    client.chat([{"role": "user", "content": "another"}])
    assert echo.shown[1] == [{"role": "user", "content": "another"}]


def test_a_context_that_cannot_fit_is_not_sent() -> None:
    echo = Echo()
    client = ContextClient(echo, Policy(20), TemplateCounter(TOKENIZER))
    with pytest.raises(ContextFullError, match="its budget is 20: raise the budget"):
        client.chat([{"role": "user", "content": "many words " * 40}])
    assert echo.calls == []

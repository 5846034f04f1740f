"""rl.gateway.history: which ids a conversation already has, against a naive concatenation."""

import copy
import json
import random
from typing import Any

import pytest
from gateway_fakes import CALLING, EOS, TOKENIZER, TOOLS, odd_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat_format import ChatFormatError, read_reply, render_ids, render_next_ids
from rl.gateway.core import as_message
from rl.gateway.history import History, turn_of

Json = dict[str, Any]
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=12)
THOUGHTS = ["", "So.", "Let me think:\nfirst, then second."]


def said(thought: str, text: str, arguments: Json | None = None) -> str:
    """A reply as the model writes it."""
    call = ""
    if arguments is not None:
        lines = "".join(
            f'<parameter name="{key}">{json.dumps(v) if key == "options" else v}</parameter>\n'
            for key, v in arguments.items()
        )
        call = f'\n<minimax:tool_call>\n<invoke name="run">\n{lines}</invoke>\n</minimax:tool_call>'
    return f"{thought}\n</think>\n\n{text}{call}"


def reply_to(history: History, messages: list[Json], text: str, end: bool = True) -> Any:
    """One call: the prompt, the reply's ids, and the reply as a message."""
    prompt = history.prompt(messages, TOOLS)
    ids = [*odd_ids(text), *([EOS] if end else [])]
    reply, _, _ = read_reply(text, TOOLS, "stop", f"salt{random.random()}")
    message = as_message(reply)
    history.add(prompt, message, ids)
    return prompt, ids, message


def rewritten(message: Json, rng: random.Random) -> Json:
    """The message as a client may send it back: thinking stripped, inside the text, or shown; the
    JSON of calls in another form; text as parts, or with other white space at its ends."""
    sent: Json = {"role": "assistant", "content": message["content"]}
    style = rng.randrange(4)
    if style == 0:
        sent["content"] = f" {sent['content']}\n"
    if style == 1:
        sent["reasoning_content"] = message["reasoning_content"]
    if style == 2 and message["reasoning_content"]:
        sent["content"] = f"<think>\n{message['reasoning_content']}\n</think>\n\n{sent['content']}"
    if style == 3:
        sent["content"] = [{"type": "text", "text": sent["content"]}]
    calls = []
    for call in message.get("tool_calls", []):
        arguments = json.loads(call["function"]["arguments"])
        again = dict(rng.sample(sorted(arguments.items()), len(arguments)))
        text = json.dumps(again, indent=rng.choice((None, 2)), ensure_ascii=rng.random() < 0.5)
        text = text.replace("1.0", rng.choice(("1.0", "1", "1e0")))
        inner = {"name": call["function"]["name"], "arguments": rng.choice((text, again))}
        calls.append({"id": rng.choice((call["id"], "mine")), "function": inner})
    if calls:
        sent["tool_calls"] = calls
    elif not sent["content"] and rng.random() < 0.5:
        sent["content"] = None
    return sent


@given(
    st.lists(
        st.tuples(
            st.sampled_from(THOUGHTS),
            TEXTS,
            st.none() | st.fixed_dictionaries({"code": TEXTS, "options": st.just({"a": [1.0]})}),
            st.sampled_from(["tool", "user", "both"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_a_rewritten_conversation_goes_on_from_the_sampled_ids(turns: list[Any], seed: int) -> None:
    rng = random.Random(seed)
    history = History(TOKENIZER)
    messages: list[Json] = [{"role": "system", "content": "Be good."}]
    messages.append({"role": "user", "content": "Begin."})
    naive = render_ids(messages, TOOLS, TOKENIZER)
    for thought, text, arguments, then, end in turns:
        prompt, ids, message = reply_to(history, messages, said(thought, text, arguments), end)
        assert prompt.ids.tolist() == naive
        assert prompt.kind == ("first" if len(messages) == 2 else "stored")
        new = [{"role": "tool", "content": "0.5"}] if then != "user" else []
        new += [{"role": "user", "content": "On."}] if then != "tool" else []
        messages = [*messages, rewritten(message, rng), *new]
        # naive: what was sent, what was sampled, an end mark if it was cut off, what is new
        naive = [*naive, *ids, *([] if end else [EOS]), *render_next_ids(new, TOKENIZER, {})]


@given(st.lists(st.tuples(st.sampled_from(THOUGHTS), TEXTS, TEXTS), min_size=1, max_size=4))
@settings(max_examples=40)
def test_what_follows_an_end_mark_is_the_rest_of_the_whole(turns: list[Any]) -> None:
    messages: list[Json] = [{"role": "user", "content": "Begin."}]
    for thought, text, result in turns:
        reply = {"role": "assistant", "content": text, "reasoning_content": thought}
        before = render_ids([*messages, reply], None, TOKENIZER, add_generation_prompt=False)
        new = [{"role": "tool", "content": result}]
        whole = render_ids([*messages, reply, *new], None, TOKENIZER)
        ends = len(before) - before[::-1].index(EOS)
        assert before[:ends] + render_next_ids(new, TOKENIZER, {}) == whole
        messages += [reply, *new]


EDITS = {
    "system": lambda m: m[0].update(content="Be bad."),
    "user": lambda m: m[1].update(content="Begin! "),
    "text": lambda m: m[2].update(content="Ran:"),
    "name": lambda m: m[2]["tool_calls"][0]["function"].update(name="walk"),
    "value": lambda m: m[2]["tool_calls"][0]["function"].update(
        arguments='{"code": "print(1)", "options": {"b": 2, "a": [1, 2]}}'
    ),
    "thinking": lambda m: m[2].update(reasoning_content="I must not."),
    "fewer calls": lambda m: m[2].pop("tool_calls"),
    "tool": lambda m: m[3].update(content="2"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_conversation_does_not_take_over_what_was_edited(edit: str) -> None:
    history = History(TOKENIZER)
    messages: list[Json] = [{"role": "system", "content": "Be good."}]
    messages.append({"role": "user", "content": "Begin."})
    first, ids, message = reply_to(history, messages, CALLING)
    messages += [message, {"role": "tool", "content": "1"}]
    _, more, message = reply_to(history, messages, said("Good.", "It is 1."))
    messages += [message, {"role": "user", "content": "On."}]
    assert history.prompt(messages, TOOLS).kind == "stored"
    EDITS[edit](messages)
    tools = copy.deepcopy(TOOLS)
    tools[0]["function"]["name"] = "walk" if edit == "name" else "run"
    prompt = history.prompt(messages, tools)
    if edit == "tool":  # the first reply is as it was; the second follows other words
        assert prompt.ids[: len(first.ids) + len(ids)].tolist() == [*first.ids, *ids]
    if edit in ("system", "user", "tool"):
        # no reply was edited, so the ids of all stay; only their surroundings are rendered
        assert prompt.kind == "spliced"
        text = prompt.ids.tobytes()
        assert _bytes(more) in text and _bytes(ids) in text
    else:
        assert prompt.kind == "fresh"
        assert _bytes(ids) not in prompt.ids.tobytes() and _bytes(more) in prompt.ids.tobytes()


def _bytes(ids: list[int]) -> bytes:
    return b"".join(id.to_bytes(4, "little") for id in ids)


def test_replies_that_look_alike_are_told_apart_by_call_ids_then_thinking_then_time() -> None:
    history = History(TOKENIZER)
    ask: list[Json] = [{"role": "user", "content": "Begin."}]
    drawn = [reply_to(history, ask, CALLING.replace("must", word)) for word in ("could", "shall")]
    for _, ids, message in drawn:
        bare = {key: message[key] for key in ("role", "content", "tool_calls")}
        prompt = history.prompt([*ask, bare, {"role": "tool", "content": "1"}], TOOLS)
        assert prompt.kind == "stored" and _bytes(ids) in prompt.ids.tobytes()
        no_ids = copy.deepcopy(bare) | {"reasoning_content": message["reasoning_content"]}
        no_ids["tool_calls"][0]["id"] = ""
        prompt = history.prompt([*ask, no_ids, {"role": "tool", "content": "1"}], TOOLS)
        assert prompt.kind == "stored" and _bytes(ids) in prompt.ids.tobytes()
    del no_ids["reasoning_content"]
    prompt = history.prompt([*ask, no_ids, {"role": "tool", "content": "1"}], TOOLS)
    assert _bytes(drawn[1][1]) in prompt.ids.tobytes()


def test_a_truncated_conversation_keeps_the_sampled_ids_of_its_turns() -> None:
    history = History(TOKENIZER)
    messages: list[Json] = [{"role": "user", "content": "Begin."}]
    replies = []
    for turn in range(4):
        _, ids, message = reply_to(history, messages, said("Hm.", f"Step {turn}."))
        replies.append(ids)
        messages = [*messages, message, {"role": "user", "content": f"Go on {turn}."}]
    prompt = history.prompt([messages[0], *messages[5:]], TOOLS)
    assert prompt.kind == "spliced"
    assert all(
        (_bytes(ids) in prompt.ids.tobytes()) == (turn > 1) for turn, ids in enumerate(replies)
    )


def test_the_template_rule_drops_thinking_at_a_new_user_turn() -> None:
    history = History(TOKENIZER, keep="template")
    messages: list[Json] = [{"role": "user", "content": "Begin."}]
    first, ids, message = reply_to(history, messages, CALLING)
    messages += [message, {"role": "tool", "content": "1"}]
    second, _, message = reply_to(history, messages, said("Good.", "It is 1."))
    assert second.kind == "stored"
    assert second.ids[: len(first.ids) + len(ids)].tolist() == [*first.ids, *ids]
    messages += [message, {"role": "user", "content": "On."}]
    prompt = history.prompt(messages, TOOLS)
    assert prompt.kind == "fresh" and prompt.ids.tolist() == render_ids(messages, TOOLS, TOKENIZER)


def test_raw_text_goes_on_from_the_sampled_ids() -> None:
    history = History(TOKENIZER)
    prompt = history.text_prompt("Question: 1+1?\nThought:")
    ids = odd_ids(" easy\nObservation:")
    shown = "Question: 1+1?\nThought: easy"
    whole = shown + "\nObservation:"
    history.add_text(whole, shown, prompt.ids + type(prompt.ids)("i", ids))
    again = history.text_prompt(whole + " 2")
    assert again.kind == "stored"
    assert again.ids.tolist() == [*prompt.ids, *ids, *TOKENIZER.encode(" 2")]
    other = history.text_prompt(shown + " and so on")
    assert other.kind == "fresh"
    assert other.ids.tolist() == TOKENIZER.encode(shown + " and so on")
    assert history.text_prompt([5, 6, 7]).ids.tolist() == [5, 6, 7]


def test_memory_of_a_long_episode_grows_with_its_tokens() -> None:
    history = History(TOKENIZER)
    messages: list[Json] = [{"role": "user", "content": "Begin."}]
    total = 0
    for turn in range(40):
        prompt, ids, message = reply_to(history, messages, said("Hm.", f"Step {turn}."))
        total = len(prompt.ids) + len(ids)
        messages = [*messages, message, {"role": "tool", "content": "1"}]
    kept = sum(len(entry.added) for found in history._entries.values() for entry in found)
    assert kept == total


@pytest.mark.parametrize(
    "message",
    [
        {"role": "robot", "content": "x"},
        {"role": "user", "content": 5},
        {"role": "assistant", "tool_calls": 5},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
    ],
)
def test_a_message_that_is_none_is_refused(message: Json) -> None:
    with pytest.raises(ChatFormatError):
        turn_of(message)

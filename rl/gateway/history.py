"""Which ids a conversation already has: what was sampled is never encoded again.

Every reply of an episode is kept as the ids that the model wrote. A later request shows it as text,
often not quite the same: thinking stripped, the JSON of a call rewritten. What counts as the same:

- a **head**: equal system texts, and equal tools as JSON values;
- a **turn** of user or tool: equal text (the ids of calls are not part of a prompt);
- a **turn of the assistant**: equal text behind its thinking, up to white space at its two ends;
  and equal calls: names, and arguments as JSON values. Thinking that is absent is the same;
  thinking that is shown must be equal, up to white space at its ends.

The longest beginning of a request that ends with a reply of ours and is the same, turn by turn, is
taken over: the ids of that call's prompt and response. Only what follows is rendered. Of several
that are the same (equal text, other thinking) the one with equal call ids is taken, else the last.
In what follows, and where nothing can be taken over, an assistant turn that is the same as a reply
of ours is said with its sampled ids too (`spliced`); any other is encoded from text (`fresh`).

`keep="template"` follows the chat template's rule instead: it drops the thinking of turns before
the last user message, so nothing is taken over across a new user message; what stood before it is
encoded anew, and counted as `fresh`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import orjson

from model.chat_format import (
    ChatFormatError,
    Message,
    render_around_ids,
    render_next_ids,
    role_of,
    text_of,
)
from model.tokenizer import THINK, THINK_END, Tokenizer

Keep = Literal["stored", "template"]
Kind = Literal["first", "stored", "spliced", "fresh"]
"""How a prompt was made: no assistant turn in it; all of them taken over with their beginning; all
with sampled ids, some outside a taken-over beginning; at least one encoded from text."""


@dataclass(frozen=True)
class Turn:
    """A message as it is compared. `thinking` and `marks` (ids of calls) may be left out by a
    client; `said` is what must be equal."""

    role: str
    said: bytes
    thinking: str = ""
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A reply's ids, end mark included, and what it was as a turn."""

    ids: array[int]
    turn: Turn


@dataclass(frozen=True)
class Entry:
    """A conversation up to a reply: what this call added to its parent's ids. `said` are all its
    assistant turns."""

    parent: Entry | None
    added: array[int]
    said: tuple[Turn, ...]

    def ids(self) -> array[int]:
        pieces: list[array[int]] = []
        at: Entry | None = self
        while at is not None:
            pieces.append(at.added)
            at = at.parent
        whole = array("i")
        for piece in reversed(pieces):
            whole += piece
        return whole


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids and how they were made; the rest lets `History.add` go on from it."""

    ids: array[int]
    kind: Kind
    parent: Entry | None = None
    suffix: array[int] = field(default_factory=lambda: array("i"))
    key: bytes = b""
    said: tuple[Turn, ...] = ()


class History:
    """The replies of one episode. Memory grows with the tokens of the episode, not their square."""

    def __init__(self, tokenizer: Tokenizer, keep: Keep = "stored") -> None:
        self._tokenizer = tokenizer
        self._keep = keep
        self._entries: dict[bytes, list[Entry]] = {}
        self._replies: dict[bytes, list[Reply]] = {}
        self._texts: list[tuple[str, array[int] | None]] = []

    # ---------------------------------------------------------- chats

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> Prompt:
        """The ids of a request. Raises ChatFormatError."""
        shown = [m for i, m in enumerate(messages) if role_of(m, i) != "system"]
        turns = [turn_of(message) for message in shown]
        keys = _chain(_head_key(messages, tools), turns)
        entry, at = self._longest(turns, keys)
        after = self._after(turns, at)
        sampled = {index: reply.ids for index, reply in after.items() if reply is not None}
        kind: Kind = "fresh" if len(sampled) < len(after) else "spliced" if sampled else "stored"
        if entry is None and not after:
            kind = "first"
        said = () if entry is None else entry.said
        said += tuple(turns[at + i] if reply is None else reply.turn for i, reply in after.items())
        if entry is None:
            rest = self._fresh(messages, tools, sampled)
            ids = rest
        else:
            rest = array("i", render_next_ids(shown[at:], self._tokenizer, sampled))
            ids = entry.ids() + rest
        return Prompt(ids, kind, entry, rest, keys[-1], said)

    def add(self, prompt: Prompt, message: Message, ids: Sequence[int]) -> None:
        """Remember what was answered: the reply as a message, and as the sampled ids.

        A reply without its end mark (cut off by length or a stop text) gets one as context.
        """
        turn = turn_of(message)
        response = array("i", ids)
        if not response or response[-1] != self._tokenizer.eos_id:
            response.append(self._tokenizer.eos_id)
        entry = Entry(prompt.parent, prompt.suffix + response, (*prompt.said, turn))
        self._entries.setdefault(_next(prompt.key, turn), []).append(entry)
        self._replies.setdefault(turn.said, []).append(Reply(response, turn))

    def _longest(self, turns: Sequence[Turn], keys: Sequence[bytes]) -> tuple[Entry | None, int]:
        """The conversation to go on from, and how many turns it covers."""
        for at in range(len(turns), 0, -1):
            turn = turns[at - 1]
            if turn.role == "assistant":
                found = self._entries.get(keys[at])
                if found:
                    said = [turn for turn in turns[:at] if turn.role == "assistant"]
                    entry = _best(found, said)
                    if entry is not None:
                        return entry, at
            elif turn.role == "user" and self._keep == "template":
                break
        return None, 0

    def _after(self, turns: Sequence[Turn], at: int) -> dict[int, Reply | None]:
        """For the assistant turns from `at` on, by their place after it, the reply whose ids say
        it; None where there is none, or where its thinking may not be shown."""
        first = at
        if self._keep == "template":
            users = [index for index, turn in enumerate(turns) if turn.role == "user"]
            first = max(at, users[-1] if users else 0)
        found: dict[int, Reply | None] = {}
        for index in range(at, len(turns)):
            turn = turns[index]
            if turn.role != "assistant":
                continue
            fits = [r for r in self._replies.get(turn.said, ()) if _same(r.turn, turn)]
            marked = [reply for reply in fits if reply.turn.marks == turn.marks]
            found[index - at] = (marked or fits)[-1] if fits and index >= first else None
        return found

    def _fresh(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        sampled: Mapping[int, Sequence[int]],
    ) -> array[int]:
        places = [i for i, m in enumerate(messages) if role_of(m, i) != "system"]
        by_message = {places[index]: ids for index, ids in sampled.items()}
        return array("i", render_around_ids(messages, tools, self._tokenizer, by_message))

    # ---------------------------------------------------------- raw text

    def text_prompt(self, text: str | Sequence[int]) -> Prompt:
        """Ids of a raw prompt. The longest earlier prompt with its reply that `text` begins with
        is taken over; ids are taken as they are."""
        if not isinstance(text, str):
            return Prompt(array("i", text), "first")
        best = max(
            (found for found in self._texts if text.startswith(found[0])),
            key=lambda found: len(found[0]),
            default=("", None),
        )
        if best[1] is None:
            kind: Kind = "fresh" if best[0] else "first"
            return Prompt(array("i", self._tokenizer.encode(text)), kind)
        rest = self._tokenizer.encode(text[len(best[0]) :])
        return Prompt(best[1] + array("i", rest), "stored")

    def add_text(self, whole: str, shown: str, ids: array[int]) -> None:
        """Remember a raw prompt with its reply, without an end mark: as text with the stop text
        (`whole`), as the client saw it, and as ids."""
        if shown != whole:
            self._texts.append((shown, None))
        self._texts.append((whole, ids))


def turn_of(message: Message) -> Turn:
    """A message as it is compared. Raises ChatFormatError."""
    role = role_of(message, 0)
    text = text_of(message)
    if role != "ai":
        return Turn(role, f"{role}\0{text}".encode(errors="surrogatepass"))
    thought, mark, shown = text.rpartition(THINK_END)
    thinking = message.get("reasoning_content")
    if not isinstance(thinking, str) or not thinking:
        thinking = thought.removeprefix(THINK) if mark else ""
    calls, marks = _calls(message)
    shown = shown.strip()
    # text is safe to look up; of two equal objects one may hold 1 where the other holds true
    as_text = all(isinstance(arguments, str) for _, arguments in calls)
    said = _said_of_text(shown, calls) if as_text else _said(shown, calls)
    return Turn("assistant", said, thinking.strip(), marks)


def _calls(message: Message) -> tuple[tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """Names with arguments, and the ids."""
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ChatFormatError("tool_calls must be a list of calls")
    found: list[tuple[str, Any]] = []
    marks: list[str] = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ChatFormatError('a tool call must be {"function": {"name": …, "arguments": …}}')
        found.append((inner["name"], inner.get("arguments") or {}))
        marks.append(str(call.get("id", "")))
    return tuple(found), tuple(marks)


def _said(shown: str, calls: Sequence[tuple[str, Any]]) -> bytes:
    plain: list[list[Any]] = []
    for name, arguments in calls:
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = orjson.loads(arguments)
        plain.append([name, arguments])
    return _plain([shown, plain])


_said_of_text = lru_cache(1024)(_said)  # a conversation shows its turns again and again


def _plain(value: Any) -> bytes:
    """One text for all JSON texts of a value."""
    try:
        found = _dumps(value)
        return _dumps(_numbers(value)) if b".0" in found else found
    except (TypeError, RecursionError) as error:
        raise ChatFormatError(f"not JSON that can be compared: {error}") from error


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # a number above 64 bits, half a surrogate pair, deep nesting
        return json.dumps(value, sort_keys=True).encode()


def _numbers(value: Any) -> Any:
    """1.0 and 1 are one number in JSON."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _head_key(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> bytes:
    system = [text_of(m) for i, m in enumerate(messages) if role_of(m, i) == "system"]
    head = [system, list(tools or ())]
    return _hash(_plain(head))


def _chain(head: bytes, turns: Sequence[Turn]) -> list[bytes]:
    """`keys[n]` stands for the head and the first n turns."""
    keys = [head]
    for turn in turns:
        keys.append(_next(keys[-1], turn))
    return keys


def _next(key: bytes, turn: Turn) -> bytes:
    return _hash(key + turn.said)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _best(found: Sequence[Entry], said: Sequence[Turn]) -> Entry | None:
    """The last entry whose thinking is not contradicted, those with equal call ids first."""
    fits = [e for e in found if all(map(_same, e.said, said))]
    if len(fits) < 2:
        return fits[0] if fits else None
    marks = [turn.marks for turn in said]
    return max(
        enumerate(fits),
        key=lambda pair: (
            sum(a.marks == b for a, b in zip(pair[1].said, marks, strict=True)),
            pair[0],
        ),
    )[1]


def _same(ours: Turn, shown: Turn) -> bool:
    """Of two turns that say the same: whether the thinking that is shown is ours."""
    return not shown.thinking or shown.thinking == ours.thinking

"""A reply that is still being written: which of its text is final and may be sent.

All functions are of the text so far, so what was sent is always a beginning of what will be known.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.tokenizer import CALL, EOS, THINK, THINK_END, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from model.generate import Constraint

_HEAD = THINK + "\n"
_INVOKE = "<invoke"  # a call whose mark is missing; the repair may take it out of the text


class TextSoFar:
    """Token ids to text; a character that is not complete yet is not shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""

    def add(self, ids: Sequence[int]) -> None:
        """The next ids. The token that ends a turn is not text."""
        raw = b"".join(self._tokenizer.token_bytes(i) for i in ids if i != self._tokenizer.eos_id)
        self.text += self._decoder.decode(raw)


class StopText:
    """A constraint that allows every token and ends the reply once a stop text appears in it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [text.encode() for text in stops]
        self._keep = max(len(text) for text in self._stops)
        self._tail = b""
        self._done = False

    def mask(self) -> None:
        return None

    def accept(self, token_id: int) -> None:
        tail = self._tail + self._tokenizer.token_bytes(token_id)
        self._done = self._done or any(stop in tail for stop in self._stops)
        self._tail = tail[-self._keep :]

    def done(self) -> bool:
        return self._done


class Both:
    """Limits tokens as `grammar` does, and ends with either."""

    def __init__(self, grammar: Constraint, stop: StopText) -> None:
        self._grammar, self._stop = grammar, stop

    def mask(self) -> Tensor | None:
        return self._grammar.mask()

    def accept(self, token_id: int) -> None:
        self._grammar.accept(token_id)
        self._stop.accept(token_id)

    def done(self) -> bool:
        return self._grammar.done() or self._stop.done()


def cut_at_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first stop text in it; None where there is none."""
    at = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    return None if at is None else text[:at]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """What of the text so far stays, whatever comes: no stop text, nor the beginning of one."""
    cut = cut_at_stop(text, stops)
    return _without_beginning(text, stops) if cut is None else cut


def chat_so_far(text: str, tools: bool) -> tuple[str, str]:
    """Thinking and visible text that `chat_format.parse` will return, as far as that is certain.

    With `tools`, nothing from the mark of a call on: a call is sent when it is whole.
    """
    text = _without_beginning(text.removesuffix(EOS), [EOS])
    if _HEAD.startswith(text):
        return "", ""
    thinking, mark, visible = text.removeprefix(_HEAD).partition(THINK_END)
    if not mark:
        thinking = _without_beginning(thinking.partition(CALL)[0], [THINK_END, CALL])
        return thinking.removesuffix("\n"), ""
    if "\n\n".startswith(visible):
        visible = ""
    visible = visible.removeprefix("\n\n")
    if tools:
        visible = _without_beginning(visible, [CALL, _INVOKE])
        for call in (CALL, _INVOKE):
            visible = visible.partition(call)[0]
        visible = visible.removesuffix("\n")
    return thinking.removesuffix("\n"), visible


def rest_of(whole: str, sent: str) -> str:
    """What is still to be sent of a text; nothing where the sent part was mended away."""
    return whole[len(sent) :] if whole.startswith(sent) else ""


def _without_beginning(text: str, marks: Sequence[str]) -> str:
    """The text without the longest tail that is the beginning of a mark."""
    longest = max((len(mark) for mark in marks), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return text[:-size]
    return text

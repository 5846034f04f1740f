"""`response_format`: a reply whose visible text is JSON of one schema, from the first token on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from model.grammar import MAX_REASONING, GrammarConstraint, GrammarError, GrammarFactory
from model.tokenizer import THINK_END, Tokenizer

ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
"""The schema of `json_object`."""

_THOUGHT: Final = r"[^<\x00-\x08\x0b-\x1f\x7f]"
# The spacing that `json.dumps` writes: a weak model cannot pad with blanks.
_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_reply(schema: Mapping[str, Any], tokenizer: Tokenizer, *, chat: bool) -> str:
    """The Lark grammar of a reply that is JSON of `schema` and nothing after it. In a `chat` reply
    up to `MAX_REASONING` characters of thinking and the mark that ends it come first."""
    value = f"%json {json.dumps({**schema, 'x-guidance': _STYLE})}"
    if not chat:
        return f"start: {value}\n"
    think_end = f"<[{tokenizer.token_id(THINK_END)}]>"
    return (
        f'start: REASONING? {think_end} "\\n\\n" value\n'
        f"REASONING: /{_THOUGHT}{{0,{MAX_REASONING - 1}}}\\n/\n"
        f"value: {value}\n"
    )


class ReplyGrammars(GrammarFactory):
    """All grammars that a server needs: tool calls, and JSON of a schema."""

    def json(self, schema: Mapping[str, Any], *, chat: bool) -> GrammarConstraint:
        """JSON of `schema` and nothing after it, behind a thought if `chat` (`json_reply`).
        Raises `GrammarError`."""
        try:
            matcher = self._compiled(json_reply(schema, self._tokenizer, chat=chat)).deep_copy()
        except GrammarError as error:
            reason = str(error).partition(": ")[2]
            raise GrammarError(f"the schema gives no grammar: {reason}") from error
        return GrammarConstraint(matcher, self._vocab_size, self._tokenizer.eos_id)

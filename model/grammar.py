"""Grammar-constrained tool calls: from the first token on, only a well-formed call can be written.

The grammar spells a whole reply: optional thinking, `</think>`, one block of tool calls in M2's XML
form with typed parameters, end of turn. It is built for `tool_choice` "required" and for a named
tool. With "auto" the model is free to answer in text, so nothing is constrained. What the grammar
guarantees is the form; of number ranges it keeps exactly integers of a span up to 1,000 and
numbers within 0 … 1, of the others only sign and digits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from model.errors import ModelError
from model.tokenizer import CALL, CALL_END, THINK_END, Tokenizer
from model.tool_schema import Schema, Tool, read_tools, resolve, types_of, write_value

MAX_REASONING: Final = 200
MAX_STRING: Final = 1000
MAX_CALLS: Final = 4
_SHORT_STRING: Final = 200
_EXACT_SPAN: Final = 1000

_DECIMAL: Final = r"(0|[1-9][0-9]{0,8})(\.[0-9]{1,8})?([eE][-+]?[0-9]{1,2})?"
_BELOW_ONE: Final = r"0(\.[0-9]{1,6})?|[1-9](\.[0-9]{1,3})?[eE]-0?[1-9]"
_LINE: Final = r"[^<\x00-\x1f\x7f]"
_LINES: Final = r"[^<\x00-\x08\x0b-\x1f\x7f]"


class GrammarError(ModelError):
    """A tool schema that cannot be turned into a grammar."""


class GrammarConstraint:
    """Implements the engine's `Constraint` for one reply. Not shared between requests."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_id: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._done = False
        self._bits = allocate_token_bitmask(1, vocab_size)

    def mask(self) -> Tensor:
        """Which ids may come next: bool, shape (vocab,), on the CPU."""
        fill_next_token_bitmask(self._matcher, self._bits)
        flags = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")
        return torch.from_numpy(flags[: self._vocab_size].astype(np.bool_))

    def accept(self, token_id: int) -> None:
        """Takes the sampled id; `GrammarError` if the mask did not allow it."""
        # The matcher stops where nothing can follow; the end-of-turn token still belongs there.
        ends = token_id == self._eos_id and self._matcher.is_stopped()
        if self._done or not (ends or self._matcher.consume_token(token_id)):
            raise GrammarError(
                f"token {token_id} breaks the grammar: {self._matcher.get_error() or 'not allowed'}"
            )
        self._done = token_id == self._eos_id

    def done(self) -> bool:
        """True once the end-of-turn token is taken."""
        return self._done


class GrammarFactory:
    """Compiles grammars for one tokenizer and keeps the latest of them.

    `vocab_size` is the width of the model's logits where it exceeds the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size or 0, tokenizer.vocab_size)
        self._ll_tokenizer = LLTokenizer(
            tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=tokenizer.eos_id
        )
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def tool_call(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str | None,
        *,
        parallel: bool = True,
        max_reasoning: int = MAX_REASONING,
    ) -> GrammarConstraint | None:
        """A constraint that makes the model call a tool, or None where it is free.

        `tool_choice`: None, "none" and "auto" leave it free; "required" allows every tool;
        any other text is the name of the one tool to call. `parallel` allows up to
        `MAX_CALLS` calls in the reply. Raises `GrammarError`.
        """
        if tool_choice in (None, "none", "auto"):
            return None
        text = reply_grammar(
            chosen_tools(tools, str(tool_choice)),
            self._tokenizer,
            max_calls=MAX_CALLS if parallel else 1,
            max_reasoning=max_reasoning,
        )
        return GrammarConstraint(
            self._compiled(text).deep_copy(), self._vocab_size, self._tokenizer.eos_id
        )

    def _compile(self, text: str) -> LLMatcher:
        matcher = LLMatcher(self._ll_tokenizer, LLMatcher.grammar_from_lark(text), log_level=0)
        if matcher.is_error():
            reason = str(matcher.get_error()).strip().splitlines()[0]
            raise GrammarError(f"a tool's schema gives no grammar: {reason}")
        return matcher


def chosen_tools(tools: Sequence[Mapping[str, Any]] | None, tool_choice: str) -> list[Tool]:
    """The tools that "required", or a name, allows. Raises `GrammarError`."""
    try:
        specs = read_tools(tools)
    except ValueError as error:
        raise GrammarError(str(error)) from error
    if not specs:
        raise GrammarError("tool_choice asks for a call but the request has no tools")
    if tool_choice == "required":
        return list(specs.values())
    if tool_choice not in specs:
        raise GrammarError(
            f"tool_choice names {tool_choice!r}, which is not among the tools: {', '.join(specs)}"
        )
    return [specs[tool_choice]]


def reply_grammar(
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    *,
    max_calls: int = MAX_CALLS,
    max_reasoning: int = MAX_REASONING,
) -> str:
    """The Lark grammar of a whole reply that calls one to `max_calls` of `tools`.

    Special tokens are written by id. The end-of-turn token follows where the grammar ends.
    """
    think_end, call, call_end = (
        f"<[{tokenizer.token_id(token)}]>" for token in (THINK_END, CALL, CALL_END)
    )
    thinking = "REASONING? " if max_reasoning > 1 else ""
    rules = [
        f'start: {thinking}{think_end} "\\n\\n" {call} "\\n" invoke{{1,{max_calls}}} {call_end}',
        "invoke: " + " | ".join(f"tool_{index}" for index in range(len(tools))),
    ]
    if thinking:
        rules.append(f"REASONING: /{_LINES}{{0,{max_reasoning - 1}}}\\n/")
    for index, tool in enumerate(tools):
        rules += _tool_rules(f"tool_{index}", tool)
    return "\n".join(rules) + "\n"


def _tool_rules(rule: str, tool: Tool) -> list[str]:
    """Parameters come in the schema's order; those that are not required may be left out."""
    parts = [_literal(f'<invoke name="{tool.name}">\n')]
    rules = []
    for index, (name, schema) in enumerate(tool.properties.items()):
        part = f"{rule}_p{index}"
        value, terminals = _value(part, schema, tool.parameters)
        opening, closing = _literal(f'<parameter name="{name}">'), _literal("</parameter>\n")
        rules += [f"{part}: {opening} {value} {closing}", *terminals]
        parts.append(part if name in tool.required else f"{part}?")
    return [f"{rule}: {' '.join(parts)} {_literal('</invoke>' + chr(10))}", *rules]


def _value(rule: str, schema: Schema, root: Schema) -> tuple[str, list[str]]:
    """The right-hand side of a value, and the terminals it needs."""
    if "const" in schema:
        return _literal(write_value(schema["const"])), []
    if "enum" in schema:
        return "(" + " | ".join(_literal(write_value(v)) for v in schema["enum"]) + ")", []
    kinds = types_of(schema, root)
    terminal = f"{rule.upper()}_TEXT"
    if "string" in kinds:
        pattern, optional = _text_pattern(_string_branch(schema, root))
        return terminal + ("?" if optional else ""), [f"{terminal}: {pattern}"]
    if set(kinds) & {"object", "array"}:
        return f"%json {_json_grammar(schema, root)}", []
    simple = {"boolean": "true|false", "null": "null"}
    simple["integer"] = _integer_pattern(schema)
    simple["number"] = _number_pattern(schema)
    body = "|".join(f"({simple[kind]})" for kind in kinds if kind in simple)
    if not body:
        raise GrammarError(f"unknown parameter type {kinds}")
    return terminal, [f"{terminal}: /{body}/"]


def _string_branch(schema: Schema, root: Schema) -> Schema:
    """The string alternative of a union, which holds the length limits."""
    for option in schema.get("anyOf") or schema.get("oneOf") or ():
        if "string" in types_of(option, root):
            return resolve(option, root)
    return schema


def _text_pattern(schema: Schema) -> tuple[str, bool]:
    """A Lark terminal for text without `<`, and whether the text may be empty."""
    low = int(schema.get("minLength", 0))
    high = max(int(schema.get("maxLength", MAX_STRING)), low, 1)
    char = _LINE if high <= _SHORT_STRING else _LINES
    text = f"/{char}{{{max(low, 1)},{high}}}/"
    pattern = schema.get("pattern")
    if not pattern:
        return text, low == 0
    if re.search(r"\(\?|\\[bB1-9]", pattern):
        raise GrammarError(f"pattern {pattern!r} uses look-around or back references")
    try:
        matches_nothing = re.search(pattern, "") is not None
    except re.error as error:
        raise GrammarError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    core = pattern.replace("/", r"\/")
    head = "" if core.startswith("^") else r"(?s:.*)"
    tail = "" if core.endswith("$") else r"(?s:.*)"
    core = core.removeprefix("^").removesuffix("$")
    return f"{text} & /{head}({core}){tail}/", low == 0 and matches_nothing


def _bounds(schema: Schema) -> tuple[float, float]:
    low = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf))
    high = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
    return float(low), float(high)


def _integer_pattern(schema: Schema) -> str:
    low, high = _bounds(schema)
    if high - low <= _EXACT_SPAN:
        first = math.floor(low) + 1 if low == schema.get("exclusiveMinimum") else math.ceil(low)
        last = math.ceil(high) - 1 if high == schema.get("exclusiveMaximum") else math.floor(high)
        if first > last:
            raise GrammarError(f"no integer lies between {low:g} and {high:g}")
        return "|".join(str(value) for value in range(first, last + 1))
    digits = 9 if math.isinf(high) else len(str(int(max(abs(high), abs(low), 1))))
    digits = 9 if math.isinf(low) and low < 0 and high < 0 else min(digits, 18)
    return f"{'' if low >= 0 else '-?'}(0|[1-9][0-9]{{0,{digits - 1}}})"


def _number_pattern(schema: Schema) -> str:
    low, high = _bounds(schema)
    if low >= 0 and high <= 1:
        return _BELOW_ONE + (r"|1(\.0)?" if high == 1 else "")
    return f"{'' if low >= 0 else '-?'}{_DECIMAL}"


def _json_grammar(schema: Schema, root: Schema) -> str:
    """JSON of one schema with the root's definitions, in the spacing that `json.dumps` writes."""
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps({**definitions, **schema, "x-guidance": style})


def _literal(text: str) -> str:
    """A Lark string; JSON's escapes are also Lark's."""
    return json.dumps(text, ensure_ascii=False)

"""Context management as an action of the environment: what the next call shows of the history.

The state of a white-box agent is the exact context of its next request (M2 report §6.2.3):
s' = f(append(s, a, o)). `fit` is that f. While a history is within `Policy.budget` tokens it is
returned as it is; above, the actions are taken in their order until it is within
`target` × `budget`:

    Drop       contents of old tool results become a stub
    Summarise  old exchanges become one summary, written by the model (a call like any other)
    Truncate   old exchanges are left out; `keep=0` is the rule of the report's §8.1 (all
               replies and tool results go when a share of the context is full)

An *exchange* is an assistant message with all that follows it up to the next one, so a tool call
never loses its result. What precedes the first exchange (system prompt, task) always stays, and
so do later system messages and the last user turn. An edit changes the prefix: the next call is a
branch of its own for training, and no special case (`rl.prefix_tree` merges equal prefixes only).

The gap between `target` and 1 is hysteresis: a history at its budget is edited once in a while and
not before every call, which would give each call a prefix that shares nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from rl.types import Message

Count = Callable[[Sequence[Message]], int]
"""Prompt tokens of a list of messages, as the engine will count them."""

Ask = Callable[[list[Message], int], str]
"""(messages, most tokens of the reply) → the model's text; for `Summarise`."""

SUMMARY = "context_summary"
"""`name` of the user message that holds a summary."""

INSTRUCTION = "Summarise the work so far: what was tried, what came out, what is left to do."


@dataclass(frozen=True)
class Drop:
    """Replace the contents of old results by `stub`, oldest first; the `keep` newest stay.

    roles   what a result is: "tool" messages, and "user" messages for agents that are told
            results as the user's
    """

    keep: int = 1
    stub: str = "(old result left out)"
    roles: tuple[str, ...] = ("tool",)


@dataclass(frozen=True)
class Summarise:
    """Replace all exchanges but the `keep` newest by a summary of at most `max_tokens` tokens."""

    keep: int = 1
    max_tokens: int = 128
    instruction: str = INSTRUCTION


@dataclass(frozen=True)
class Truncate:
    """Leave out the oldest exchanges, as few as are enough; the `keep` newest stay unless the
    budget itself cannot be held with them."""

    keep: int = 1


Action = Drop | Summarise | Truncate


@dataclass(frozen=True)
class Policy:
    """Edit a history of more than `budget` tokens down to `target` × `budget`, if that can be."""

    budget: int
    target: float = 0.5
    actions: tuple[Action, ...] = (Drop(), Truncate())

    def __post_init__(self) -> None:
        if self.budget < 1 or not 0.0 <= self.target <= 1.0:
            raise ValueError(
                f"context budget {self.budget}, target {self.target}: give at least 1 token and a "
                "share from 0 to 1"
            )


@dataclass(frozen=True)
class Fitted:
    """A history after `fit`: `actions` names what was done, `tokens` is its length now.

    `fits` is False where what must stay is alone above the budget: such a context is not sent.
    """

    messages: tuple[Message, ...]
    tokens: int
    fits: bool
    actions: tuple[str, ...] = ()


def fit(messages: Sequence[Message], policy: Policy, count: Count, ask: Ask) -> Fitted:
    """The history that the next call shows. `ask` is used by `Summarise` only."""
    now, tokens = tuple(messages), count(messages)
    if tokens <= policy.budget:
        return Fitted(now, tokens, True)
    goal = int(policy.budget * policy.target)
    done = []
    for action in policy.actions:
        edited = _apply(action, now, goal, policy.budget, count, ask)
        if edited != now:
            now, tokens = edited, count(edited)
            done.append(type(action).__name__.lower())
        if tokens <= goal:
            break
    return Fitted(now, tokens, tokens <= policy.budget, tuple(done))


def protected(messages: Sequence[Message]) -> list[int]:
    """Indices that no action touches: the head, later system messages, the last user turn."""
    head = _head(messages)
    last = _last_user(messages)
    return [i for i, m in enumerate(messages) if i < head or i == last or _system(m)]


# ------------------------------------------------------------------ the actions


def _apply(
    action: Action,
    messages: tuple[Message, ...],
    goal: int,
    budget: int,
    count: Count,
    ask: Ask,
) -> tuple[Message, ...]:
    if isinstance(action, Drop):
        return _drop(action, messages, goal, count)
    if isinstance(action, Truncate):
        return _truncate(messages, action.keep, goal, budget, count)
    return _summarise(action, messages, budget, count, ask)


def _drop(
    action: Drop, messages: tuple[Message, ...], goal: int, count: Count
) -> tuple[Message, ...]:
    last, head = _last_user(messages), _head(messages)
    results = [
        i for i, message in enumerate(messages) if i >= head and message.get("role") in action.roles
    ]
    old = [
        i
        for i in results[: max(0, len(results) - action.keep)]
        if i != last and len(str(messages[i].get("content") or "")) > len(action.stub)
    ]

    def without(n: int) -> tuple[Message, ...]:
        gone = frozenset(old[:n])
        return tuple(
            {**m, "content": action.stub} if i in gone else m for i, m in enumerate(messages)
        )

    return without(_least(len(old), lambda n: count(without(n)) <= goal))


def _truncate(
    messages: tuple[Message, ...], keep: int, goal: int, budget: int, count: Count
) -> tuple[Message, ...]:
    units = _units(messages)
    fixed = frozenset(protected(messages))
    summaries = [unit for unit in units if _is_summary(messages[unit[0]])]
    exchanges = [unit for unit in units if not _is_summary(messages[unit[0]])]
    old = exchanges[: max(0, len(exchanges) - keep)]

    def without(gone_units: list[list[int]]) -> tuple[Message, ...]:
        gone = frozenset(chain.from_iterable(gone_units)) - fixed
        return tuple(m for i, m in enumerate(messages) if i not in gone)

    old = old[: _least(len(old), lambda n: count(without(old[:n])) <= goal)]
    # A summary and what was to be kept go for the budget's sake alone, not for the target's.
    more = [*summaries, *exchanges[len(old) :]]
    needed = _least(len(more), lambda n: count(without([*old, *more[:n]])) <= budget)
    return without([*old, *more[:needed]])


def _summarise(
    action: Summarise, messages: tuple[Message, ...], budget: int, count: Count, ask: Ask
) -> tuple[Message, ...]:
    units = _units(messages)
    fixed = frozenset(protected(messages))
    gone = frozenset(chain.from_iterable(units[: max(0, len(units) - action.keep)])) - fixed
    if not any(messages[i].get("role") == "assistant" for i in gone):
        return messages  # nothing new to say about it
    head = _head(messages)
    order: Message = {"role": "user", "content": action.instruction}
    old = tuple(m for i, m in enumerate(messages) if i < head or i in gone)
    question = _truncate((*old, order), 0, budget, budget, count)
    if count(question) > budget:
        return messages
    text = ask([dict(m) for m in question], action.max_tokens).strip()
    summary: tuple[Message, ...] = ({"role": "user", "name": SUMMARY, "content": text},)
    rest = tuple(m for i, m in enumerate(messages) if i >= head and i not in gone)
    return messages[:head] + (summary if text else ()) + rest


# ------------------------------------------------------------------ the parts of a history


def _system(message: Message) -> bool:
    return message.get("role") in ("system", "developer")


def _is_summary(message: Message) -> bool:
    return message.get("role") == "user" and message.get("name") == SUMMARY


def _head(messages: Sequence[Message]) -> int:
    """How many messages precede the first exchange (or the summary of earlier ones)."""
    for i, message in enumerate(messages):
        if message.get("role") in ("assistant", "tool") or _is_summary(message):
            return i
    return len(messages)


def _last_user(messages: Sequence[Message]) -> int | None:
    """The last user turn; a summary of ours is none."""
    for i in range(len(messages) - 1, -1, -1):
        if messages[i].get("role") == "user" and not _is_summary(messages[i]):
            return i
    return None


def _units(messages: Sequence[Message]) -> list[list[int]]:
    """Indices after the head, by exchange; a summary is a unit of its own, the oldest."""
    units: list[list[int]] = []
    for i in range(_head(messages), len(messages)):
        starts = messages[i].get("role") == "assistant" or _is_summary(messages[i])
        if starts or not units or _is_summary(messages[units[-1][0]]):
            units.append([])
        units[-1].append(i)
    return units


def _least(most: int, enough: Callable[[int], bool]) -> int:
    """The smallest n ≤ `most` that is enough, where more is never worse; `most` if none is."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low

"""A chat client whose context is managed, for white-box agents that keep their whole history.

It stands between an environment and its client. The environment appends to its own list as if
nothing happened; what is sent is `f(append(state, new messages))` with `rl.agents.context.fit`,
and the edited history is the state that the next message is appended to. A summary is a call of
the same client, so the gateway records it like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from model.chat_format import render_ids
from model.tokenizer import Tokenizer
from rl.agents.context import Fitted, Policy, fit
from rl.engine import derive_seed
from rl.gateway.history import History, Keep
from rl.types import ChatClient, ChatReply, Message

Tools = Sequence[Mapping[str, Any]] | None


class ContextFullError(Exception):
    """What must stay in the context is above its budget: the episode cannot go on."""


@dataclass(frozen=True)
class Edit:
    """Before main call `call` (from 0) the history went from `before` to `after` tokens."""

    call: int
    actions: tuple[str, ...]
    before: int
    after: int


class Counter(Protocol):
    """Counts prompt tokens exactly as the endpoint makes them."""

    def count(self, messages: Sequence[Message], tools: Tools) -> int: ...

    def heard(self, messages: Sequence[Message], tools: Tools, reply: ChatReply) -> None: ...


class TemplateCounter:
    """For an endpoint that renders every prompt with the chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def count(self, messages: Sequence[Message], tools: Tools) -> int:
        return len(render_ids(messages, tools, self._tokenizer))

    def heard(self, messages: Sequence[Message], tools: Tools, reply: ChatReply) -> None:
        """Nothing: the template knows texts only."""


class GatewayCounter:
    """For the gateway, which says a reply again with its sampled ids, thinking included. It needs
    replies with ids."""

    def __init__(self, tokenizer: Tokenizer, keep: Keep = "stored") -> None:
        self._history = History(tokenizer, keep)

    def count(self, messages: Sequence[Message], tools: Tools) -> int:
        return len(self._history.prompt(messages, tools).ids)

    def heard(self, messages: Sequence[Message], tools: Tools, reply: ChatReply) -> None:
        """The gateway's history of this episode has grown by a reply."""
        message: Message = {"role": "assistant", "content": reply.text}
        if reply.tool_calls:
            message["tool_calls"] = list(reply.tool_calls)
        self._history.add(self._history.prompt(messages, tools), message, reply.response_ids)


class ContextClient:
    """Chat with managed context, for one episode; not for two threads at once.

    A history that does not begin with the earlier one (a sub-agent's, say) starts a state of its
    own.
    """

    def __init__(self, client: ChatClient, policy: Policy, counter: Counter) -> None:
        self._client = client
        self._policy = policy
        self._counter = counter
        self._seen: list[Message] = []
        self._state: list[Message] = []
        self._calls = 0
        self.edits: list[Edit] = []

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
    ) -> ChatReply:
        """One reply to the managed history. ContextFullError where it cannot be made to fit."""

        def count(shown: Sequence[Message]) -> int:
            return self._counter.count(shown, tools)

        def ask(question: list[Message], most: int) -> str:
            # Another seed than the call that follows, and the same in a repeated episode.
            own = None if seed is None else derive_seed(seed, "summary")
            reply = self._client.chat(
                question, tools=tools, temperature=temperature, max_tokens=most, seed=own
            )
            self._counter.heard(question, tools, reply)
            return reply.text

        state = self._append(messages)
        fitted = fit(state, self._policy, count, ask)
        self._note(fitted, state, count(state) if fitted.actions else fitted.tokens)
        if not fitted.fits:
            raise ContextFullError(
                f"the context holds {fitted.tokens} tokens after {', '.join(fitted.actions) or '—'}"
                f", its budget is {self._policy.budget}: raise the budget or shorten the task"
            )
        self._seen, self._state = list(messages), list(fitted.messages)
        self._calls += 1
        reply = self._client.chat(
            self._state, tools=tools, temperature=temperature, max_tokens=max_tokens, seed=seed
        )
        self._counter.heard(self._state, tools, reply)
        return reply

    def _append(self, messages: Sequence[Message]) -> list[Message]:
        known = len(self._seen)
        if list(messages[:known]) == self._seen:
            return [*self._state, *messages[known:]]
        return list(messages)

    def _note(self, fitted: Fitted, state: Sequence[Message], before: int) -> None:
        if fitted.actions:
            self.edits.append(Edit(self._calls, fitted.actions, before, fitted.tokens))

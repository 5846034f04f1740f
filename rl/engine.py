"""The two clients behind one protocol (`rl.types.ChatClient`): in process, and HTTP.

`Cohort` generates in lock-step: when every episode that is still alive waits for a reply, all
waiting requests go to the engine as one batch, in the order of the episodes. Batches are therefore
the same in every run with the same seeds, and so are the sampled ids.

torch is imported by the in-process client only: an agent behind any API is measured without it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from model.chat_format import ToolCallError, parse, render_ids
from model.tokenizer import Tokenizer
from rl.errors import ConfigError, InfraError
from rl.types import ChatReply, Message

if TYPE_CHECKING:
    from model.generate import Engine, Generation, GenRequest

HTTP_TIMEOUT_S = 120.0
WAIT_S = 600.0


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from (run seed, step, index, …): all randomness of a run comes from here."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


class EpisodeAbortedError(Exception):
    """Raised inside an episode's thread when the run is stopping."""


class LocalClient:
    """Chat through `submit`: renders the prompt to ids, never re-encodes a response.

    `context` is the model's number of positions. A prompt that leaves no room for one token gets an
    empty reply with finish reason `length`. `repetition`: as in `GenRequest`.
    """

    def __init__(
        self,
        submit: Callable[[GenRequest], Generation],
        tokenizer: Tokenizer,
        context: int,
        repetition: tuple[int, float] | None = None,
    ) -> None:
        self._repetition = repetition
        self._submit = submit
        self._tokenizer = tokenizer
        self._context = context

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
    ) -> ChatReply:
        """One reply, with exact ids and one log-prob an id at `temperature`."""
        from model.generate import GenRequest

        started = time.time()
        prompt_ids = tuple(render_ids(messages, tools, self._tokenizer))
        room = min(max_tokens, self._context - len(prompt_ids))
        if room < 1:
            return ChatReply("", prompt_ids, finish_reason="length", t_start=started, t_end=started)
        made = self._submit(
            GenRequest(
                prompt_ids=prompt_ids,
                max_new_tokens=room,
                temperature=temperature,
                seed=seed,
                stop_ids=frozenset({self._tokenizer.eos_id}),
                repetition=self._repetition,
            )
        )
        return ChatReply(
            text=reply_content(self._tokenizer.decode(made.ids), tools),
            prompt_ids=prompt_ids,
            response_ids=tuple(made.ids),
            logprobs=tuple(made.logprobs),
            finish_reason=made.finish_reason,
            constrained=made.constrained,
            t_start=started,
            t_end=time.time(),
            versions=((0, len(made.ids), made.version),),
            tokenizer_hash=self._tokenizer.hash,
        )


def reply_content(text: str, tools: Sequence[Mapping[str, Any]] | None) -> str:
    """What a chat API would return as content: the reply without thinking and end mark.

    A malformed tool call is left in the text as it stands: an environment judges content.
    """
    try:
        return parse(text, tools).content
    except ToolCallError:
        return text.partition("</think>")[2].removeprefix("\n\n")


class Cohort:
    """Episodes that generate together; `drive` runs in the caller's thread until all have left."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        members: int,
        check: Callable[[], None],
        repetition: tuple[int, float] | None = None,
    ) -> None:
        """check: called about ten times a second; may raise to stop the cohort."""
        self._repetition = repetition
        self._engine = engine
        self._tokenizer = tokenizer
        self._check = check
        self._changed = threading.Condition()
        self._alive = members
        self._waiting: dict[int, tuple[GenRequest, Future[Generation]]] = {}
        self._aborted = False
        self.generate_s = 0.0

    def client(self, order: int) -> LocalClient:
        """The client of member `order`; requests of one batch are sorted by it."""

        def submit(request: GenRequest) -> Generation:
            self._engine.check(request)
            future: Future[Generation] = Future()
            with self._changed:
                if self._aborted:
                    raise EpisodeAbortedError
                self._waiting[order] = (request, future)
                self._changed.notify_all()
            return future.result(timeout=WAIT_S)

        context = self._engine.model.config.max_position_embeddings
        return LocalClient(submit, self._tokenizer, context, self._repetition)

    def leave(self) -> None:
        """A member's episode has ended (also by an exception)."""
        with self._changed:
            self._alive -= 1
            self._changed.notify_all()

    def drive(self) -> None:
        """Generate whenever all live members wait; returns when none is alive."""
        try:
            while True:
                with self._changed:
                    while self._alive and len(self._waiting) < self._alive:
                        self._changed.wait(timeout=0.1)
                        self._check()
                    if not self._alive:
                        return
                    batch = [self._waiting[order] for order in sorted(self._waiting)]
                    self._waiting.clear()
                self._check()
                started = time.monotonic()
                try:
                    made = self._engine.generate([request for request, _ in batch])
                except BaseException:
                    for _, future in batch:
                        future.set_exception(EpisodeAbortedError())
                    raise
                self.generate_s += time.monotonic() - started
                for (_, future), generation in zip(batch, made, strict=True):
                    future.set_result(generation)
        finally:
            self._abort()

    def _abort(self) -> None:
        with self._changed:
            self._aborted = True
            for _, future in self._waiting.values():
                future.set_exception(EpisodeAbortedError())
            self._waiting.clear()


class OpenAIClient:
    """Any OpenAI-compatible endpoint. Replies carry no ids: for measuring, not for training."""

    def __init__(self, base_url: str, model: str, *, api_key: str = "none") -> None:
        import openai

        self._openai = openai
        self._model = model
        self._url = base_url
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key, timeout=HTTP_TIMEOUT_S, max_retries=2
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
    ) -> ChatReply:
        """One reply. InfraError when the endpoint is down, ConfigError when it refuses."""
        started = time.time()
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        if seed is not None:
            options["seed"] = seed
        try:
            answer = self._client.chat.completions.create(
                model=self._model,
                messages=list(messages),  # type: ignore[arg-type]
                temperature=temperature,
                max_tokens=max_tokens,
                **options,
            )
        except self._openai.APIStatusError as error:
            if error.status_code >= 500 or error.status_code == 429:
                raise InfraError(f"{self._url} answered {error.status_code}; try later") from error
            raise ConfigError(
                f"{self._url} refused the request ({error.status_code}): {error.message}"
            ) from error
        except self._openai.APIConnectionError as error:
            raise InfraError(f"{self._url} is not reachable; start the server") from error
        except (self._openai.APIError, ValueError) as error:
            raise InfraError(f"{self._url} gave an answer that is not a chat reply") from error
        choices = getattr(answer, "choices", None)
        if not choices:
            raise InfraError(f"{self._url} gave an answer without choices; check the endpoint")
        choice = choices[0]
        return ChatReply(
            text=choice.message.content or "",
            finish_reason=choice.finish_reason or "stop",
            t_start=started,
            t_end=time.time(),
            tool_calls=tuple(call.model_dump() for call in choice.message.tool_calls or ()),
        )

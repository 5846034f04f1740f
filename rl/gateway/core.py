"""The one path of a call, whatever API it came by: join or begin, render, draw, record, answer.

- **Repeats.** A call whose key (dialect, body) runs already joins it; one that has ended gets the
  stored answer. A record is made once.
- **Cancelled calls.** When the last listener leaves, the call goes on for `linger_s`, so that a
  client's retry finds it; then the engine's request is ended and nothing is recorded. A call that
  ends while nobody listens is recorded only if a listener comes back in that time.
- **Recorded before answered.** An answer is given after its record is committed. A record that
  could not be written is no call: 503.
- **Closed.** After `close` has returned, no record of the episode will appear.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import math
import os
import re
import time
from array import array
from collections import Counter
from dataclasses import replace

from model.chat_format import ChatFormatError, ParsedReply, read_reply
from model.errors import ModelError
from model.reply_stream import cut_at_stop
from model.tokenizer import Tokenizer
from rl.gateway.engine import Draw, Engine
from rl.gateway.episodes import Episode, Flight
from rl.gateway.history import History, Keep, Prompt
from rl.gateway.sampling import overridden
from rl.gateway.settings import EpisodeSampling, Limits, Repeat
from rl.gateway.types import Answer, Ask, Drawn, GatewayError, Json
from rl.gateway.writer import Writer
from rl.types import CallRecord

NONFINITE_ALARM = 1e-3
"""Share of log-probs that are no numbers, above which `/healthz` says so."""

KEPT_ANSWERS = 64
"""The last answers of an episode that a client's retry still finds."""

SWEEP_S = 10.0
"""Least time between two looks for episodes that nobody closed."""

_EPISODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
_GROUP = re.compile(r"g(\d+)-")
_log = logging.getLogger("rl.gateway")


class Gateway:
    """All episodes. Lives on one event loop; `writer` commits on its own thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: Engine,
        writer: Writer,
        *,
        sampling: EpisodeSampling = EpisodeSampling(),
        limits: Limits = Limits(),
        keep: Keep = "stored",
        repeat: Repeat = "join",
        auto_open: bool = False,
        linger_s: float = 2.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.engine = engine
        self.sampling, self.limits, self.repeat = sampling, limits, repeat
        self._writer = writer
        self._keep: Keep = keep
        self._auto_open = auto_open
        self._linger_s = linger_s
        self._name, self._names = os.urandom(8).hex(), itertools.count(2**32)
        self._swept = 0.0
        self._open: dict[str, Episode] = {}
        self._closed: dict[str, Json] = {}
        self._names_of: dict[str, str] = {}  # by secret
        self.counts: Counter[str] = Counter()

    # ---------------------------------------------------------- episodes

    def open(
        self,
        name: str,
        group: int,
        sampling: EpisodeSampling,
        limits: Limits,
        repeat: Repeat = "join",
        secret: str = "",
    ) -> Episode:
        """Let calls of an episode in. Opening it again in the same way changes nothing. Where it
        has a `secret`, only calls with that API key are its own."""
        if not _EPISODE.fullmatch(name):
            raise GatewayError(
                400, f"episode {name[:50]!r}: use letters, digits and . _ : -", "invalid_value"
            )
        if name in self._closed:
            raise GatewayError(409, f"episode {name} was closed; open the next attempt", "closed")
        known = self._open.get(name)
        if known is None:
            self._sweep()
            history = History(self.tokenizer, self._keep)
            known = self._open[name] = Episode(
                name, group, sampling, limits, repeat, history, secret
            )
            if secret:
                self._names_of[secret] = name
        elif (known.group, known.sampling, known.limits, known.secret) != (
            group,
            sampling,
            limits,
            secret,
        ):
            raise GatewayError(409, f"episode {name} is open with other settings", "open")
        return known

    def of_caller(self, name: str | None, key: str) -> Episode:
        """The episode of a path's name and an API key; without a name the key says it.
        GatewayError where there is none, or where the key is not its own."""
        if name is None and not key:
            raise GatewayError(
                401, "no episode: use /e/<episode>/v1 or the episode as API key", "no_episode"
            )
        found = self.episode(self._names_of.get(key, key) if name is None else name)
        found.check_secret(key)
        return found

    def episode(self, name: str) -> Episode:
        """An open episode. GatewayError 410 when it was closed, 404 when nobody opened it."""
        found = self._open.get(name)
        if found is not None:
            return found
        if name in self._closed:
            raise GatewayError(410, f"episode {name} is closed", "episode_closed")
        if self._auto_open:
            match = _GROUP.match(name)
            group = int(match[1]) if match else 0
            return self.open(name, group, self.sampling, self.limits, self.repeat)
        raise GatewayError(
            404, f"no episode {name[:50]!r}: open it with POST /control/open", "unknown_episode"
        )

    async def close(self, name: str) -> Json:
        """End an episode: calls that run are cancelled, those that are being written finish."""
        if name in self._closed:
            return self._closed[name]
        episode = self.episode(name)
        episode.closed = True
        over = GatewayError(410, f"episode {name} is closed", "episode_closed")
        running = list(episode.flights.values())
        for flight in running:
            flight.end(over)
        if running:
            await asyncio.wait([flight.task for flight in running])
        self._open.pop(name, None)
        self._writer.forget(name)
        return self._closed.setdefault(name, episode.summary())

    def _sweep(self) -> None:
        """Episodes whose deadline has passed take no calls: their memory goes, closed or not."""
        now = time.monotonic()
        if now < self._swept + SWEEP_S:
            return
        self._swept = now
        for episode in self._open.values():
            if now >= episode.deadline and not episode.flights:
                episode.history = History(self.tokenizer, self._keep)
                episode.answers.clear()
                episode.responses.clear()

    # ---------------------------------------------------------- one call

    async def answer(
        self, episode: Episode, digest: bytes, ask: Ask, *, retry: bool = False
    ) -> Answer:
        """The answer of a call, of the running one that it repeats, or of the one that has ended.

        Whoever stops waiting may end the call. Raises GatewayError.
        """
        key = episode.key(digest, retry)
        done = episode.answers.get(key)
        if done is not None:
            self._count(episode, "stored_answers")
            return done
        episode.check_open()
        flight = episode.flights.get(key)
        if flight is None:
            flight = self._begin(episode, key, ask)
        else:
            self._count(episode, "joined")
        return await self._listen(flight)

    def count_tokens(self, episode: Episode, ask: Ask) -> int:
        """The length of a request's prompt."""
        return len(self._prompt(episode, ask).ids)

    async def _listen(self, flight: Flight) -> Answer:
        flight.listeners += 1
        flight.heard.set()
        try:
            return await asyncio.shield(flight.result)
        finally:
            flight.listeners -= 1
            if not flight.listeners and not flight.result.done():
                flight.heard.clear()
                gone = GatewayError(499, "the client went away", "cancelled")
                asyncio.get_running_loop().call_later(self._linger_s, flight.end_unheard, gone)

    def _begin(self, episode: Episode, key: bytes, ask: Ask) -> Flight:
        episode.check_limits()
        for name in overridden(ask.wishes, episode.sampling):
            self._count(episode, f"overridden_{name}")
        sampling = episode.sampling
        seed = None if sampling.seed is None else sampling.seed + episode.begun
        episode.begun += 1
        flight = episode.flights[key] = Flight(asyncio.get_running_loop().create_future())
        flight.task = asyncio.create_task(self._make(episode, flight, ask, seed))
        flight.task.add_done_callback(lambda task: self._landed(episode, key, flight, task))
        return flight

    def _landed(
        self, episode: Episode, key: bytes, flight: Flight, task: asyncio.Task[Answer]
    ) -> None:
        """Settles the flight's result, however its task ended."""
        del episode.flights[key]
        if task.cancelled():
            self._count(episode, "cancelled")
            flight.fail(GatewayError(503, "the gateway ends", "shutting_down"))
            return
        error = task.exception()
        if error is None:
            episode.answers[key] = task.result()
            if len(episode.answers) > KEPT_ANSWERS:
                del episode.answers[next(iter(episode.answers))]
            flight.result.set_result(task.result())
            return
        if not isinstance(error, GatewayError):
            _log.error("a call of %s failed", episode.id, exc_info=error)
            error = GatewayError(500, f"{type(error).__name__}: {error}", "internal")
        self._count(episode, f"failed_{error.code}")
        flight.fail(error)

    async def _make(self, episode: Episode, flight: Flight, ask: Ask, seed: int | None) -> Answer:
        prompt = self._prompt(episode, ask)
        sampling = episode.sampling
        most = min(ask.max_tokens or sampling.max_tokens, sampling.max_tokens)
        most = min(most, episode.limits.tokens - episode.tokens, self._room(prompt))
        started = time.time()
        try:
            drawn = await self.engine.draw(
                prompt.ids,
                Draw(most, sampling.temperature, seed, ask.stops, sampling.repetition),
                episode.deadline,
            )
        except GatewayError as error:
            if error.status >= 500:
                episode.check_open()  # the deadline, rather than what came of it
            raise
        ended = time.time()
        answer = self._read(ask, prompt, drawn)
        await flight.heard.wait()
        flight.committing = True
        index = await self._writer.append(
            CallRecord(
                episode=episode.id,
                group=episode.group,
                index=0,
                prompt_ids=tuple(prompt.ids),
                response_ids=tuple(drawn.ids),
                logprobs=tuple(drawn.logprobs),
                versions=drawn.versions,
                finish_reason=drawn.finish,
                t_start=started,
                t_end=ended,
                temperature=sampling.temperature,
                constrained=drawn.constrained,
                tokenizer_hash=self.tokenizer.hash,
                routed_experts=drawn.routed,
            )
        )
        self._recorded(episode, ask, prompt, answer)
        return replace(answer, index=index)

    def _prompt(self, episode: Episode, ask: Ask) -> Prompt:
        try:
            if ask.text is not None:
                prompt = episode.history.text_prompt(ask.text)
            else:
                prompt = episode.history.prompt(ask.messages, ask.tools)
        except (ModelError, RecursionError, OverflowError) as error:
            where = "messages" if ask.text is None else "prompt"
            raise GatewayError(400, f"{where}: {error}", "invalid_value", where) from error
        if not prompt.ids:
            raise GatewayError(400, "prompt: it is empty", "invalid_value", "prompt")
        return prompt

    def _room(self, prompt: Prompt) -> int:
        context = self.engine.card.get("max_model_len")
        if not isinstance(context, int):
            return 2**31
        if len(prompt.ids) >= context:
            raise GatewayError(
                400,
                f"the prompt has {len(prompt.ids)} tokens but the context is {context}",
                "context_length_exceeded",
                "messages",
            )
        return context - len(prompt.ids)

    def _read(self, ask: Ask, prompt: Prompt, drawn: Drawn) -> Answer:
        """Ids to text and calls."""
        whole = self.tokenizer.decode(self._without_end(drawn.ids))
        cut = cut_at_stop(whole, ask.stops)
        text = whole if cut is None else cut
        name, reply = f"{self._name}{next(self._names):x}", ParsedReply(text, "", [])
        fault, repaired, by = None, False, ""
        if cut is not None:
            by = next(stop for stop in ask.stops if whole.startswith(stop, len(cut)))
        if ask.text is None:
            tools = None if ask.tools is None else list(ask.tools)
            try:
                reply, fault, repaired = read_reply(text, tools, drawn.finish, name)
            except RecursionError:
                reply, _, _ = read_reply(text, None, drawn.finish, name)
                fault = "bad tool call: its arguments are nested too deeply"
        now = int(time.time())
        return Answer(name, now, -1, prompt.ids, drawn, text, reply, fault, repaired, by)

    def _recorded(self, episode: Episode, ask: Ask, prompt: Prompt, answer: Answer) -> None:
        """The episode's history learns what was said; the call is counted."""
        drawn = answer.drawn
        if isinstance(ask.text, str):
            ids = prompt.ids + array("i", self._without_end(drawn.ids))
            whole = self.tokenizer.decode(self._without_end(drawn.ids))
            episode.history.add_text(ask.text + whole, ask.text + answer.text, ids)
        elif ask.text is None:
            with contextlib.suppress(ChatFormatError):  # cannot be compared: not to be found again
                episode.history.add(prompt, as_message(answer.reply), drawn.ids)
        episode.recorded += 1
        episode.tokens += len(drawn.ids)
        self._count(episode, "calls")
        self._count(episode, f"prompt_{prompt.kind}")
        self.counts["tokens"] += len(drawn.ids)
        if not math.isfinite(sum(drawn.logprobs)):
            bad = sum(not math.isfinite(value) for value in drawn.logprobs)
            self.counts["nonfinite_logprobs"] += bad
            episode.counts["nonfinite_logprobs"] += bad
            _log.warning("%s: %d log-probs are no numbers", episode.id, bad)

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_id else ids

    # ---------------------------------------------------------- counting

    def _count(self, episode: Episode, what: str) -> None:
        self.counts[what] += 1
        episode.counts[what] += 1

    def health(self) -> Json:
        """Counts, and what somebody should look at."""
        counts = {**self.counts, **self.engine.counts}
        alarms = []
        if counts.get("nonfinite_logprobs", 0) > NONFINITE_ALARM * counts.get("tokens", 0):
            alarms.append("nonfinite_logprobs")
        return {
            "status": "ok",
            "episodes": len(self._open),
            "running": sum(len(episode.flights) for episode in self._open.values()),
            "counts": counts,
            "alarms": alarms,
        }


def digest_of(kind: str, body: bytes, key: str = "") -> bytes:
    """What makes two requests of an episode one: the route, the body byte for byte, and the
    client's Idempotency-Key if it sends one."""
    head = f"{kind}\0{key}\0".encode(errors="surrogateescape")
    return hashlib.blake2b(head + body, digest_size=16).digest()


def as_message(reply: ParsedReply) -> Json:
    """A reply as the message that a client would send back."""
    message: Json = {"role": "assistant", "content": reply.content}
    message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = tool_calls(reply)
    return message


def tool_calls(reply: ParsedReply) -> list[Json]:
    """The calls of a reply in OpenAI's form."""
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments_json},
        }
        for call in reply.tool_calls
    ]

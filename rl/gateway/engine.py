"""The engine behind the gateway: ids in; ids, log-probs and versions out.

Our own server or vLLM, each started by `model.serve --control`. A request is tried again, with
back-off, while the engine is down or full. One that a pause has cut off goes on where it ended: its
tokens stay, under the version that drew them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from rl.errors import ConfigError, InfraError
from rl.gateway.http_client import ConnectionLostError, HttpClient, Response
from rl.gateway.types import Drawn, GatewayError

REPLY_S = 3600.0
ENDS = ("stop", "length", "repetition")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0


@dataclass(frozen=True)
class Draw:
    """What to sample after a prompt."""

    max_tokens: int
    temperature: float
    seed: int | None
    stops: tuple[str, ...] = ()
    repetition: tuple[int, float] | None = None


class Engine:
    """An engine at `url` (without /v1). `patience_s`: how long a request tries to reach it."""

    def __init__(self, url: str, *, tokenizer_hash: str, eos_id: int, patience_s: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = HttpClient(self.url)
        self._hash = tokenizer_hash
        self._eos = eos_id
        self._patience_s = patience_s
        self._checked = False
        self.model = ""
        self.card: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()

    async def check(self, wait_s: float) -> None:
        """Waits for the engine, and compares tokenizers. InfraError when it does not answer in
        `wait_s`, ConfigError when its ids are not ours."""
        end = time.monotonic() + wait_s
        while True:
            try:
                answer = await self._http.request("GET", "/v1/models", timeout_s=10.0)
                if answer.status == 200:
                    break
                reason = f"/v1/models answered {answer.status}"
            except (ConnectionLostError, TimeoutError) as error:
                reason = str(error)
            if time.monotonic() >= end:
                raise InfraError(f"{self.url}: {reason}; start the engine")
            await asyncio.sleep(0.2)
        try:
            self.card = orjson.loads(answer.body)["data"][0]
            self.model = str(self.card["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(f"{self.url}/v1/models names no model; is it an engine?") from error
        theirs = self.card.get("tokenizer_hash")
        if theirs is None:
            self.counts["engine_without_hash"] += 1
        elif theirs != self._hash:
            raise ConfigError(
                f"{self.url} serves the tokenizer {str(theirs)[:12]}, the gateway has "
                f"{self._hash[:12]}: give --model the folder that the engine serves"
            )
        self._checked = True

    async def draw(self, prompt: array[int], draw: Draw, until: float) -> Drawn:
        """One reply. `until` is a `time.monotonic()`. GatewayError when there is none."""
        first = await self._once(prompt, draw, until)
        if first.finish in ENDS:
            return first
        parts = [first]
        for turn in itertools.count(1):
            self.counts["continued"] += 1
            ids = [id for part in parts for id in part.ids]
            left = draw.max_tokens - len(ids)
            if left < 1:
                break
            if not parts[-1].ids:
                await asyncio.sleep(_FIRST_WAIT_S)
            seed = None if draw.seed is None else draw.seed + (turn << 32)
            more = replace(draw, max_tokens=left, seed=seed)
            parts.append(await self._once(prompt + array("i", ids), more, until))
            if parts[-1].finish in ENDS:
                break
        return _joined(parts)

    async def _once(self, prompt: array[int], draw: Draw, until: float) -> Drawn:
        body = self._body(prompt, draw)
        wait_s = _FIRST_WAIT_S
        give_up = time.monotonic() + self._patience_s
        while True:
            now = time.monotonic()
            if not self._checked:
                await self._check_again(min(give_up, until) - now)
            try:
                left = max(min(REPLY_S, until - now), 0.01)
                answer = await self._http.request("POST", "/v1/completions", body, timeout_s=left)
                if answer.status == 200:
                    return read(answer.body, self._hash)
                reason = f"answered {answer.status}: {reason_of(answer)}"
                if 400 <= answer.status < 500 and answer.status not in (408, 409, 429):
                    raise _passed_on(answer)
            except ConnectionLostError as error:
                self._checked = False  # what comes back may be another engine
                reason = str(error)
            except TimeoutError as error:
                raise GatewayError(504, "the engine gave no answer in time", "timeout") from error
            self.counts["engine_retries"] += 1
            if time.monotonic() + wait_s > min(give_up, until):
                raise GatewayError(
                    503, f"the engine {reason}; tried for {self._patience_s:g} s", "engine_down"
                )
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    async def _check_again(self, wait_s: float) -> None:
        try:
            await self.check(wait_s)
        except InfraError as error:
            raise GatewayError(503, str(error), "engine_down") from error
        except ConfigError as error:
            self.counts["unknown_tokenizer"] += 1
            raise GatewayError(502, str(error), "unknown_tokenizer") from error

    def _body(self, prompt: array[int], draw: Draw) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt.tolist(),
            "max_tokens": draw.max_tokens,
            "temperature": draw.temperature,
            "top_p": 1.0,
            "ignore_eos": True,  # the id that ends a reply is named
            "stop_token_ids": [self._eos],
            "return_token_ids": True,
            "logprobs": 0,
        }
        if draw.seed is not None:
            body["seed"] = draw.seed & (2**63 - 1)
        if draw.stops:
            body["stop"] = list(draw.stops)
        if draw.repetition is not None:
            tokens, probability = draw.repetition
            body["repetition_stop"] = {"tokens": tokens, "probability": probability}
        return orjson.dumps(body)

    def close(self) -> None:
        self._http.close()


def read(body: bytes, tokenizer_hash: str) -> Drawn:
    """The one choice of an engine's answer. GatewayError where it cannot be a record."""
    try:
        answer = orjson.loads(body)
    except ValueError:
        answer = None
        with contextlib.suppress(ValueError):
            answer = json.loads(body)  # NaN and Infinity, which JSON does not have
    try:
        (choice,) = answer["choices"]
        ids = choice["token_ids"]
        values = choice["logprobs"]["token_logprobs"]
        finish = str(choice["finish_reason"])
        if len(ids) != len(values):
            raise GatewayError(
                502, f"the engine gave {len(ids)} ids and {len(values)} log-probs", "unequal"
            )
        array("i", ids)  # whole numbers of the right size, or TypeError
        logprobs = [math.nan if value is None else float(value) for value in values]
        version = int(choice.get("version") or 0)
        spans = choice.get("versions") or [[0, len(ids), version]]
        versions = tuple((int(a), int(b), int(v)) for a, b, v in spans)
        theirs = choice.get("tokenizer_hash") or answer.get("tokenizer_hash") or tokenizer_hash
        details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
        cached = int(details.get("cached_tokens") or 0)
        routed = choice.get("routed_experts")
        experts = None if routed is None else tuple(tuple(map(int, row)) for row in routed)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise GatewayError(502, "the engine gave no ids with log-probs", "bad_answer") from error
    if theirs != tokenizer_hash:
        raise GatewayError(
            502, f"the engine's ids are of tokenizer {theirs[:12]}", "unknown_tokenizer"
        )
    if finish not in ENDS:
        finish = "abort"  # ended by a pause
    constrained = bool(choice.get("constrained"))
    return Drawn(ids, logprobs, versions, finish, constrained, cached, experts)


def reason_of(answer: Response) -> str:
    """An error's text, in one short line."""
    text: Any = answer.body[:300].decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        found = orjson.loads(answer.body)
        error = found.get("error", found.get("detail", found))
        text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]


def _passed_on(answer: Response) -> GatewayError:
    """What the engine refused, the agent must mend."""
    code = None
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        code = orjson.loads(answer.body)["error"]["code"]
    reason = reason_of(answer)
    if "context" in reason and "token" in reason:
        code = "context_length_exceeded"
    return GatewayError(400, reason, str(code or "refused_by_engine"))


def _joined(parts: Sequence[Drawn]) -> Drawn:
    ids = [id for part in parts for id in part.ids]
    versions: list[tuple[int, int, int]] = []
    at = 0
    for part in parts:
        for begin, end, version in part.versions:
            if versions and versions[-1][2] == version and versions[-1][1] == begin + at:
                versions[-1] = (versions[-1][0], end + at, version)
            elif end > begin:
                versions.append((begin + at, end + at, version))
        at += len(part.ids)
    finish = parts[-1].finish
    return Drawn(
        ids,
        [value for part in parts for value in part.logprobs],
        tuple(versions),
        finish if finish in ENDS else "length",
        any(part.constrained for part in parts),
        parts[0].cached,
        _joined_experts(parts),
    )


def _joined_experts(parts: Sequence[Drawn]) -> tuple[tuple[int, ...], ...] | None:
    """Each part's rows begin at or behind the prompt's first token and end before its own last
    token. A later part has read the earlier tokens again: theirs are what they were drawn with."""
    rows: tuple[tuple[int, ...], ...] | None = None
    for part in parts:
        if part.routed is None:
            if part.ids:
                return None
            continue
        new = len(part.ids)
        if rows is None or len(part.routed) < new:
            rows = part.routed  # nothing before, or a gap that only the last part can leave out
        else:
            rows += part.routed[len(part.routed) - new :]
    return rows

"""A generation engine behind HTTP: our own server or vLLM, each started by `model.serve --control`.

Ids go in; ids, log-probs of the sampled distribution and the version of the weights come out. A
plain vLLM (without `model.vllm_protocol`) is understood too: it is known by its /version route, its
weights are loaded with `reload_weights`, and this client counts their version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import httpx

from rl.errors import ConfigError, InfraError

if TYPE_CHECKING:
    from model.generate import Generation, GenRequest

PauseMode = Literal["abort", "wait", "keep"]
REPLY_TIMEOUT_S = 3600.0
CONNECT_TIMEOUT_S = 10.0
IN_FLIGHT = 256
"""Requests at once; more gain nothing, since the server's Python is then the limit."""


class EngineClient(Protocol):
    """What a rollout and a trainer need of an engine, wherever it runs."""

    version: int

    def submit(self, request: GenRequest) -> Generation: ...

    def generate(self, requests: Sequence[GenRequest]) -> list[Generation]: ...

    def pause(self, mode: PauseMode = "wait") -> None: ...

    def load(self, path: Path, version: int) -> None: ...

    def resume(self) -> None: ...


class HttpEngine:
    """An engine at `url` (without /v1). A context manager; `submit` may be called by many threads.

    `submit` is what `rl.engine.LocalClient` takes. Raises InfraError when the server is down, busy
    or answers something else, ConfigError when it refuses.
    """

    def __init__(self, url: str, *, timeout_s: float = REPLY_TIMEOUT_S) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
        self._http = httpx.Client(base_url=self.url, timeout=timeout, limits=limits)
        self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="generate")
        self.version = 0
        self.is_vllm = self._ask("GET", "/version", missing_ok=True) is not None

    def __enter__(self) -> HttpEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._http.close()

    def submit(self, request: GenRequest) -> Generation:
        """One request, answered."""
        answer = self._ask("POST", "/v1/completions", wire(request))
        return generation(answer, self.version, self.url)

    def generate(self, requests: Sequence[GenRequest]) -> list[Generation]:
        """All requests at once, in their order."""
        return list(self._threads.map(self.submit, requests))

    def pause(self, mode: PauseMode = "wait") -> None:
        """No request runs on until `resume`. `wait` lets those that run end, `keep` freezes them,
        `abort` ends them with what they have."""
        query = f"?mode={mode}" if self.is_vllm else ""
        self._control(f"/pause{query}", {"mode": mode})

    def resume(self) -> None:
        """Goes on after `pause`."""
        self._control("/resume", {})

    def load(self, path: Path, version: int) -> None:
        """Weights of a checkpoint folder that the server can read; what was cached is dropped."""
        body = {"path": str(path.resolve()), "version": version}
        if self._ask("POST", "/load", body, missing_ok=self.is_vllm) is None:
            kwargs = {"weights_path": body["path"]}
            self._control("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
            self.drop_caches()
        self.version = version

    # What only vLLM has: weights from the memory of the same card (`rl.weight_sync`).

    def init_transfer(self) -> None:
        """Once, before the first `update`."""
        self._control("/init_weight_transfer_engine", {"init_info": {}})

    def update(self, info: Mapping[str, Any], version: int) -> None:
        """Start, update, finish. The tensors behind `info` may be freed afterwards."""
        self._control("/start_weight_update", {})
        self._control("/update_weights", {"update_info": dict(info)})
        self._control("/finish_weight_update", {"weight_version": str(version)})
        self.drop_caches()
        self.version = version

    def drop_caches(self) -> None:
        """Forgets keys and values of the weights before."""
        self._control("/reset_prefix_cache", {})

    def _control(self, path: str, body: Mapping[str, Any]) -> None:
        if self._ask("POST", path, body, missing_ok=True) is None:
            raise ConfigError(
                f"{self.url} has no {path.partition('?')[0]}: start it with --control"
            )

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        missing_ok: bool = False,
    ) -> dict[str, Any] | None:
        """The answer's JSON object ({} for an empty one); None for 404 where that is allowed."""
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise InfraError(
                f"{self.url}{path}: no answer in time; see the server's log"
            ) from error
        except httpx.HTTPError as error:
            raise InfraError(f"{self.url} is not reachable ({error}); start the server") from error
        if missing_ok and answer.status_code in (404, 405):
            return None
        if answer.status_code == 429 or answer.status_code >= 500:
            raise InfraError(f"{self.url}{path} answered {answer.status_code}: {_reason(answer)}")
        if answer.status_code >= 400:
            raise ConfigError(f"{self.url}{path} refused the request: {_reason(answer)}")
        if not answer.content.strip():
            return {}
        try:
            value = answer.json()
        except ValueError as error:
            raise InfraError(f"{self.url}{path} answered something that is no JSON") from error
        return value if isinstance(value, dict) else {}


def wire(request: GenRequest) -> dict[str, Any]:
    """The body of /v1/completions for one request. ConfigError for a constraint, which is code."""
    if request.constraint is not None:
        raise ConfigError("a constrained request cannot go over HTTP; use response_format or tools")
    body: dict[str, Any] = {
        "prompt": list(request.prompt_ids),
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "ignore_eos": True,  # the ids that end a reply are all named
        "stop_token_ids": sorted(request.stop_ids),
        "return_token_ids": True,
        "logprobs": 0,
    }
    if request.top_k:
        body["top_k"] = request.top_k
    if request.seed is not None:
        body["seed"] = request.seed
    if request.repetition is not None:
        tokens, probability = request.repetition
        body["repetition_stop"] = {"tokens": tokens, "probability": probability}
    return body


def generation(answer: Mapping[str, Any] | None, version: int, url: str) -> Generation:
    """The one choice of an answer. InfraError where ids and log-probs do not fit together."""
    from model.generate import Generation

    try:
        assert answer is not None
        (choice,) = answer["choices"]
        ids = [int(id) for id in choice["token_ids"]]
        logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        reason = choice["finish_reason"]
        cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        version = int(choice.get("version", version))
        spans = choice.get("versions") or [[0, len(ids), version]]
        versions = [(int(begin), int(end), int(of)) for begin, end, of in spans]
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise InfraError(
            f"{url} gave no ids with log-probs; check that it is our server"
        ) from error
    if len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
        raise InfraError(f"{url} gave {len(ids)} ids and {len(logprobs)} log-probs, or not finite")
    if reason not in ("stop", "length", "repetition"):
        reason = "abort"  # ended by a pause
    return Generation(
        ids,
        logprobs,
        reason,
        bool(choice.get("constrained")),
        version,
        cached=int(cached),
        versions=versions,
    )


def _reason(answer: httpx.Response) -> str:
    """An error's text, in one short line."""
    try:
        body = answer.json()
        error = body.get("error", body.get("detail", body))
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = answer.text
    return " ".join(str(text).split())[:300]

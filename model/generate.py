"""Batched generation with a key/value cache: ids in; ids, log-probs and the weights' version out.

Shapes: B rows, V vocabulary. Rows of a batch end their prompts in the same column (shorter ones are
padded on the left), so a step writes one column of the cache. A prompt that several requests share
is read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.cache import KVCache
from model.checkpoint import load_model
from model.decode import Decoder, EagerDecoder, GraphDecoder, NativeDecoder, prefill
from model.errors import ModelError
from model.moe import needs_no_host
from model.native.build import NativeUnavailableError
from model.native.step import NativeModel
from model.sampling import Sampler, uniforms
from model.transformer import Transformer
from model.window import has_windows

SHRINK_AT = 0.875  # drop rows that ended once no more than this share of them goes on
KEEP_GRAPHS = 4  # captured CUDA graphs, each with its own cache
NATIVE_STEPS = 32  # with fewer steps, native code saves less than copying the weights for it costs
CUDA_CHECK_EVERY = 8  # steps between looks at the tokens by the host


class Constraint(Protocol):
    """What limits a request's tokens, for instance a grammar."""

    def mask(self) -> Tensor | None:
        """Allowed ids as bool (V) for the next token; None where all are."""
        ...

    def accept(self, id: int) -> None:
        """Take note of the token that was drawn."""
        ...

    def done(self) -> bool:
        """True when nothing may follow; generation then stops."""
        ...


@dataclass(frozen=True)
class GenRequest:
    """One prompt to continue. Temperature 0 is greedy; seed None draws a random one.

    Generation stops at an id of `stop_ids` (which is returned) or after `max_new_tokens`. Only a
    running batch gives `top_logprobs` (that many of the likeliest ids, for each token) and
    `prompt_logprobs` (scores of the prompt's own tokens). `repetition` (n, p) also ends it after n
    tokens in a row that were each likelier than p (MiniMax-M1 §5).
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    repetition: tuple[int, float] | None = None


Finish = Literal["stop", "length", "repetition", "abort"]

Top = list[tuple[int, float]]
"""The likeliest ids of one place and their log-probs, best first."""


@dataclass(frozen=True)
class PromptScores:
    """Log-probs of a prompt's tokens at temperature 1, from the second token on: the first follows
    nothing. `top` is empty unless the request asks for `top_logprobs`."""

    logprobs: list[float]
    top: list[Top]


@dataclass(frozen=True)
class Generation:
    """The new ids and, for each, its log-prob under the unmasked softmax at the request's
    temperature (at temperature 1 for a greedy request). `versions` are spans (start, end, version
    of the weights that made these ids), of which `version` is the last; `cached` is how many prompt
    tokens were not computed for this request. `top` and `prompt` are there if the request asks for
    them. "abort": it was ended from outside."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: Finish
    constrained: bool
    version: int
    cached: int = 0
    top: list[Top] = field(default_factory=list)
    prompt: PromptScores | None = None
    versions: list[tuple[int, int, int]] = field(default_factory=list)


class Engine:
    """Generates for many requests at once. One thread at a time.

    The model is used where it is: weights changed in place between calls are the new weights.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        device: torch.device | str | None = None,
        max_batch: int = 64,
        version: int = 0,
    ) -> None:
        if max_batch < 1:
            raise ModelError(f"max_batch is {max_batch}; it must be ≥ 1")
        self.max_batch = max_batch
        self.device = torch.device(device) if device is not None else model.device
        self.model = model.to(self.device)
        self.version = version
        self._graphs: dict[tuple[int, int], GraphDecoder] = {}
        self._native: NativeModel | None = None

    def load(self, source: Transformer | Path | str, version: int) -> None:
        """Use these weights from the next `generate` on: a model (not copied) or a folder."""
        if not isinstance(source, Transformer):
            source = load_model(source, device=self.device, dtype=self.model.dtype)
        if source is not self.model:
            self._graphs.clear()
            self._native = None
            self.model = source.to(self.device)
        self.version = version

    def check(self, request: GenRequest) -> None:
        """Raise ModelError for a request that cannot be served."""
        config = self.model.config
        total = len(request.prompt_ids) + request.max_new_tokens
        if not request.prompt_ids:
            raise ModelError("request: the prompt is empty; give at least one token")
        if request.max_new_tokens < 1:
            raise ModelError(f"request: max_new_tokens is {request.max_new_tokens}; it must be ≥ 1")
        if total > config.max_position_embeddings:
            raise ModelError(
                f"request: {len(request.prompt_ids)} prompt + {request.max_new_tokens} new tokens "
                f"are more than the context of {config.max_position_embeddings}; shorten either"
            )
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < config.vocab_size:
            raise ModelError(f"request: token ids must be from 0 to {config.vocab_size - 1}")
        if request.repetition is not None and not (
            request.repetition[0] >= 1 and 0 < request.repetition[1] < 1
        ):
            raise ModelError(
                f"request: repetition {request.repetition}; needed are at least 1 token and a "
                "probability between 0 and 1"
            )
        if not (request.temperature >= 0 and 0 < request.top_p <= 1 and request.top_k >= 0):
            raise ModelError(
                f"request: temperature {request.temperature}, top_p {request.top_p}, top_k "
                f"{request.top_k}; needed are temperature ≥ 0, 0 < top_p ≤ 1, top_k ≥ 0"
            )

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenRequest]) -> list[Generation]:
        """Continue every prompt; results in the order of the requests.

        More than `max_batch` requests are served in batches of near-equal size, prompts of similar
        length together. Raises ModelError before any work for a request that cannot be served.
        """
        for request in requests:
            self.check(request)
            if request.top_logprobs or request.prompt_logprobs:
                raise ModelError(
                    "request: top_logprobs and prompt_logprobs need a running batch (model.running)"
                )
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        batches = -(-len(requests) // self.max_batch)
        results: dict[int, Generation] = {}
        for b in range(batches):
            part = order[b * len(order) // batches : (b + 1) * len(order) // batches]
            results |= zip(part, self._generate([requests[i] for i in part]), strict=True)
        return [results[i] for i in range(len(requests))]

    def _generate(self, requests: list[GenRequest]) -> list[Generation]:
        rows = [Row(request) for request in requests]
        steps = max(request.max_new_tokens for request in requests)
        constrained = any(request.constraint is not None for request in requests)
        # The host need not see every token; on a GPU looking less often keeps the queue full.
        every = CUDA_CHECK_EVERY if self.device.type == "cuda" and not constrained else 1
        sampler = sampler_of(rows, self.model.config.vocab_size, self.device)
        uniform_BS = torch.stack([uniforms(r.seed, steps) for r in requests]).to(self.device)
        decoder, logits_BV = self._start([r.prompt_ids for r in requests], steps)
        live = rows
        drawn: list[tuple[Tensor, Tensor]] = []
        for step in range(steps):
            allowed_BV = None
            if constrained:
                allowed_BV = allowed_ids(live, self.model.config.vocab_size, self.device)
            id_B, logp_B, _ = sampler.draw(logits_BV, uniform_BS[:, step], allowed_BV)
            drawn.append((id_B, logp_B))
            if len(drawn) == every or step + 1 == steps:
                _hand_out(live, drawn)
                drawn.clear()
                kept = [i for i, row in enumerate(live) if row.finish is None]
                if not kept:
                    break
                if decoder.shrinks and len(kept) <= SHRINK_AT * len(live):
                    kept_B = torch.tensor(kept, device=self.device)
                    decoder.keep(kept_B)
                    live = [live[i] for i in kept]
                    sampler, uniform_BS = sampler.take(kept_B), uniform_BS[kept_B]
                    id_B = id_B[kept_B]
            logits_BV = decoder.step(id_B)
        return [row.result(self.version) for row in rows]

    def _start(self, prompts: list[tuple[int, ...]], steps: int) -> tuple[Decoder, Tensor]:
        """A decoder that has read the prompts, and the logits after each."""
        model, config = self.model, self.model.config
        columns = max(len(ids) for ids in prompts) + steps
        batch = -(-len(prompts) // 8) * 8
        graphs = not has_windows(config) and needs_no_host(
            batch, config.num_local_experts, self.device, model.dtype
        )
        if graphs:
            # Sizes are rounded up, so that one graph serves many calls.
            size = (batch, -(-columns // 128) * 128)
            graph = self._graphs.pop(size, None) or GraphDecoder(model, *size)
            self._graphs[size] = graph
            if len(self._graphs) > KEEP_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            return graph, graph.start(prompts)
        cache = KVCache(config, len(prompts), columns, self.device, model.dtype)
        pad_left_B, logits_BV = prefill(model, prompts, cache)
        if native := self._native_model(steps):
            return NativeDecoder(native, cache, pad_left_B), logits_BV
        return EagerDecoder(model, cache, pad_left_B), logits_BV

    def _native_model(self, steps: int) -> NativeModel | None:
        """Native code with the weights as they are now, where there is any and it pays."""
        if steps < NATIVE_STEPS:
            return None
        try:
            if self._native is None:
                self._native = NativeModel(self.model)
            else:
                self._native.update(self.model)
        except NativeUnavailableError:
            return None
        return self._native


@dataclass(frozen=True)
class Piece:
    """Tokens that follow those already told of; `prompt` comes with the first."""

    ids: list[int]
    logprobs: list[float]
    top: list[Top]
    prompt: PromptScores | None = None


@dataclass(eq=False, slots=True, weakref_slot=True)
class Row:
    """What one request has so far; `cached`, `top` and `prompt` as in `Generation`. An `error` of
    its constraint ends it. `versions` are pairs: from this id on, these weights."""

    request: GenRequest
    cached: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    prompt: PromptScores | None = None
    finish: Finish | None = None
    error: Exception | None = None
    versions: list[tuple[int, int]] = field(default_factory=list)
    certain: int = 0  # tokens in a row that were likelier than the request's bound

    def mask(self) -> Tensor | None:
        """Allowed ids (V), or None for all; a row whose constraint allows none ends here."""
        if self.finish is not None or self.request.constraint is None:
            return None
        try:
            mask_V = self.request.constraint.mask()
        except Exception as error:  # noqa: BLE001 - raised where the row's result is asked for
            self.error, self.finish = error, "stop"
            return None
        if mask_V is not None and not bool(mask_V.any()):
            self.finish = "stop"
            return None
        return mask_V

    def add(self, id: int, logprob: float) -> bool:
        """Take a drawn token; after the row's end it is dropped. True if the row has ended."""
        if self.finish is not None:
            return True
        self.ids.append(id)
        self.logprobs.append(logprob)
        constraint = self.request.constraint
        if id in self.request.stop_ids:
            self.finish = "stop"
        elif len(self.ids) == self.request.max_new_tokens:
            self.finish = "length"
        elif self.request.repetition is not None:
            most, probability = self.request.repetition
            self.certain = self.certain + 1 if logprob > math.log(probability) else 0
            if self.certain >= most:
                self.finish = "repetition"
        if constraint is not None:
            try:
                constraint.accept(id)
                ended = constraint.done()
            except Exception as error:  # noqa: BLE001 - one row's fault is not the batch's
                self.error, ended = error, True
            if ended:
                self.finish = "stop"
        return self.finish is not None

    def since(self, told: int) -> Piece:
        """What came after the first `told` tokens."""
        prompt = None if told else self.prompt
        return Piece(self.ids[told:], self.logprobs[told:], self.top[told:], prompt)

    def result(self, version: int) -> Generation:
        """The answer, once the row has ended. Raises what its constraint raised.

        `version` is that of the weights, for a row that was not told.
        """
        if self.error is not None:
            raise self.error
        begun = self.versions or [(0, version)]
        ends = [*(start for start, _ in begun[1:]), len(self.ids)]
        spans = [(a, b, made) for (a, made), b in zip(begun, ends, strict=True) if a < b]
        return Generation(
            self.ids,
            self.logprobs,
            self.finish or "length",
            self.request.constraint is not None,
            spans[-1][2] if spans else version,
            self.cached,
            self.top,
            self.prompt,
            spans,
        )


def sampler_of(rows: Sequence[Row], vocab_size: int, device: torch.device) -> Sampler:
    """The sampling settings of the rows' requests."""
    requests = [row.request for row in rows]
    return Sampler.of(
        [r.temperature for r in requests],
        [r.top_p for r in requests],
        [r.top_k for r in requests],
        vocab_size,
        device,
    )


def allowed_ids(rows: Sequence[Row], vocab_size: int, device: torch.device) -> Tensor | None:
    """Allowed ids (B, V), or None for all; a row whose constraint allows none ends here."""
    masks = [row.mask() for row in rows]
    if all(mask is None for mask in masks):
        return None
    every_V = torch.ones(vocab_size, dtype=torch.bool)
    return torch.stack([every_V if mask is None else mask for mask in masks]).to(device)


def _hand_out(live: list[Row], drawn: list[tuple[Tensor, Tensor]]) -> None:
    """Give the rows the tokens of the last steps; what follows a row's end is dropped."""
    ids = torch.stack([id_B for id_B, _ in drawn]).tolist()
    logprobs = torch.stack([logp_B for _, logp_B in drawn]).tolist()
    for ids_of_step, logprobs_of_step in zip(ids, logprobs, strict=True):
        for row, id, logprob in zip(live, ids_of_step, logprobs_of_step, strict=True):
            row.add(id, logprob)

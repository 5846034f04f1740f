"""The running batch: requests join it and leave it between two token steps.

A step draws one token for every row, drops the rows that ended, and feeds the rest. Prompts are
read when their requests join, as far as the prefix cache does not know them. One thread at a time.

Shapes: B rows, M tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from model.decode import SlotGraph
from model.errors import ModelError
from model.generate import Engine, GenRequest, PromptScores, Row, Top, allowed_ids, sampler_of
from model.moe import float_of, needs_no_host
from model.native.build import NativeUnavailableError
from model.native.step import NativeModel
from model.packed import PACKED_TOKENS, PackedModel
from model.prefix_cache import BLOCK, Key, PrefixCache
from model.sampling import Sampler, uniforms
from model.slots import JoinAttend, SlotAttend, SlotCache
from model.window import has_windows

JOIN_TOKENS = 2048  # prompt tokens read at most between two steps (or one prompt, if it is longer)
SCORE_TOKENS = 256  # logits of a prompt's tokens are made for this many at a time


class Runner(Protocol):
    """What the batcher needs: see `RunningBatch`."""

    @property
    def version(self) -> int: ...

    def check(self, request: GenRequest) -> None: ...

    def room(self, waiting: Sequence[GenRequest]) -> int: ...

    def join(self, rows: Sequence[Row]) -> None: ...

    def step(self) -> list[Row]: ...

    def drop(self, rows: Collection[Row]) -> None: ...

    def clear(self) -> None: ...

    def load(self, source: Any, version: int) -> None: ...


class _Forward(Protocol):
    """What `Transformer`, `PackedModel` and `NativeModel` have in common."""

    def run(self, ids_M: Tensor, position_M: Tensor, attend: SlotAttend | JoinAttend) -> Tensor: ...

    def head(self, x: Tensor) -> Tensor: ...


class RunningBatch:
    """Generates for up to `max_batch` of an engine's requests.

    `cache_tokens` bounds rows × columns of the key/value cache, `prefix_tokens` the prefix cache (0
    turns it off). New weights come through `load` only. With `native` the forward pass is native
    code where there is any for this model; `path` says so, or why not. Raises ModelError where
    `cache_tokens` does not hold one row as long as the context.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 64,
        cache_tokens: int = 131_072,
        prefix_tokens: int = 32_768,
        native: bool = True,
    ) -> None:
        self._engine, self.max_batch, self._cache_tokens = engine, max_batch, cache_tokens
        config, device, dtype = engine.model.config, engine.device, engine.model.dtype
        self._cache = SlotCache(config, device, dtype)
        rows, columns = self._cache.rounded(1, config.max_position_embeddings)
        if cache_tokens < rows * columns:
            raise ModelError(
                f"a cache of {cache_tokens} tokens does not hold {rows} rows of the context of "
                f"{columns}; give at least {rows * columns}"
            )
        self._prefix = None
        # A window layer's ring has lost what a prefix would need by the time that it is kept.
        if prefix_tokens >= BLOCK and not has_windows(config):
            self._prefix = PrefixCache(config, prefix_tokens, device, dtype)
        self._wants_native = native
        self._prepare()
        self._rows: list[Row] = []
        self._lengths: list[int] = []  # columns in use, a row
        self._uniforms: list[list[float]] = []
        wide = float_of(dtype)
        self._logits_BV = torch.empty(0, config.vocab_size, device=device, dtype=wide)
        self._sampler: Sampler | None = None  # None after rows came or went

    @property
    def version(self) -> int:
        """Of the weights."""
        return self._engine.version

    @property
    def running(self) -> int:
        """Rows in use."""
        return len(self._rows)

    @property
    def cache_bytes(self) -> int:
        """What the key/value cache takes now, without the prefix cache."""
        return self._cache.nbytes

    @property
    def path(self) -> str:
        """How the forward pass is done, in one line."""
        return "native code" if self._native is not None else f"torch ({self._no_native})"

    def check(self, request: GenRequest) -> None:
        """Raise ModelError for a request that cannot be served."""
        self._engine.check(request)

    def room(self, waiting: Sequence[GenRequest]) -> int:
        """How many of these, from the first on, can join now. Space is kept for all their tokens,
        so no row ever has to leave before its end. At least one joins an empty batch."""
        columns = max((_most(row.request) for row in self._rows), default=0)
        prompts = 0
        for n, request in enumerate(waiting):
            columns = max(columns, _most(request))
            prompts += len(request.prompt_ids)
            rows = len(self._rows) + n + 1
            size = self._cache.rounded(rows, columns)
            full = rows > self.max_batch or size[0] * size[1] > self._cache_tokens
            if full or (n and prompts > JOIN_TOKENS):
                return n
        return len(waiting)

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows; the next step draws their first tokens.

        A prompt that several of them have is read once, and so is a common beginning.
        """
        if not rows:
            return
        total = len(self._rows) + len(rows)
        self._fit(total, max(len(row.request.prompt_ids) for row in rows))
        alike: dict[tuple[tuple[int, ...], bool, int], list[Row]] = {}
        for row in rows:
            request = row.request
            key = (request.prompt_ids, request.prompt_logprobs, request.top_logprobs)
            alike.setdefault(key, []).append(row)
        waiting = [same[0] for same in alike.values()]
        while waiting:
            now, waiting = self._apart(waiting)
            self._read(now)
        for same in alike.values():
            self._copy(self._rows.index(same[0]), same[1:])

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One token for every row; returns the rows that ended, which have left the batch.

        An error in a row's constraint ends that row alone (`Row.error`).
        """
        if not self._rows:
            return []
        rows, device = self._rows, self._engine.device
        vocab_size = self._engine.model.config.vocab_size
        if self._sampler is None:
            self._sampler = sampler_of(rows, vocab_size, device)
        allowed_BV = None
        if any(row.request.constraint is not None for row in rows):
            allowed_BV = allowed_ids(rows, vocab_size, device)
        uniform_B = torch.tensor(
            [numbers[len(row.ids)] for numbers, row in zip(self._uniforms, rows, strict=True)],
            dtype=torch.float64,
            device=device,
        )
        id_B, logp_B = self._draw(self._sampler, uniform_B, allowed_BV)
        for row, id, logprob in zip(rows, id_B.tolist(), logp_B.tolist(), strict=True):
            row.add(id, logprob)
        ended = [row for row in rows if row.finish is not None]
        if ended:
            self._keep_prefixes(ended)
            order = self._leave(ended)
            id_B = id_B[torch.tensor(order, dtype=torch.long, device=device)]
        if self._rows:
            self._feed(id_B)
        else:
            self._logits_BV = self._logits_BV[:0]
        return ended

    @torch.inference_mode()
    def drop(self, rows: Collection[Row]) -> None:
        """Take these rows out, wherever they are in their replies."""
        if rows:
            order = self._leave(rows)
            index = torch.tensor(order, dtype=torch.long, device=self._engine.device)
            self._logits_BV = self._logits_BV[index]

    def clear(self) -> None:
        """Take all rows out, whatever state a failed call left them in."""
        self._rows, self._lengths, self._uniforms = [], [], []
        self._logits_BV = self._logits_BV[:0]
        self._sampler = None

    def load(self, source: Any, version: int) -> None:
        """Use these weights (see `Engine.load`). Raises ModelError while rows are running."""
        if self._rows:
            raise ModelError("weights cannot change while replies are being written")
        self._engine.load(source, version)
        self._prepare()
        if self._prefix is not None:
            self._prefix.clear()

    def _prepare(self) -> None:
        """What a forward pass needs besides the model; again after its weights have changed."""
        model = self._engine.model
        self._native: NativeModel | None = None
        self._packed: PackedModel | None = None
        self._graph: SlotGraph | None = None
        self._no_native = "native code is turned off"
        if self._wants_native:
            try:
                self._native = NativeModel(model)
            except NativeUnavailableError as error:
                self._no_native = str(error)
        if self._native is None and PackedModel.suits(model):
            self._packed = PackedModel(model)

    def _apart(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Rows to read now, and those that wait because one of them reads their next block."""
        if self._prefix is None:
            return list(rows), []
        now, later = [], []
        reading: set[Key] = set()
        for row in rows:
            key = self._prefix.next_key(row.request.prompt_ids, self._found(row))
            if key is not None and key in reading and not row.request.prompt_logprobs:
                later.append(row)
                continue
            if key is not None:
                reading.add(key)
            now.append(row)
        return now, later

    def _found(self, row: Row) -> list[Key]:
        """Blocks of a row's prompt that need not be run. The last token always is: its logits are
        wanted; and so are all, where the prompt is to be scored."""
        if self._prefix is None or row.request.prompt_logprobs:
            return []
        return self._prefix.find(row.request.prompt_ids[:-1])

    def _read(self, rows: Sequence[Row]) -> None:
        first, data, device = len(self._rows), self._cache.data, self._engine.device
        for slot, row in enumerate(rows, start=first):
            found = self._found(row)
            row.cached = len(found) * BLOCK
            if self._prefix and found:
                data[:, :, slot, :, : row.cached] = self._prefix.read(found)
        starts = [row.cached for row in rows]
        counts = [len(row.request.prompt_ids) - row.cached for row in rows]
        ids = [id for row in rows for id in row.request.prompt_ids[row.cached :]]
        attend = JoinAttend(self._cache, first, starts, counts)
        forward = self._forward(len(ids))
        x_MH = forward.run(torch.tensor(ids, device=device), attend.column_M, attend)
        last_B = torch.tensor(counts, device=device).cumsum(0) - 1
        self._logits_BV = torch.cat([self._logits_BV, forward.head(x_MH[last_B])])
        for row, part_TH in zip(rows, torch.split(x_MH, counts), strict=True):
            if row.request.prompt_logprobs:
                row.prompt = _scores(forward, row.request, part_TH)
        for slot, row in enumerate(rows, start=first):
            if self._prefix is not None:
                self._prefix.put(row.request.prompt_ids, data[:, :, slot])
            self._take(row)

    def _copy(self, slot: int, rows: Sequence[Row]) -> None:
        """Rows whose prompt was just read into `slot`."""
        if not rows:
            return
        like, length = self._rows[slot], self._lengths[slot]
        logits_1V = self._logits_BV[slot : slot + 1]
        self._logits_BV = torch.cat([self._logits_BV, logits_1V.expand(len(rows), -1)])
        for row in rows:
            self._cache.move(slot, len(self._rows), length)
            row.cached, row.prompt = length, like.prompt
            self._take(row)

    def _take(self, row: Row) -> None:
        request = row.request
        self._rows.append(row)
        self._lengths.append(len(request.prompt_ids))
        self._uniforms.append(uniforms(request.seed, request.max_new_tokens).tolist())
        self._sampler = None

    def _draw(
        self, sampler: Sampler, uniform_B: Tensor, allowed_BV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each row's next token and its log-prob; rows that want the likeliest are given them."""
        free = allowed_BV is None and not sampler.any_filter
        if (
            self._native is not None
            and free
            and not any(r.request.top_logprobs for r in self._rows)
        ):
            return self._native.draw(sampler, self._logits_BV, uniform_B)
        id_B, logp_B, logp_BV = sampler.draw(self._logits_BV, uniform_B, allowed_BV)
        for row, top in zip(self._rows, _tops(self._rows, logp_BV), strict=True):
            if row.finish is None and top:
                row.top.append(top)
        return id_B, logp_B

    def _feed(self, id_B: Tensor) -> None:
        """The rows' latest tokens in, logits of their next ones out."""
        self._fit(len(self._rows), max(self._lengths) + 1)
        column_B = torch.tensor(self._lengths, device=self._engine.device)
        if self._graph is not None:
            self._logits_BV = self._graph.step(id_B, column_B)
        else:
            attend = SlotAttend(self._cache, column_B, max(self._lengths) + 1)
            if self._native is not None:
                self._logits_BV = self._native.logits(id_B, column_B, attend)
            else:
                forward = self._forward(len(id_B))
                self._logits_BV = forward.head(forward.run(id_B, column_B, attend))
        self._lengths = [length + 1 for length in self._lengths]

    def _forward(self, tokens: int) -> _Forward:
        if self._native is not None:
            return self._native
        if self._packed is not None and tokens <= PACKED_TOKENS:
            return self._packed
        return self._engine.model

    def _fit(self, rows: int, columns: int) -> None:
        used = max(self._lengths, default=0)
        moved = self._cache.fit(rows, max(columns, used), len(self._rows), used)
        model, cache = self._engine.model, self._cache
        experts = model.config.num_local_experts
        # The trial steps of a capture would write into rings that are in use.
        graphs = not has_windows(model.config) and needs_no_host(
            cache.rows, experts, self._engine.device, model.dtype
        )
        if graphs and (moved or self._graph is None):
            self._graph = SlotGraph(model, cache)

    def _keep_prefixes(self, ended: Collection[Row]) -> None:
        """Replies too are beginnings of later prompts. Their last token was never fed."""
        if self._prefix is None:
            return
        for slot, row in enumerate(self._rows):
            if row in ended:
                ids = [*row.request.prompt_ids, *row.ids][: self._lengths[slot]]
                self._prefix.put(ids, self._cache.data[:, :, slot])

    def _leave(self, gone: Collection[Row]) -> list[int]:
        """Fill the places of these rows from the end; the old place of every row that stays."""
        order = list(range(len(self._rows)))
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot] not in gone:
                continue
            last = len(self._rows) - 1
            if slot != last:
                self._cache.move(last, slot, self._lengths[last])
            _fill(self._rows, slot)
            _fill(self._lengths, slot)
            _fill(self._uniforms, slot)
            _fill(order, slot)
        self._sampler = None
        if not self._rows and self._graph is None:  # a captured step is worth keeping
            self._cache.clear()
        return order


def _fill(items: list[Any], place: int) -> None:
    """The last item moves to `place`, over what was there."""
    items[place] = items[-1]
    items.pop()


def _most(request: GenRequest) -> int:
    """Columns that a request may come to fill."""
    return len(request.prompt_ids) + request.max_new_tokens


def _scores(forward: _Forward, request: GenRequest, x_TH: Tensor) -> PromptScores:
    """Log-probs of a prompt's tokens, from hidden states of the whole prompt."""
    ids_t = torch.tensor(request.prompt_ids[1:], device=x_TH.device)
    logprobs: list[float] = []
    tops: list[Top] = []
    for start in range(0, len(ids_t), SCORE_TOKENS):
        id_t1 = ids_t[start : start + SCORE_TOKENS, None]
        logp_tV = forward.head(x_TH[start : start + len(id_t1)]).log_softmax(-1)
        logprobs += logp_tV.gather(1, id_t1)[:, 0].tolist()
        if request.top_logprobs:
            tops += _top(logp_tV, request.top_logprobs)
    return PromptScores(logprobs, tops)


def _top(logp_MV: Tensor, count: int) -> list[Top]:
    best = logp_MV.topk(min(count, logp_MV.shape[1]), dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in rows]


def _tops(rows: Sequence[Row], logp_BV: Tensor) -> list[Top]:
    """What each row asks for of the likeliest ids; empty for most."""
    most = max(row.request.top_logprobs for row in rows)
    if not most:
        return [[]] * len(rows)
    tops = _top(logp_BV, most)
    return [top[: row.request.top_logprobs] for row, top in zip(rows, tops, strict=True)]

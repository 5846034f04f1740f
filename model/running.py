"""The running batch: requests join it and leave it between two token steps.

A step reads the next tokens of prompts that are not whole yet, draws one token for every row whose
prompt is, drops the rows that ended, and feeds the rest. What is fed is always the same thing: rows
with some new tokens each, behind the columns that they hold. One thread at a time.

Shapes: B rows, M tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.decode import SlotGraph
from model.errors import ModelError
from model.generate import Engine, GenRequest, Row, allowed_ids
from model.likeliest import give_likeliest, score_piece
from model.moe import float_of, needs_no_host
from model.native.build import NativeUnavailableError
from model.native.step import NativeModel
from model.packed import PACKED_TOKENS, PackedModel
from model.prefix_cache import BLOCK, Key, PrefixCache
from model.reload import NewWeights
from model.running_draft import NO_GUESSES, Counts, DraftOptions, Guessing, follow
from model.sampling import uniforms
from model.slots import JoinAttend, SlotAttend, SlotCache
from model.step_inputs import StepInputs
from model.transformer import Transformer
from model.window import has_windows

PREFILL_TOKENS = {"native": 256, "cpu": 512, "cuda": 2048}
"""Prompt tokens read between two decode steps, by what reads them: fewer cost much of its speed."""


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


@dataclass(frozen=True)
class _Piece:
    """A prompt's tokens from `start` to `end`. `found` blocks of the prefix cache come before."""

    row: Row
    start: int
    end: int
    found: list[Key]

    @property
    def whole(self) -> bool:
        return self.end == len(self.row.request.prompt_ids)


class RunningBatch:
    """Generates for up to `max_batch` of an engine's requests.

    `cache_tokens` bounds rows × columns of the key/value cache, `prefix_tokens` the prefix cache (0
    turns it off), `prefill_tokens` how many prompt tokens are read between two decode steps
    (`PREFILL_TOKENS` by default). New weights come through `load` only. With `native` the forward
    pass is native code where there is any for this model, and then `draft` makes it guess ahead;
    `path` says so, or why not. Raises ModelError where `cache_tokens` does not hold one row as long
    as the context, or `prefill_tokens` is below 1.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 64,
        cache_tokens: int = 131_072,
        prefix_tokens: int = 32_768,
        prefill_tokens: int | None = None,
        native: bool = True,
        draft: DraftOptions | None = None,
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
        if prefill_tokens is not None and prefill_tokens < 1:
            raise ModelError(f"prefill_tokens is {prefill_tokens}; it must be ≥ 1")
        self._prefix = None
        # A window layer's ring has lost what a prefix would need by the time that it is kept.
        if prefix_tokens >= BLOCK and not has_windows(config):
            self._prefix = PrefixCache(config, prefix_tokens, device, dtype)
        self._wants_native = native
        self._captures = device.type == "cuda"
        self._native: NativeModel | None = None
        self._graph: SlotGraph | None = None
        self._draft = draft
        self._speculation: Guessing = NO_GUESSES
        self._prepare()
        reads = "native" if self._native is not None else device.type
        self._prefill_tokens = prefill_tokens or PREFILL_TOKENS[reads]
        # Rows that write, in the cache's first slots; the columns that each holds.
        self._rows: list[Row] = []
        self._lengths: list[int] = []
        self._numbers: list[list[float]] = []
        # Rows whose prompts are not whole. The next slot holds `_begun` tokens of the first one's.
        self._reading: list[Row] = []
        self._begun = 0
        wide = float_of(dtype)
        self._logits_BV = torch.empty(0, config.vocab_size, device=device, dtype=wide)
        self._inputs: StepInputs | None = None  # None after rows came or went

    @property
    def version(self) -> int:
        """Of the weights."""
        return self._engine.version

    @property
    def running(self) -> int:
        """Rows that joined and have not left."""
        return len(self._rows) + len(self._reading)

    @property
    def cache_bytes(self) -> int:
        """What the key/value cache takes now, without the prefix cache."""
        return self._cache.nbytes

    @property
    def path(self) -> str:
        """How the forward pass is done, in one line."""
        if self._native is None:
            return f"torch ({self._no_native})"
        guesses = self._speculation.guesses
        return "native code" + (f", {guesses} guesses a step" if guesses else self._no_guesses)

    @property
    def guessed(self) -> Counts:
        """How guesses fared so far."""
        return self._speculation.counts

    def check(self, request: GenRequest) -> None:
        """Raise ModelError for a request that cannot be served."""
        self._engine.check(request)

    def room(self, waiting: Sequence[GenRequest]) -> int:
        """How many of these, from the first on, can join now. Space is kept for all their tokens,
        so no row ever has to leave before its end. At least one joins an empty batch."""
        columns = self._most_columns()
        for n, request in enumerate(waiting):
            columns = max(columns, self._most(request))
            rows = self.running + n + 1
            size = self._cache.rounded(rows, columns)
            if rows > self.max_batch or size[0] * size[1] > self._cache_tokens:
                return n
        return len(waiting)

    def join(self, rows: Sequence[Row]) -> None:
        """Take new rows in. The steps that follow read their prompts, in this order; a prompt that
        several of them have is read once, and so is a common beginning."""
        self._reading.extend(rows)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Some tokens of prompts, and one token for every row whose prompt is whole; returns the
        rows that ended, which have left the batch.

        An error in a row's constraint ends that row alone (`Row.error`).
        """
        left = self._prefill_tokens
        while self._reading and left > 0:
            left -= self._read(left)
        if not self._rows:
            return []
        rows = self._rows
        if self._speculation.pending:
            id_B = self._draw_guessed()
            ended = [row for row in rows if row.finish is not None]
        else:
            id_B, ids, logprobs = self._draw()
            drawn = zip(rows, ids, logprobs, strict=True)
            ended = [row for row, id, logprob in drawn if row.add(id, logprob)]
        if ended:
            self._keep_prefixes(ended)
            order = self._leave(ended)
            id_B = id_B[torch.tensor(order, dtype=torch.long, device=id_B.device)]
        if self._rows:
            self._feed(id_B)
        else:
            self._logits_BV = self._logits_BV[:0]
        return ended

    @torch.inference_mode()
    def drop(self, rows: Collection[Row]) -> None:
        """Take these rows out, wherever they are in their prompts or replies."""
        if not rows:
            return
        gone = set(rows)
        if self._reading and self._reading[0] in gone:
            self._begun = 0
        for row in self._reading:
            if row in gone:
                row.prompt = None  # half a prompt's scores are none
        self._reading = [row for row in self._reading if row not in gone]
        order = self._leave(gone)
        index = torch.tensor(order, dtype=torch.long, device=self._engine.device)
        self._logits_BV = self._logits_BV[index]

    def clear(self) -> None:
        """Take all rows out, whatever state a failed call left them in."""
        self._rows, self._lengths, self._numbers = [], [], []
        self._reading, self._begun = [], 0
        self._logits_BV = self._logits_BV[:0]
        self._inputs = None
        self._speculation.drop()

    def load(self, source: Transformer | NewWeights | Any, version: int) -> None:
        """Use these weights: a model (not copied), or `NewWeights` or a checkpoint's folder, whose
        numbers are copied over those in use. Raises ModelError, and then nothing has changed.

        Rows that write go on with the keys and values that they have, and every later token is
        drawn from the new weights. Prompts that are not whole are read anew.
        """
        if isinstance(source, Transformer):
            self._engine.load(source, version)
        else:
            if not isinstance(source, NewWeights):
                source = NewWeights.read(source, self._engine.model)
            source.copy_to(self._engine.model)
            self._engine.version = version
        self._prepare()
        if self._prefix is not None:
            self._prefix.clear()
        self._begun = 0
        for row in self._reading:
            row.cached, row.prompt = 0, None
        for row in self._rows:
            row.versions.append((len(row.ids), version))
        if self._rows:
            last_B = torch.tensor([row.ids[-1] for row in self._rows], device=self._engine.device)
            self._lengths = [length - 1 for length in self._lengths]
            self._inputs = None
            with torch.inference_mode():
                self._feed(last_B, guess=False)

    def _prepare(self) -> None:
        """What a forward pass needs besides the model; again after its weights have changed."""
        model = self._engine.model
        self._packed: PackedModel | None = None
        if self._graph is not None and self._graph.model is not model:
            self._graph = None
        self._no_native = "native code is turned off"
        if self._wants_native:
            try:
                if self._native is not None and self._native.config == model.config:
                    self._native.update(model)
                else:
                    self._native = NativeModel(model)
            except NativeUnavailableError as error:
                self._native, self._no_native = None, str(error)
        if self._native is None and PackedModel.suits(model):
            self._packed = PackedModel(model)
        self._speculation, self._no_guesses = follow(
            self._speculation, self._draft, self._native, model
        )

    def _read(self, most: int) -> int:
        """One pass over the next tokens of prompts; returns how many, `most` at most."""
        pieces = self._pieces(most)
        whole = [piece for piece in pieces if piece.whole]
        read = {_alike(piece.row): piece for piece in whole}
        done = {piece.row for piece in pieces}
        others = [row for row in self._reading if row not in done]
        twins = [row for row in others if read and _alike(row) in read]
        first = len(self._rows)
        longest = max(len(piece.row.request.prompt_ids) for piece in pieces)
        self._fit(first + len(pieces) + len(twins), longest)
        data, slots = self._cache.data, range(first, first + len(pieces))
        for slot, piece in zip(slots, pieces, strict=True):
            if piece.found:
                assert self._prefix is not None
                piece.row.cached = piece.start
                data[:, :, slot, :, : piece.start] = self._prefix.read(piece.found)
        counts = [piece.end - piece.start for piece in pieces]
        ids = [piece.row.request.prompt_ids[piece.start : piece.end] for piece in pieces]
        forward, x_MH = self._run(first, [piece.start for piece in pieces], ids)
        for piece, x_TH in zip(pieces, torch.split(x_MH, counts), strict=True):
            if piece.row.request.prompt_logprobs:
                score_piece(forward.head, piece.row, piece.start, x_TH)
        for slot, piece in zip(slots, pieces, strict=True):
            if self._prefix is not None:
                self._prefix.put(piece.row.request.prompt_ids[: piece.end], data[:, :, slot])
        if whole:
            last = torch.tensor(counts[: len(whole)], device=x_MH.device).cumsum(0) - 1
            self._logits_BV = torch.cat([self._logits_BV, forward.head(x_MH[last])])
        self._begun = 0
        if len(whole) < len(pieces):  # the last piece's row is the next pass's first
            self._begun = pieces[-1].end
            if twins:
                self._cache.move(slots[-1], slots[-1] + len(twins), self._begun)
        for piece, x_TH in zip(whole, torch.split(x_MH, counts)[: len(whole)], strict=True):
            self._take(piece.row)
            self._speculation.begin(piece.row, x_TH, piece.start)
        self._copy([read[_alike(row)].row for row in twins], twins)
        cut = [piece.row for piece in pieces if not piece.whole]
        self._reading = cut + [row for row in others if row not in set(twins)]
        return sum(counts)

    def _pieces(self, most: int) -> list[_Piece]:
        """Prompts to read on in one pass. All of them become whole but perhaps the last. Rows wait
        whose prompt, or whose next block, one of these reads."""
        pieces: list[_Piece] = []
        prompts: set[object] = set()
        blocks: set[Key] = set()
        for row in self._reading:
            prompt, begun = row.request.prompt_ids, 0 if pieces else self._begun
            if most < 1:
                break
            if _alike(row) in prompts:
                continue
            found = self._found(row)
            if begun:
                found = found[: begun // BLOCK]
            key = self._prefix.next_key(prompt, found) if self._prefix is not None else None
            if key in blocks and not row.request.prompt_logprobs:
                continue
            prompts.add(_alike(row))
            if key is not None:
                blocks.add(key)
            start = begun or len(found) * BLOCK
            end = min(start + most, len(prompt))
            pieces.append(_Piece(row, start, end, [] if begun else found))
            most -= end - start
        return pieces

    def _found(self, row: Row) -> list[Key]:
        """Blocks of a row's prompt that need not be run. The last token always is: its logits are
        wanted; and so are all, where the prompt is to be scored."""
        if self._prefix is None or row.request.prompt_logprobs:
            return []
        return self._prefix.find(row.request.prompt_ids[:-1])

    def _run(
        self, first: int, starts: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> tuple[_Forward, Tensor]:
        """Hidden states (M, H) of new tokens of the slots from `first` on, behind the columns that
        each holds, and the forward pass whose `head` they are for."""
        attend = JoinAttend(self._cache, first, starts, [len(new) for new in ids])
        flat = [id for new in ids for id in new]
        forward = self._forward(len(flat))
        ids_M = torch.tensor(flat, device=self._engine.device)
        return forward, forward.run(ids_M, attend.column_M, attend)

    def _copy(self, sources: Sequence[Row], rows: Sequence[Row]) -> None:
        """Rows whose prompts the sources have just read."""
        if not rows:
            return
        slots = [self._rows.index(source) for source in sources]
        self._logits_BV = torch.cat([self._logits_BV, self._logits_BV[slots]])
        for slot, row in zip(slots, rows, strict=True):
            self._cache.move(slot, len(self._rows), self._lengths[slot])
            row.cached, row.prompt = self._lengths[slot], self._rows[slot].prompt
            self._take(row)
            self._speculation.copy(self._rows[slot], row)

    def _take(self, row: Row) -> None:
        """A row whose prompt is whole writes from now on."""
        request = row.request
        row.versions = [(0, self.version)]
        self._rows.append(row)
        self._lengths.append(len(request.prompt_ids))
        self._numbers.append(uniforms(request.seed, request.max_new_tokens).tolist())
        self._inputs = None
        self._speculation.drop()

    def _draw(self) -> tuple[Tensor, list[int], list[float]]:
        """Each row's next token, there and here, and its log-prob; rows that want the likeliest are
        given them."""
        rows, inputs, vocab_size = self._rows, self._current_inputs(), self._logits_BV.shape[1]
        allowed_BV = None
        if inputs.constrained:
            allowed_BV = allowed_ids(rows, vocab_size, self._engine.device)
        sampler, uniform_B = inputs.sampler, inputs.uniform_B()
        free = allowed_BV is None and not sampler.any_filter and not inputs.tops
        if self._native is not None and free:
            id_B, logp_B = self._native.draw(sampler, self._logits_BV, uniform_B)
            return id_B, id_B.tolist(), logp_B.tolist()
        id_B, logp_B, logp_BV = sampler.draw(self._logits_BV, uniform_B, allowed_BV)
        if inputs.tops:
            give_likeliest(rows, logp_BV, inputs.tops)
        # One wait for the device; float64 holds every id.
        ids, logprobs = torch.stack([id_B.double(), logp_B.double()]).tolist()
        return id_B, [int(id) for id in ids], logprobs

    def _draw_guessed(self) -> Tensor:
        """As many tokens a row as guesses stand, and one more; the newest of each."""
        drawn = self._speculation.draw(self._rows)
        self._inputs = None  # made for one token a step
        for slot, (row, ids, logprobs) in enumerate(
            zip(self._rows, drawn.ids, drawn.logprobs, strict=True)
        ):
            for id, logprob in zip(ids, logprobs, strict=True):
                row.add(id, logprob)
            self._lengths[slot] += len(ids) - 1
        return drawn.newest_B

    def _feed(self, id_B: Tensor, *, guess: bool = True) -> None:
        """The rows' latest tokens in, and guesses behind them; logits of their next ones out."""
        longest = max(self._lengths)
        speculation = self._speculation
        if guess and speculation.wants(self._rows):
            context = self._engine.model.config.max_position_embeddings
            self._fit(len(self._rows), min(longest + 1 + speculation.guesses, context))
            self._logits_BV = speculation.feed(self._rows, self._lengths, self._cache)
            self._lengths = [length + 1 for length in self._lengths]
            self._inputs = None
            return
        self._fit(len(self._rows), longest + 1)
        column_B = self._current_inputs().column_B
        if self._graph is not None:
            self._logits_BV = self._graph.step(id_B, column_B)
        else:
            attend = SlotAttend(self._cache, column_B, longest + 1)
            if self._native is not None:
                hidden_BH, self._logits_BV = self._native.hidden_and_logits(id_B, column_B, attend)
                speculation.fed(self._rows, hidden_BH, self._lengths)
            else:
                forward = self._forward(len(id_B))
                self._logits_BV = forward.head(forward.run(id_B, column_B, attend))
        column_B += 1
        self._lengths = [length + 1 for length in self._lengths]

    def _current_inputs(self) -> StepInputs:
        if self._inputs is None:
            self._inputs = StepInputs(
                list(self._rows),
                self._lengths,
                list(self._numbers),
                self._engine.model.config.vocab_size,
                self._engine.device,
            )
        return self._inputs

    def _forward(self, tokens: int) -> _Forward:
        if self._native is not None:
            return self._native
        if self._packed is not None and tokens <= PACKED_TOKENS:
            return self._packed
        return self._engine.model

    def _fit(self, rows: int, columns: int) -> None:
        """Make the cache large enough. Where steps are captured, it is made for all that the rows
        may come to fill: their last columns stay free, and a capture serves them to their ends."""
        used = max(max(self._lengths, default=0), self._begun)
        model, cache = self._engine.model, self._cache
        if self._captures:
            columns = max(columns, self._most_columns())
        kept = len(self._rows) + (self._begun > 0)
        if cache.fit(rows, max(columns, used), kept, used):
            self._graph = None  # it would write where the cache was
        experts = model.config.num_local_experts
        # The trial steps of a capture would write into rings that are in use.
        graphs = not has_windows(model.config) and needs_no_host(
            cache.rows, experts, self._engine.device, model.dtype
        )
        if graphs and self._graph is None:
            self._graph = SlotGraph(model, cache)

    def _most_columns(self) -> int:
        """Columns that the longest row may come to fill."""
        return max((self._most(row.request) for row in (*self._rows, *self._reading)), default=0)

    def _most(self, request: GenRequest) -> int:
        """Columns that a request may come to fill, with guesses that do not stand."""
        most = len(request.prompt_ids) + request.max_new_tokens + self._speculation.guesses
        return min(most, self._engine.model.config.max_position_embeddings)

    def _keep_prefixes(self, ended: Collection[Row]) -> None:
        """Replies too are beginnings of later prompts. Their last token was never fed."""
        if self._prefix is None:
            return
        for slot, row in enumerate(self._rows):
            # Keys of several versions of the weights are no use to a later prompt.
            if row in ended and len(row.versions) == 1:
                ids = [*row.request.prompt_ids, *row.ids][: self._lengths[slot]]
                self._prefix.put(ids, self._cache.data[:, :, slot])

    def _leave(self, gone: Collection[Row]) -> list[int]:
        """Fill the places of these rows from the end; the old place of every row that stays."""
        before = len(self._rows)
        order = list(range(before))
        for slot in reversed(range(before)):
            if self._rows[slot] not in gone:
                continue
            last = len(self._rows) - 1
            if slot != last:
                self._cache.move(last, slot, self._lengths[last])
                self._speculation.move(last, slot)
            self._speculation.drop()
            for items in (self._rows, self._lengths, self._numbers, order):
                _fill(items, slot)
            self._inputs = None
        if self._begun and len(order) < before:
            self._cache.move(before, len(order), self._begun)
        if not self.running and self._graph is None:  # a captured step is worth keeping
            self._cache.clear()
        return order


def _fill(items: list[Any], place: int) -> None:
    """The last item moves to `place`, over what was there."""
    items[place] = items[-1]
    items.pop()


def _alike(row: Row) -> tuple[tuple[int, ...], bool, int]:
    """What rows must have in common to share one reading of their prompt."""
    request = row.request
    return request.prompt_ids, request.prompt_logprobs, request.top_logprobs

"""Guesses at the next tokens, and judging them, in native code (`speculate.c`, `draw.c`).

Same numbers as `TorchDrafter` and `accept` up to rounding. A round is two calls: `propose` runs the
draft module over the newest columns and then on its own output, drawing k guesses; `judge` accepts
or replaces them. Embedding, head and rotary table are those of the model's own native copy.

Shapes: B rows, k guesses, j = k + 1 positions, M tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.errors import ModelError
from model.mtp import MTP
from model.native.build import NativeUnavailableError, load_library
from model.native.panels import Panels
from model.native.step import CHUNK, NativeModel
from model.native.structs import CacheAt, Layer, Tokens, declare, sized
from model.sampling import Sampler
from model.slots import SlotCache
from model.speculative import Accepted, Guesses, Tail, cache_config

_OUTSIDE = "a guess lies outside of the vocabulary, the cache or the context"


class NativeDrafter:
    """One draft module for a model in native code; a `Drafter`. The module's weights are copied.

    Raises NativeUnavailableError, in one line, where there is no native code for this module.
    """

    window = 0

    def __init__(self, native: NativeModel, mtp: MTP) -> None:
        if mtp.count != 1:
            raise NativeUnavailableError(f"{mtp.count} MTP modules; native drafts use one")
        weight = mtp.layers[0].eh_proj
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise NativeUnavailableError("the MTP module is not float32 on a CPU")
        self._native, self._mtp = native, mtp
        self._library = load_library()
        lanes = declare(self._library)
        self._panels = Panels(self._library, lanes)
        self._layers = (Layer * 1)()
        self._model = sized(mtp.config, self._layers)
        config = mtp.config
        self._hidden, self._vocab = config.hidden_size, config.vocab_size
        self._padded = -(-config.vocab_size // (2 * lanes)) * 2 * lanes
        self._cache = SlotCache(cache_config(mtp), torch.device("cpu"), torch.float32)
        self._filled = 0
        self._cache_at = CacheAt(1)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.update()

    def update(self) -> None:
        """Copy the module's weights, and share the model's, as they are now."""
        theirs, module = self._native.structure, self._mtp.layers[0]
        self._panels.begin()
        self._model.embed, self._model.turn = theirs.embed, theirs.turn
        self._model.head = theirs.head
        self._model.norm = self._panels.point(module.norm.weight)
        self._model.enorm = self._panels.point(module.enorm.weight)
        self._model.hnorm = self._panels.point(module.hnorm.weight)
        self._panels.add(self._model.eh, module.eh_proj)
        self._panels.add_block(self._layers[0], module.block)
        self._panels.pack()

    def propose(self, tails: Sequence[Tail], sampler: Sampler, uniform_Bk: Tensor) -> Guesses:
        batch, k = uniform_Bk.shape
        work, uniform_kB = self._work(tails, k), uniform_Bk.t().contiguous()
        if self._library.native_propose(
            *self._over(work.window, work.hidden_XH[2 * batch :]),
            batch,
            k,
            *self._guessing(work, sampler, uniform_kB),
            self._room(max(len(work.window.ids_M), batch)),
        ):
            raise ModelError(_OUTSIDE)
        return work.guesses(self._vocab)

    def feed(
        self,
        tails: Sequence[Tail],
        sampler: Sampler,
        uniform_kB: Tensor,
        cache: SlotCache,
        column_B: Tensor,
    ) -> tuple[Guesses, Tensor, Tensor]:
        """One call."""
        k, batch = uniform_kB.shape
        work = self._work(tails, k)
        hidden_BjH = torch.empty(batch, k + 1, self._hidden)
        policy_MV = torch.empty(batch * (k + 1), self._native.padded_vocab)
        out = self._native.tokens_in(cache, hidden_BjH, policy_MV)
        tokens = max(len(work.window.ids_M), batch * (k + 1))
        need = self._library.native_scratch(
            byref(self._native.structure), batch * (k + 1), cache.columns
        )
        if self._library.native_feed(
            *self._over(work.window, work.hidden_XH[2 * batch :]),
            byref(self._native.structure),
            byref(out),
            cache.rows,
            cache.columns,
            batch,
            k,
            work.window.last_B.data_ptr(),
            column_B.data_ptr(),
            *self._guessing(work, sampler, uniform_kB)[1:],
            self._room(tokens, need),
        ):
            raise ModelError(_OUTSIDE)
        return work.guesses(self._vocab), hidden_BjH, policy_MV[:, : self._vocab]

    def _work(self, tails: Sequence[Tail], k: int) -> _Work:
        """What a call reads and writes; a long first tail is read here but for its end."""
        batch = len(tails)
        most = max(tail.end - tail.first for tail in tails) + k
        rows, filled = self._cache.rows, self._filled
        self._filled = max(filled, most)
        self._cache.fit(max(batch, rows), self._filled, rows, filled)
        if sum(len(tail.hidden_WH) for tail in tails) > CHUNK:
            tails = [self._read(row, tail) for row, tail in enumerate(tails)]
        window = _window(tails)
        return _Work(
            window,
            torch.empty(k, batch, dtype=torch.long),
            torch.empty(k, batch, self._padded),
            torch.empty(2 * batch + len(window.ids_M), self._hidden),
            torch.empty(4 * batch + 4 * batch * (k + 1), dtype=torch.long),
            torch.empty(batch),
        )

    def _over(self, window: _Window, out_MH: Tensor) -> tuple[object, ...]:
        """The module, a window's columns and the cache; hidden states go to `out_MH`."""
        tokens = self._tokens(window, out_MH)
        return byref(self._model), byref(tokens), self._cache.rows, self._cache.columns

    @staticmethod
    def _guessing(work: _Work, sampler: Sampler, uniform_kB: Tensor) -> tuple[int, ...]:
        """Addresses, good as long as the arguments are."""
        return (
            work.window.last_B.data_ptr(),
            sampler.temperature_B1.data_ptr(),
            sampler.greedy_B.data_ptr(),
            uniform_kB.data_ptr(),
            work.id_kB.data_ptr(),
            work.logits_kBV.data_ptr(),
            work.hidden_XH.data_ptr(),
            work.places.data_ptr(),
            work.logp_B.data_ptr(),
        )

    def judge(
        self,
        sampler: Sampler,
        policy_MV: Tensor,
        guesses: Guesses,
        accept_Bk: Tensor,
        final_Bj: Tensor,
    ) -> Accepted:
        """`accept` of model/speculative.py for guesses of `propose`; `policy_MV` are the logits of
        all B·j positions, as `NativeModel` makes them."""
        batch, k = guesses.id_Bk.shape
        vocab = policy_MV.shape[1]
        count_B, next_B = torch.empty(2, batch, dtype=torch.long).unbind(0)
        logp_Bj = torch.zeros(batch, k + 1)
        if policy_MV.stride(1) != 1:
            policy_MV = policy_MV.contiguous()
        draft_kBV = guesses.logits_BkV.transpose(0, 1)
        if draft_kBV.stride(2) != 1 or draft_kBV.stride(0) != batch * draft_kBV.stride(1):
            draft_kBV = draft_kBV.contiguous()
        id_Bk, accept_Bk, final_Bj = (x.contiguous() for x in (guesses.id_Bk, accept_Bk, final_Bj))
        self._library.native_judge(
            batch,
            k,
            vocab,
            policy_MV.stride(0),
            draft_kBV.stride(1),
            policy_MV.data_ptr(),
            draft_kBV.data_ptr(),
            sampler.temperature_B1.data_ptr(),
            sampler.greedy_B.data_ptr(),
            id_Bk.data_ptr(),
            accept_Bk.data_ptr(),
            final_Bj.data_ptr(),
            count_B.data_ptr(),
            next_B.data_ptr(),
            logp_Bj.data_ptr(),
            self._room(0),
        )
        return Accepted(count_B, next_B, logp_Bj)

    def move(self, source: int, target: int) -> None:
        if source < self._cache.rows:  # otherwise nothing was guessed for it yet
            self._cache.move(source, target, self._filled)

    def _read(self, row: int, tail: Tail) -> Tail:
        """Fill a row's columns but the newest, a few at a time; the tail that is left."""
        old = len(tail.hidden_WH) - 1
        for start in range(0, old, CHUNK):
            part = tail.hidden_WH[start : min(start + CHUNK, old)]
            window = _window([replace(tail, hidden_WH=part, start=tail.start + start)])
            window.row_M.fill_(row)
            out_MH = torch.empty_like(part)
            if self._library.native_run(*self._over(window, out_MH), self._room(len(part))):
                raise ModelError(_OUTSIDE)
        return replace(tail, hidden_WH=tail.hidden_WH[old:], start=tail.start + old)

    def _tokens(self, window: _Window, out_MH: Tensor) -> Tokens:
        data = self._cache.data
        _, _, _, heads, columns, size = data.shape
        return Tokens(
            len(window.ids_M),
            heads * columns * size,
            columns * size,
            window.ids_M.data_ptr(),
            window.row_M.data_ptr(),
            window.column_M.data_ptr(),
            window.first_M.data_ptr(),
            window.position_M.data_ptr(),
            *self._cache_at(data),
            out_MH.data_ptr(),
            None,
            window.given_MH.data_ptr(),
        )

    def _room(self, tokens: int, more: int = 0) -> int:
        """Memory for a call with so many tokens, and for drawing and judging."""
        least = 24 * (self._vocab + 128) + 16 * tokens
        size = self._library.native_scratch(byref(self._model), tokens, self._cache.columns)
        size = max(size, least, more)
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch.data_ptr()


@dataclass(frozen=True)
class _Window:
    """Columns whose hidden states `given_MH` are known: ids after them, rows, columns of the cache,
    first columns, positions, and which of them are the rows' newest (B)."""

    ids_M: Tensor
    row_M: Tensor
    column_M: Tensor
    first_M: Tensor
    position_M: Tensor
    last_B: Tensor
    given_MH: Tensor


@dataclass(frozen=True)
class _Work:
    """What a call reads and writes. `hidden_XH` and `places` are work space."""

    window: _Window
    id_kB: Tensor
    logits_kBV: Tensor
    hidden_XH: Tensor
    places: Tensor
    logp_B: Tensor

    def guesses(self, vocab: int) -> Guesses:
        return Guesses(self.id_kB.t(), self.logits_kBV[:, :, :vocab].transpose(0, 1))


def _window(tails: Sequence[Tail]) -> _Window:
    ids: list[int] = []
    rows: list[int] = []
    positions: list[int] = []
    columns: list[int] = []
    last = []
    for row, tail in enumerate(tails):
        end, count = tail.end, len(tail.hidden_WH)
        begin = tail.start + 1 - tail.skipped
        ids += tail.ids[begin : begin + count]
        rows += [row] * count
        positions += range(tail.start, end)
        columns += range(tail.start - tail.first, end - tail.first)
        last.append(len(ids) - 1)
    given_MH = torch.cat([tail.hidden_WH for tail in tails])
    many, zeros = len(ids), [0] * len(ids)
    flat = torch.tensor([*ids, *rows, *columns, *zeros, *positions, *last])
    ids_M, row_M, column_M, first_M, position_M = flat[: 5 * many].view(5, many).unbind(0)
    return _Window(ids_M, row_M, column_M, first_M, position_M, flat[5 * many :], given_MH)

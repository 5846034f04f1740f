"""Guesses at the next tokens, and judging them, in native code (`speculate.c`, `draw.c`).

Same numbers as `TorchDrafter` and `accept` up to rounding. A round is two calls: `propose` runs the
draft module over the newest columns and then on its own output, drawing k guesses; `judge` accepts
or replaces them. Embedding, head and rotary table are those of the model's own native copy.

Shapes: B rows, k guesses, j = k + 1 positions, M tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from dataclasses import replace

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
        most = max(tail.end - tail.first for tail in tails) + k
        rows, filled = self._cache.rows, self._filled
        self._filled = max(filled, most)
        self._cache.fit(max(batch, rows), self._filled, rows, filled)
        if sum(len(tail.hidden_WH) for tail in tails) > CHUNK:
            tails = [self._read(row, tail) for row, tail in enumerate(tails)]
        ids_M, place_4M, given_MH, last_B = _places(tails)
        id_kB = torch.empty(k, batch, dtype=torch.long)
        logits_kBV = torch.empty(k, batch, self._padded)
        work_H = torch.empty(2 * batch + len(ids_M), self._hidden)
        space = torch.empty(4, batch, dtype=torch.long)
        uniform_kB = uniform_Bk.t().contiguous()
        logp_B = torch.empty(batch)
        tokens = self._tokens(ids_M, place_4M, given_MH, work_H[2 * batch :])
        fault = self._library.native_propose(
            byref(self._model),
            byref(tokens),
            self._cache.rows,
            self._cache.columns,
            batch,
            k,
            last_B.data_ptr(),
            sampler.temperature_B1.data_ptr(),
            sampler.greedy_B.data_ptr(),
            uniform_kB.data_ptr(),
            id_kB.data_ptr(),
            logits_kBV.data_ptr(),
            work_H.data_ptr(),
            space.data_ptr(),
            logp_B.data_ptr(),
            self._room(max(len(ids_M), batch)),
        )
        if fault:
            raise ModelError("a guess lies outside of the vocabulary, the cache or the context")
        return Guesses(id_kB.t(), logits_kBV[:, :, : self._vocab].transpose(0, 1))

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
            count = min(CHUNK, old - start)
            part = replace(
                tail, hidden_WH=tail.hidden_WH[start : start + count], start=tail.start + start
            )
            ids_M, place_4M, given_MH, _ = _places([part])
            place_4M[0] = row
            out_MH = torch.empty(count, self._hidden)
            tokens = self._tokens(ids_M, place_4M, given_MH, out_MH)
            if self._library.native_run(
                byref(self._model),
                byref(tokens),
                self._cache.rows,
                self._cache.columns,
                self._room(count),
            ):
                raise ModelError("a column lies outside of the cache or the context")
        return replace(tail, hidden_WH=tail.hidden_WH[old:], start=tail.start + old)

    def _tokens(self, ids_M: Tensor, place_4M: Tensor, given_MH: Tensor, out_MH: Tensor) -> Tokens:
        data = self._cache.data
        _, _, _, heads, columns, size = data.shape
        row_M, column_M, first_M, position_M = place_4M.unbind(0)
        return Tokens(
            len(ids_M),
            heads * columns * size,
            columns * size,
            ids_M.data_ptr(),
            row_M.data_ptr(),
            column_M.data_ptr(),
            first_M.data_ptr(),
            position_M.data_ptr(),
            *self._cache_at(data),
            out_MH.data_ptr(),
            None,
            given_MH.data_ptr(),
        )

    def _room(self, tokens: int) -> int:
        """Memory for a call with so many tokens, and for drawing and judging."""
        least = 24 * (self._vocab + 128) + 16 * tokens
        size = self._library.native_scratch(byref(self._model), tokens, self._cache.columns)
        if len(self._scratch) < max(size, least):
            self._scratch = torch.empty(max(size, least), dtype=torch.uint8)
        return self._scratch.data_ptr()


def _places(tails: Sequence[Tail]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids (M), rows, columns, first columns and positions (4, M), hidden states (M, H) of the
    tails' columns, and which of them are the newest (B)."""
    ids: list[int] = []
    rows: list[int] = []
    positions: list[int] = []
    columns: list[int] = []
    last = []
    for row, tail in enumerate(tails):
        ids += tail.ids[tail.start + 1 : tail.end + 1]
        rows += [row] * len(tail.hidden_WH)
        positions += range(tail.start, tail.end)
        columns += range(tail.start - tail.first, tail.end - tail.first)
        last.append(len(ids) - 1)
    place_4M = torch.tensor([rows, columns, [0] * len(ids), positions])
    given_MH = torch.cat([tail.hidden_WH for tail in tails])
    return torch.tensor(ids), place_4M, given_MH, torch.tensor(last)

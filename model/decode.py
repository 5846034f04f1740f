"""Reading prompts into a key/value cache, and decoding one token a row from it.

Shapes: B rows, P distinct prompts, T prompt columns, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.cache import DecodeAttend, KVCache
from model.moe import float_of
from model.native.step import NativeModel
from model.slots import SlotAttend, SlotCache
from model.transformer import Transformer

PREFILL_TOKENS = 16_384  # at most about this many prompt tokens in one forward pass


class Decoder(Protocol):
    """One token a row, over and over."""

    shrinks: bool  # whether dropping rows makes steps cheaper

    def step(self, id_B: Tensor) -> Tensor:
        """Feed the tokens just drawn; logits (B, V) of the next ones."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        ...


def prefill(
    model: Transformer, prompts: Sequence[tuple[int, ...]], cache: KVCache
) -> tuple[Tensor, Tensor]:
    """Fill a cache's first rows with prompts that all end in the same column.

    Each distinct prompt is run once, right-padded (which needs no mask); its keys and values are
    then moved into every row that has it. Returns the padding on the left (B) and the logits (B, V)
    after each prompt.
    """
    device = model.device
    distinct = sorted(set(prompts), key=lambda ids: (len(ids), ids))
    width = len(distinct[-1])
    wide = float_of(model.dtype)
    logits_BV = torch.empty(len(prompts), model.config.vocab_size, device=device, dtype=wide)
    pad_left_B = torch.tensor([width - len(ids) for ids in prompts], device=device)
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(prompts):
        rows_of.setdefault(ids, []).append(row)
    start = 0
    while start < len(distinct):
        end = start + 1
        while end < len(distinct) and (end + 1 - start) * len(distinct[end]) <= PREFILL_TOKENS:
            end += 1
        part = distinct[start:end]
        pairs = [(row, p) for p, ids in enumerate(part) for row in rows_of[ids]]
        row_b, prompt_b = torch.tensor(pairs, device=device).unbind(1)
        length_P = torch.tensor([len(ids) for ids in part], device=device)
        time = len(part[-1])
        ids_PT = torch.tensor([[*ids, *[0] * (time - len(ids))] for ids in part], device=device)
        own = KVCache(model.config, len(part), time, device, model.dtype, ring=False)
        hidden_PTH = model.hidden(ids_PT, cache=own)
        last_PH = hidden_PTH[torch.arange(len(part), device=device), length_P - 1]
        logits_BV[row_b] = model.head(last_PH).index_select(0, prompt_b)
        # Column c of a row holds its prompt's token c − padding; columns of padding are masked.
        # Rings hold the last tokens, and padding takes no place in them.
        from_bT = torch.arange(width, device=device) - (width - length_P[prompt_b])[:, None]
        for layer, reach in enumerate(cache.reach_L):
            if reach.window is not None:
                from_bS = reach.held(length_P[prompt_b] - 1, cache.keys[layer].shape[2])
            else:
                from_bS = from_bT
            from_bS = from_bS.clamp(0, time - 1)
            for new, old in ((cache.keys, own.keys), (cache.values, own.values)):
                moved = old[layer].transpose(1, 2)[prompt_b[:, None], from_bS]
                new[layer][row_b, :, : from_bS.shape[1]] = moved.transpose(1, 2)
        start = end
    cache.length = width
    return pad_left_B, logits_BV


class EagerDecoder:
    """Runs the model step by step; rows that ended are dropped."""

    shrinks = True

    def __init__(self, model: Transformer, cache: KVCache, pad_left_B: Tensor) -> None:
        self.model, self.cache, self.pad_left_B = model, cache, pad_left_B
        self.mask_B11S = _real_columns(cache, pad_left_B) if bool(pad_left_B.any()) else None

    def step(self, id_B: Tensor) -> Tensor:
        column = self.cache.length
        mask = None if self.mask_B11S is None else self.mask_B11S[:, :, :, : column + 1]
        position_B = column - self.pad_left_B
        attend = DecodeAttend(self.cache, column, column + 1, mask, position_B)
        hidden_BH = self.model.run(id_B, position_B, attend)
        self.cache.length += 1
        return self.model.head(hidden_BH)

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.pad_left_B = self.pad_left_B[rows]
        if self.mask_B11S is not None:
            self.mask_B11S = self.mask_B11S[rows]


class NativeDecoder:
    """Runs native code step by step; rows that ended are dropped."""

    shrinks = True

    def __init__(self, native: NativeModel, cache: KVCache, pad_left_B: Tensor) -> None:
        self.native, self.cache = native, cache
        self.row_M = torch.arange(len(pad_left_B))
        self.first_M: Tensor | None = pad_left_B
        self.column_M = torch.full_like(pad_left_B, cache.length)
        self.position_M = self.column_M - pad_left_B

    def step(self, id_B: Tensor) -> Tensor:
        logits_BV = self.native.logits(id_B, self.position_M, self)
        self.column_M += 1
        self.position_M += 1
        self.cache.length += 1
        return logits_BV

    def keep(self, rows: Tensor) -> None:
        # Rows of the cache stay where they are: nothing is moved.
        assert self.first_M is not None
        self.row_M, self.first_M = self.row_M[rows], self.first_M[rows]
        self.column_M, self.position_M = self.column_M[rows], self.position_M[rows]


class GraphDecoder:
    """A decode step captured as one CUDA graph for a fixed number of rows and columns.

    Every step looks at the whole cache through a mask, and rows that ended go on unseen: at these
    sizes a step costs its launches, not its arithmetic. The weights are read where they are, so
    training in place keeps a graph good.
    """

    shrinks = False

    def __init__(self, model: Transformer, batch: int, columns: int) -> None:
        device = model.device
        self.model = model
        self.cache = KVCache(model.config, batch, columns, device, model.dtype)
        self.id_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.position_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.column_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.real_BS = torch.ones(batch, columns, dtype=torch.bool, device=device)
        self.column_S = torch.arange(columns, device=device)
        self.rows = batch
        self.graph, self.logits_BV = _captured(self._step, device)

    def start(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Read prompts (no more than there are rows); logits after each."""
        self.rows = len(prompts)
        pad_left_B, logits_BV = prefill(self.model, prompts, self.cache)
        self.column_1.fill_(self.cache.length)
        self.position_B.fill_(0)
        self.position_B[: self.rows] = self.cache.length - pad_left_B
        self.real_BS.fill_(True)
        self.real_BS[: self.rows] = self.column_S >= pad_left_B[:, None]
        return logits_BV

    def step(self, id_B: Tensor) -> Tensor:
        self.id_B[: self.rows] = id_B
        self.graph.replay()
        return self.logits_BV[: self.rows]

    def keep(self, rows: Tensor) -> None:
        raise AssertionError("a captured step keeps all its rows")

    def _step(self) -> Tensor:
        seen_BS = self.real_BS & (self.column_S <= self.column_1)
        mask_B11S = torch.zeros_like(seen_BS, dtype=self.model.dtype).masked_fill_(
            ~seen_BS, -torch.inf
        )[:, None, None]
        columns = self.cache.columns
        attend = DecodeAttend(self.cache, self.column_1, columns, mask_B11S, self.position_B)
        logits_BV = self.model.head(self.model.run(self.id_B, self.position_B, attend))
        self.position_B += 1
        self.column_1 += 1
        return logits_BV


class SlotGraph:
    """A decode step over a whole `SlotCache`, captured as one CUDA graph.

    It lasts as long as the cache stays where it is; weights are read where they are. Rows that are
    not fed go on unseen and write into the cache's last column, as the trials before a capture do:
    whoever owns the cache keeps that column free until a row's own last step, which comes first.
    """

    def __init__(self, model: Transformer, cache: SlotCache) -> None:
        device = model.device
        self.model, self.cache = model, cache
        self.id_B = torch.zeros(cache.rows, dtype=torch.long, device=device)
        self.column_B = torch.full_like(self.id_B, cache.columns - 1)
        self._fed = 0
        self.graph, self.logits_BV = _captured(self._step, device)

    def step(self, id_B: Tensor, column_B: Tensor) -> Tensor:
        """Logits (B, V) after one more token of the first B rows; good until the next step."""
        fed = len(id_B)
        self.id_B[:fed] = id_B
        self.column_B[:fed] = column_B
        if fed != self._fed:
            # Where such a row was is now the beginning of a prompt, perhaps.
            self.column_B[fed:] = self.cache.columns - 1
            self._fed = fed
        self.graph.replay()
        return self.logits_BV[: len(id_B)]

    def _step(self) -> Tensor:
        attend = SlotAttend(self.cache, self.column_B, self.cache.columns)
        return self.model.head(self.model.run(self.id_B, self.column_B, attend))


def _captured(
    step: Callable[[], Tensor], device: torch.device
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The step as a CUDA graph, captured after two trials, and the tensor that it writes."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


def _real_columns(cache: KVCache, pad_left_B: Tensor) -> Tensor:
    """0 for columns of text and later, −∞ for padding, added to attention scores (B, 1, 1, S)."""
    column_S = torch.arange(cache.columns, device=pad_left_B.device)
    pad_BS = column_S < pad_left_B[:, None]
    zeros_BS = torch.zeros(pad_BS.shape, device=pad_left_B.device, dtype=cache.keys[0].dtype)
    return zeros_BS.masked_fill_(pad_BS, -torch.inf)[:, None, None]

"""Attention over packs and prefix trees by causal kernels, without a mask (CUDA).

A *segment* is a run of keys that the same later tokens continue: equal `tout`. In pre-order its
queries, itself and all its descendants, are one run that starts at its first key: the own square is
causal, the rest a full rectangle, and nothing has to be gathered. Each is cut into *parts* of sizes
for which cuDNN's kernel has a plan, and remainders for the flash kernel, which is half as fast and
needs none: a plan takes 0.1 s to make, so squares come in 16 sizes an octave, rectangles in powers
of two of queries by 8 numbers of keys an octave, and new lengths meet old plans.

What a token got from several parts is joined by their log-sums; a kernel's backward pass, given the
joined output and log-sum, returns each part's exact gradient.

Shapes: M own tokens, S = C + M tokens with C carried before them, s queries and j keys of a part,
N query and K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model import segment_kernels

HALF = (torch.bfloat16, torch.float16)
LEAST = 1024  # queries and keys of a part for cuDNN
MOST_QUERIES = 65_536
# Costs, measured on one H100 and in pairs of flex attention: of a pair, of a part, of a query of a
# part, and of a query of a part that is joined to others.
PLANNED_PAIR, FLASH_PAIR = 0.56, 1.0
PART_COST, QUERY_COST, JOIN_COST = 1_500_000, 100, 400


@dataclass(frozen=True)
class Segment:
    """Keys [begin, end) of the S tokens, seen by the own ones among [begin, until)."""

    begin: int
    end: int
    until: int


@dataclass(frozen=True)
class Part:
    """One kernel call: own tokens `queries` by keys `keys` of the S tokens. causal: the last query
    sees all keys, each one before it one less. joins: its queries have parts before this one."""

    queries: slice
    keys: slice
    causal: bool
    joins: bool
    planned: bool

    @property
    def sizes(self) -> tuple[int, int]:
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def pairs(self) -> int:
        queries, keys = self.sizes
        return queries * keys - (queries * (queries - 1) // 2 if self.causal else 0)

    @property
    def cost(self) -> float:
        pair = PLANNED_PAIR if self.planned else FLASH_PAIR
        query = JOIN_COST if self.joins else QUERY_COST
        return pair * self.pairs + PART_COST + query * self.sizes[0]


class Kernel(Protocol):
    """Softmax attention of (1, N, s, D) over (1, K, j, D), with log-sums (N, s) in float32 or
    wider, by the rule of a `Part`."""

    def forward(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, part: Part, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v by an output and log-sums over more keys than these."""
        ...


def suits(q_MND: Tensor) -> bool:
    """If the kernels take these and are the fastest known there (Hopper and later)."""
    return (
        q_MND.is_cuda
        and q_MND.dtype in HALF
        and q_MND.shape[2] % 8 == 0
        and q_MND.shape[2] <= 128
        and torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        and torch.cuda.get_device_capability(q_MND.device)[0] >= 9
    )


def find_segments(tout_S: Tensor, carried: int = 0) -> list[Segment]:
    """All segments that some own token sees, in order."""
    tout_s = tout_S.cpu()
    turn_s = torch.ones(len(tout_s), dtype=torch.bool)
    turn_s[1:] = tout_s[1:] != tout_s[:-1]
    if 0 < carried < len(tout_s):
        turn_s[carried] = True
    begins = turn_s.nonzero()[:, 0]
    ends = [*begins[1:].tolist(), len(tout_s)]
    found = zip(begins.tolist(), ends, tout_s[begins].tolist(), strict=True)
    return [Segment(*places) for places in found if places[2] > carried]


def parts_of(segments: Sequence[Segment], carried: int = 0) -> list[Part]:
    """The kernel calls of segments in order; the own tokens are those from `carried` on."""
    parts: list[Part] = []
    covered = 0  # own tokens before this place have a part: intervals nest
    for segment in segments:
        begin, end, until = (max(0, x - carried) for x in _places(segment))
        joins = begin < covered
        keys = slice(segment.begin, segment.end)
        if segment.begin >= carried:
            parts += _square(begin, end, keys, joins)
        parts += _rectangle(end, until, keys, joins)
        covered = max(covered, until)
    return parts


def _places(segment: Segment) -> tuple[int, int, int]:
    return segment.begin, segment.end, segment.until


def _square(begin: int, end: int, keys: slice, joins: bool) -> Iterator[Part]:
    """Queries that are the keys themselves."""
    planned = _floor(end - begin, 16)
    if planned:
        first = slice(keys.start, keys.start + planned)
        yield Part(slice(begin, begin + planned), first, True, joins, planned=True)
    if begin + planned < end:
        yield Part(slice(begin + planned, end), keys, True, joins, planned=False)


def _rectangle(begin: int, end: int, keys: slice, joins: bool) -> Iterator[Part]:
    """Queries that see all keys: in powers of two, the keys that have no plan joined to them."""
    planned = _floor(keys.stop - keys.start, 8)
    split = keys.start + planned
    at = begin
    while planned and (size := _floor(min(end - at, MOST_QUERIES), 1)):
        yield Part(slice(at, at + size), slice(keys.start, split), False, joins, planned=True)
        at += size
    if begin < at and split < keys.stop:
        yield Part(slice(begin, at), slice(split, keys.stop), False, joins=True, planned=False)
    if at < end:
        yield Part(slice(at, end), keys, False, joins, planned=False)


def _floor(size: int, steps: int) -> int:
    """The greatest planned size up to this one, of so many an octave; 0: none."""
    if size < LEAST:
        return 0
    step = max(1, (1 << (size.bit_length() - 1)) // steps)
    return size // step * step


class PartChoice:
    """The parts of one piece where they suit its tensors and take less than flex attention, else
    None; found once."""

    def __init__(self, tout_S: Tensor, carried: int = 0) -> None:
        self.tout_S, self.carried = tout_S, carried
        self._parts: list[Part] | None = None
        self._pays: bool | None = None

    def __call__(self, q_MND: Tensor) -> list[Part] | None:
        if not suits(q_MND):
            return None
        if self._pays is None:
            self._parts = parts_of(find_segments(self.tout_S, self.carried), self.carried)
            self._pays = pays(self._parts)
        return self._parts if self._pays else None


def pays(parts: Sequence[Part]) -> bool:
    """If these take less than flex attention."""
    return sum(part.cost for part in parts) < sum(part.pairs for part in parts)


def segment_attention(
    q_MND: Tensor, k_SKD: Tensor, v_SKD: Tensor, parts: Sequence[Part], kernel: Kernel | None = None
) -> Tensor:
    """Softmax attention of the last M of S tokens, each over itself and its ancestors (M, N, D)."""
    out: Tensor = _SegmentAttention.apply(  # type: ignore[no-untyped-call]
        q_MND, k_SKD, v_SKD, parts, kernel or segment_kernels.TorchKernel()
    )
    return out


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_MND: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        parts: Sequence[Part],
        kernel: Kernel,
    ) -> Tensor:
        wide = torch.promote_types(q_MND.dtype, torch.float32)
        out_MND = torch.empty_like(q_MND)
        lse_NM = torch.empty(q_MND.shape[1], len(q_MND), dtype=wide, device=q_MND.device)
        for part in parts:
            q, k, v = (_first(x) for x in _taken(part, (q_MND,), (k_SKD, v_SKD)))
            found, lse_Ns = kernel.forward(part, q, k, v)
            out_sND, found_sND = out_MND[part.queries], found[0].transpose(0, 1)
            if part.joins:
                segment_kernels.join(out_sND, lse_NM[:, part.queries], found_sND, lse_Ns)
            else:
                out_sND.copy_(found_sND)
                lse_NM[:, part.queries] = lse_Ns
        ctx.save_for_backward(q_MND, k_SKD, v_SKD, out_MND, lse_NM)
        ctx.parts, ctx.kernel = parts, kernel
        return out_MND

    @staticmethod
    def backward(ctx: Any, grad_MND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_MND, k_SKD, v_SKD, out_MND, lse_NM = ctx.saved_tensors
        grad_q_MND = torch.empty_like(q_MND)
        wide = lse_NM.dtype  # a key's gradient is the sum of many parts
        grad_k_SKD, grad_v_SKD = (torch.zeros_like(x, dtype=wide) for x in (k_SKD, v_SKD))
        for part in ctx.parts:
            q, out, grad, k, v = (
                _first(x) for x in _taken(part, (q_MND, out_MND, grad_MND), (k_SKD, v_SKD))
            )
            lse_Ns = lse_NM[:, part.queries].contiguous()
            dq, dk, dv = ctx.kernel.backward(part, grad, q, k, v, out, lse_Ns)
            if part.joins:
                grad_q_MND[part.queries] += dq[0].transpose(0, 1)
            else:
                grad_q_MND[part.queries] = dq[0].transpose(0, 1)
            grad_k_SKD[part.keys] += dk[0].transpose(0, 1)
            grad_v_SKD[part.keys] += dv[0].transpose(0, 1)
        return grad_q_MND, grad_k_SKD.to(k_SKD.dtype), grad_v_SKD.to(v_SKD.dtype), None, None


def _taken(part: Part, own: Sequence[Tensor], keys: Sequence[Tensor]) -> Iterator[Tensor]:
    yield from (x[part.queries] for x in own)
    yield from (x[part.keys] for x in keys)


def _first(x_sND: Tensor) -> Tensor:
    """(1, N, s, D), as the kernels take it."""
    return x_sND.transpose(0, 1)[None]

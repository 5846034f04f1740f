"""The kernels of `parts.py`: torch's cuDNN and flash attention, and the joining of two parts.

Shapes: s queries and j keys of a part, R queries and G keys of all rows, N query and K key heads, D
head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.parts import Part, Row
from model.upload import upload

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

_aten = torch.ops.aten
_TOKENS = 16  # of a program

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Places:
    """Rows as tensors: which own tokens and which keys, row after row, and where rows end."""

    query_R: Tensor
    key_G: Tensor
    ends_q: Tensor
    ends_k: Tensor
    most: tuple[int, int]

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Places:
        query_R = torch.cat([torch.arange(row.begin, row.end) for row in rows])
        key_G = torch.cat([torch.arange(*run) for row in rows for run in row.runs])
        sizes = [row.sizes for row in rows]
        ends_q, ends_k = (
            torch.tensor([0, *accumulate(x)], dtype=torch.int32) for x in zip(*sizes, strict=True)
        )
        most = max(q for q, _ in sizes), max(k for _, k in sizes)
        query_R, key_G, ends_q, ends_k = (
            upload(x, device) for x in (query_R, key_G, ends_q, ends_k)
        )
        return cls(query_R, key_G, ends_q, ends_k, most)


class Kernel(Protocol):
    """Softmax attention of queries (s, N, D) over keys (j, K, D), with log-sums (N, s) in float32
    or wider, by the rule of a `Part`, padding included, or of rows. Backward: gradients of q, k
    and v by an output and log-sums over more keys than these."""

    def part(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...

    def part_backward(
        self, part: Part, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Grads: ...

    def rows(self, rows: Places, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...

    def rows_backward(
        self, rows: Places, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Grads: ...


class TorchKernel:
    """In float16 and bfloat16: cuDNN where a part is planned, else flash attention, whose causal
    rule for fewer queries than keys is a row's."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[Tensor, Tensor]] = {}  # of a dropout that is not used

    def part(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = _first(q), _first(k), _first(v)
        if part.planned:
            found = _aten._scaled_dot_product_cudnn_attention(
                *(q, k, v, None, True, 0.0, part.causal)
            )
        else:
            found = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, part.causal)
        self._states["planned" if part.planned else "flash"] = found[6], found[7]
        return found[0][0].transpose(0, 1), found[1].view(q.shape[1], q.shape[2])

    def part_backward(
        self, part: Part, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Grads:
        grad, q, k, v, out = (_first(x) for x in (grad, q, k, v, out))
        sizes = q.shape[2], k.shape[2]
        if part.planned:
            found = _aten._scaled_dot_product_cudnn_attention_backward(
                *(grad, q, k, v, out, lse.view(1, *lse.shape, 1), *self._states["planned"]),
                *(None, None, None, *sizes, 0.0, part.causal),
            )
        else:
            found = _aten._scaled_dot_product_flash_attention_backward(
                *(grad, q, k, v, out, lse[None], None, None, *sizes, 0.0, part.causal),
                *self._states["flash"],
            )
        dq, dk, dv = (x[0].transpose(0, 1) for x in found)
        return dq, dk, dv

    def rows(self, rows: Places, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse_NR, *state, _ = _aten._flash_attention_forward(
            *(q, k, v, rows.ends_q, rows.ends_k, *rows.most, 0.0, True, False)
        )
        self._states["rows"] = state[0], state[1]
        return out, lse_NR.view(q.shape[1], len(q))

    def rows_backward(
        self, rows: Places, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Grads:
        dq, dk, dv = _aten._flash_attention_backward(
            *(grad, q, k, v, out, lse, rows.ends_q, rows.ends_k, *rows.most, 0.0, True),
            *self._states["rows"],
        )
        return dq, dk, dv


def longer(x_sND: Tensor, padding: int) -> Tensor:
    """With so many zeros behind."""
    return F.pad(x_sND, (0, 0, 0, 0, 0, padding)) if padding else x_sND


def _first(x_sND: Tensor) -> Tensor:
    """(1, N, s, D), as most kernels take it."""
    return x_sND.transpose(0, 1)[None]


def join(out_sND: Tensor, lse_Ns: Tensor, more_sND: Tensor, more_lse_Ns: Tensor) -> None:
    """Make `out` and its log-sums, in place, those of one softmax over both parts' keys."""
    if triton is not None and out_sND.is_cuda:
        tokens, heads, size = out_sND.shape
        _join[(triton.cdiv(tokens, _TOKENS), heads)](
            *(out_sND, lse_Ns, more_sND, more_lse_Ns),
            *(*out_sND.stride()[:2], *lse_Ns.stride(), *more_sND.stride()[:2]),
            *more_lse_Ns.stride(),
            tokens,
            size,
            _TOKENS,
            triton.next_power_of_2(size),
        )
        return
    both_Ns = torch.logaddexp(lse_Ns, more_lse_Ns)
    old_sN1, more_sN1 = ((x - both_Ns).exp().t()[..., None] for x in (lse_Ns, more_lse_Ns))
    out_sND.copy_(out_sND * old_sN1 + more_sND * more_sN1)
    lse_Ns.copy_(both_Ns)


if triton is not None:

    @triton.jit
    def _join(
        out_ptr,
        lse_ptr,
        more_ptr,
        more_lse_ptr,
        out_s,
        out_n,
        lse_n,
        lse_s,
        more_s,
        more_n,
        more_lse_n,
        more_lse_s,
        tokens,
        size,
        TOKENS: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        head = tl.program_id(1).to(tl.int64)
        column = tl.arange(0, SIZE)
        there = token < tokens
        inside = there[:, None] & (column < size)[None, :]
        lse_at = lse_ptr + head * lse_n + token * lse_s
        out_at = out_ptr + head * out_n + token[:, None] * out_s + column[None, :]
        more_at = more_ptr + head * more_n + token[:, None] * more_s + column[None, :]
        a = tl.load(lse_at, mask=there)
        b = tl.load(more_lse_ptr + head * more_lse_n + token * more_lse_s, mask=there)
        most = tl.maximum(a, b)
        a_part, b_part = tl.exp(a - most), tl.exp(b - most)
        total = a_part + b_part
        out = tl.load(out_at, mask=inside).to(tl.float32) * (a_part / total)[:, None]
        out += tl.load(more_at, mask=inside).to(tl.float32) * (b_part / total)[:, None]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(lse_at, most + tl.log(total), mask=there)

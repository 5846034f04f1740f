"""Queries and keys normed and turned in one pass (Triton, CUDA): what `Attention` does between its
two products, without the dozen intermediate tensors.

Numbers are those of `attention.rms_norm` and `attention.rotate`, rounded once instead of after
every operation. Sums over tokens (the norms' gradients) are taken in a fixed order.

Shapes: M tokens, A = (N + 2·K)·D columns of queries, keys and values, D head size, R rotary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

# Rows are dealt out to this many programs, each of which sums its rows' share of a norm's gradient.
_PROGRAMS = 1056


def suits(qkv_MA: Tensor) -> bool:
    """Whether the fused pass can be used for these projections."""
    return triton is not None and qkv_MA.is_cuda and qkv_MA.dtype != torch.float64


def norm_rotate(
    qkv_MA: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_Mr: Tensor,
    sin_Mr: Tensor,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (M, N·D) and keys (M, K·D), normed over all heads and turned, and values (M, K·D).

    cos_Mr, sin_Mr: float32 (M, R/2), each token's angles.
    """
    out: tuple[Tensor, Tensor, Tensor] = _NormRotate.apply(
        qkv_MA, q_weight, k_weight, cos_Mr, sin_Mr, head_dim, eps
    )
    return out


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_MA: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos_Mr: Tensor,
        sin_Mr: Tensor,
        head_dim: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv_MA, cos_Mr, sin_Mr = qkv_MA.contiguous(), cos_Mr.contiguous(), sin_Mr.contiguous()
        queries, keys = len(q_weight), len(k_weight)
        ctx.head_dim, ctx.eps = head_dim, eps
        ctx.save_for_backward(qkv_MA, q_weight, k_weight, cos_Mr, sin_Mr)
        q = qkv_MA.new_empty(len(qkv_MA), queries)
        k = qkv_MA.new_empty(len(qkv_MA), keys)
        for out, weight, start in ((q, q_weight, 0), (k, k_weight, queries)):
            if len(qkv_MA):
                _forward[(len(qkv_MA),)](
                    qkv_MA,
                    weight,
                    cos_Mr,
                    sin_Mr,
                    out,
                    eps,
                    start,
                    qkv_MA.shape[1],
                    len(weight),
                    head_dim,
                    cos_Mr.shape[1],
                    BLOCK=triton.next_power_of_2(len(weight)),
                    num_warps=_warps(len(weight)),
                )
        return q, k, qkv_MA[:, queries + keys :].contiguous()

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        qkv_MA, q_weight, k_weight, cos_Mr, sin_Mr = ctx.saved_tensors
        queries, keys = len(q_weight), len(k_weight)
        grad_MA = torch.empty_like(qkv_MA)
        grad_MA[:, queries + keys :] = grad_v
        weights = []
        for grad, weight, start in ((grad_q, q_weight, 0), (grad_k, k_weight, queries)):
            programs = min(_PROGRAMS, max(1, len(qkv_MA)))
            part = torch.empty(programs, len(weight), device=grad.device, dtype=torch.float32)
            _backward[(programs,)](
                qkv_MA,
                weight,
                cos_Mr,
                sin_Mr,
                grad.contiguous(),
                grad_MA,
                part,
                ctx.eps,
                len(qkv_MA),
                programs,
                triton.cdiv(len(qkv_MA), programs),
                start,
                qkv_MA.shape[1],
                len(weight),
                ctx.head_dim,
                cos_Mr.shape[1],
                BLOCK=triton.next_power_of_2(len(weight)),
                num_warps=_warps(len(weight)),
            )
            weights.append(part.sum(0).to(weight.dtype))
        return grad_MA, weights[0], weights[1], None, None, None, None


def _warps(columns: int) -> int:
    return 8 if columns > 1024 else 4


if triton is not None:

    @triton.jit
    def _turn(column, D, half):
        """Of each column: its angle's index, its partner, the partner's sign, whether it turns."""
        at = column % D
        first = at < half
        turns = at < 2 * half
        index = tl.where(first, at, at - half)
        partner = tl.where(first, column + half, column - half)
        sign = tl.where(first, -1.0, 1.0)
        return tl.where(turns, index, 0), tl.where(turns, partner, column), sign, turns

    @triton.jit
    def _forward(
        x_ptr,
        w_ptr,
        cos_ptr,
        sin_ptr,
        out_ptr,
        eps,
        start,
        A,
        C,
        D,
        half,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        real = column < C
        index, partner, sign, turns = _turn(column, D, half)
        x_ptr += row * A + start
        x = tl.load(x_ptr + column, mask=real, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x) / C + eps)
        y = x * rstd * tl.load(w_ptr + column, mask=real, other=0.0).to(tl.float32)
        other = tl.load(x_ptr + partner, mask=real & turns, other=0.0).to(tl.float32)
        other *= rstd * tl.load(w_ptr + partner, mask=real & turns, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + row * half + index, mask=real & turns, other=1.0)
        sin = tl.load(sin_ptr + row * half + index, mask=real & turns, other=0.0)
        y = y * cos + sign * other * sin
        tl.store(out_ptr + row * C + column, y.to(out_ptr.dtype.element_ty), mask=real)

    @triton.jit
    def _backward(
        x_ptr,
        w_ptr,
        cos_ptr,
        sin_ptr,
        grad_ptr,
        out_ptr,
        part_ptr,
        eps,
        rows,
        programs,
        rounds,
        start,
        A,
        C,
        D,
        half,
        BLOCK: tl.constexpr,
    ):
        column = tl.arange(0, BLOCK)
        real = column < C
        index, partner, sign, turns = _turn(column, D, half)
        w = tl.load(w_ptr + column, mask=real, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for turn in range(rounds):
            row = tl.program_id(0).to(tl.int64) + turn * programs
            here = real & (row < rows)
            pair = here & turns
            x = tl.load(x_ptr + row * A + start + column, mask=here, other=0.0).to(tl.float32)
            rstd = 1.0 / tl.sqrt(tl.sum(x * x) / C + eps)
            g = tl.load(grad_ptr + row * C + column, mask=here, other=0.0).to(tl.float32)
            h = tl.load(grad_ptr + row * C + partner, mask=pair, other=0.0).to(tl.float32)
            cos = tl.load(cos_ptr + row * half + index, mask=pair, other=1.0)
            sin = tl.load(sin_ptr + row * half + index, mask=pair, other=0.0)
            g = g * cos - sign * h * sin
            total += g * x * rstd
            g *= w
            dx = rstd * (g - x * (rstd * rstd * tl.sum(g * x) / C))
            tl.store(out_ptr + row * A + start + column, dx.to(out_ptr.dtype.element_ty), mask=here)
        tl.store(part_ptr + tl.program_id(0) * C + column, total, mask=real)

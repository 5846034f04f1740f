"""Log-probabilities of given tokens from bfloat16 hidden states, on a GPU.

Logits are products of bfloat16 numbers summed and kept in float32, which is the product in float32
of the same numbers. They are made for a piece of the tokens at a time and, where there are several
pieces, made again in the backward pass; the vocabulary's softmax is one pass over each (Triton).

Shapes: n tokens, H hidden size, V vocabulary.
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

_BLOCK = 4096


def suits(x_nH: Tensor, lm_head_VH: Tensor) -> bool:
    """Whether `head_scores` can be used: bfloat16 weights on a GPU."""
    return triton is not None and x_nH.is_cuda and x_nH.dtype == lm_head_VH.dtype == torch.bfloat16


def head_scores(
    x_nH: Tensor, lm_head_VH: Tensor, target_n: Tensor, scale_n: Tensor, piece: int
) -> tuple[Tensor, Tensor]:
    """log softmax(head(x) / scale)[target] and, without gradient, the entropy; float32 (n).

    piece: how many tokens' logits exist at once.
    """
    out: tuple[Tensor, Tensor] = _HeadScores.apply(x_nH, lm_head_VH, target_n, scale_n, piece)
    return out


class _HeadScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_nH: Tensor,
        lm_head_VH: Tensor,
        target_n: Tensor,
        scale_n: Tensor,
        piece: int,
    ) -> tuple[Tensor, Tensor]:
        inverse_n = scale_n.float().reciprocal().contiguous()
        logp_n, entropy_n, lse_n = (torch.empty_like(inverse_n) for _ in range(3))
        kept = None
        for at in range(0, len(x_nH), piece):
            here = slice(at, at + piece)
            kept = wide_product(x_nH[here], lm_head_VH.t())
            _softmax[(len(kept),)](
                kept,
                target_n[here],
                inverse_n[here],
                logp_n[here],
                entropy_n[here],
                lse_n[here],
                kept.shape[1],
                BLOCK=_BLOCK,
                num_warps=8,
            )
        ctx.piece = piece
        if len(x_nH) > piece:
            kept = None
        ctx.save_for_backward(x_nH, lm_head_VH, target_n, inverse_n, lse_n, kept)
        ctx.mark_non_differentiable(entropy_n)
        return logp_n, entropy_n

    @staticmethod
    def backward(ctx: Any, grad_n: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_nH, lm_head_VH, target_n, inverse_n, lse_n, kept = ctx.saved_tensors
        grad_n = grad_n.contiguous()
        grad_x_nH = torch.empty_like(x_nH)
        grad_head_VH = torch.zeros_like(lm_head_VH, dtype=torch.float32)
        for at in range(0, len(x_nH), ctx.piece):
            here = slice(at, at + ctx.piece)
            logits = wide_product(x_nH[here], lm_head_VH.t()) if kept is None else kept
            grad_logits = torch.empty_like(logits, dtype=torch.bfloat16)
            _softmax_grad[(len(logits), triton.cdiv(logits.shape[1], _BLOCK))](
                logits,
                target_n[here],
                inverse_n[here],
                lse_n[here],
                grad_n[here],
                grad_logits,
                logits.shape[1],
                BLOCK=_BLOCK,
                num_warps=8,
            )
            torch.mm(grad_logits, lm_head_VH, out=grad_x_nH[here])
            grad_head_VH += wide_product(grad_logits.t(), x_nH[here])
        return grad_x_nH, grad_head_VH.to(lm_head_VH.dtype), None, None, None


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bfloat16 matrices, kept in float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


if triton is not None:

    @triton.jit
    def _softmax(
        logits_ptr,
        target_ptr,
        inverse_ptr,
        logp_ptr,
        entropy_ptr,
        lse_ptr,
        V,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        inverse = tl.load(inverse_ptr + row)
        logits_ptr += row * V
        top = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
        mass = tl.zeros((BLOCK,), dtype=tl.float32)
        moment = tl.zeros((BLOCK,), dtype=tl.float32)  # Σ exp(z − top) · z
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < V
            z = tl.load(logits_ptr + column, mask=real, other=0.0) * inverse
            new = tl.where(real, tl.maximum(top, z), top)
            shrink = tl.where(top == -float("inf"), 0.0, tl.exp(top - new))
            e = tl.where(real, tl.exp(z - new), 0.0)
            mass = mass * shrink + e
            moment = moment * shrink + e * z
            top = new
        highest = tl.max(top)
        shrink = tl.where(top == -float("inf"), 0.0, tl.exp(top - highest))
        total = tl.sum(mass * shrink)
        lse = highest + tl.log(total)
        target = tl.load(target_ptr + row)
        tl.store(logp_ptr + row, tl.load(logits_ptr + target) * inverse - lse)
        tl.store(entropy_ptr + row, lse - tl.sum(moment * shrink) / total)
        tl.store(lse_ptr + row, lse)

    @triton.jit
    def _softmax_grad(
        logits_ptr,
        target_ptr,
        inverse_ptr,
        lse_ptr,
        grad_ptr,
        out_ptr,
        V,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        inverse = tl.load(inverse_ptr + row)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        real = column < V
        z = tl.load(logits_ptr + row * V + column, mask=real, other=0.0) * inverse
        p = tl.exp(z - tl.load(lse_ptr + row))
        hit = tl.where(column == tl.load(target_ptr + row), 1.0, 0.0)
        grad = tl.load(grad_ptr + row) * inverse * (hit - p)
        tl.store(out_ptr + row * V + column, grad.to(out_ptr.dtype.element_ty), mask=real)

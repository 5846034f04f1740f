"""One expert after the other, each with all its tokens: what a CPU does fastest.

An expert's rows, weights and gradients stay in the processor's cache from its first product to its
last. Short types are multiplied in float32, which CPUs do faster than their own; sums over a
token's experts are in float32 too.

Shapes: M tokens, k experts a token, P = M·k pairs sorted by expert, r rows of one expert, C the
most of them, H hidden size, I expert width, O = 2·I.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.native.memory import prefer_large_pages

_LARGE = 8 << 20  # bytes


def each_experts(
    x_MH: Tensor, weights_Mk: Tensor, experts_Mk: Tensor, w13_EOH: Tensor, w2_EIH: Tensor
) -> Tensor:
    """Σ_j weight_j · expert_j(x); the host reads the routing."""
    out: Tensor = _Each.apply(  # type: ignore[no-untyped-call]
        x_MH, weights_Mk, experts_Mk, w13_EOH, w2_EIH
    )
    return out


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MH: Tensor,
        weights_Mk: Tensor,
        experts_Mk: Tensor,
        w13_EOH: Tensor,
        w2_EIH: Tensor,
    ) -> Tensor:
        top_k, wide = experts_Mk.shape[1], _wide(x_MH)
        sorted_P, order_P = experts_Mk.flatten().sort(stable=True)
        counts = torch.bincount(sorted_P, minlength=len(w13_EOH)).tolist()
        source_P = order_P.div(top_k, rounding_mode="floor")
        weight_P1 = weights_Mk.flatten().index_select(0, order_P)[:, None].to(wide)
        up_PO = _on_large_pages(x_MH.new_empty(len(order_P), w13_EOH.shape[1]))
        out_MH = torch.zeros_like(x_MH, dtype=wide)
        w13_OH, w2_IH = _room(w13_EOH, wide), _room(w2_EIH, wide)
        x_CH = x_MH.new_empty(max(counts), x_MH.shape[1])
        for e, rows in _groups(counts):
            x_rH = _rows_of(x_MH, source_P[rows], x_CH, wide)
            up_rO = up_PO[rows] if w13_OH is None else x_rH.new_empty(len(x_rH), up_PO.shape[1])
            torch.mm(x_rH, _widened(w13_EOH[e], w13_OH).t(), out=up_rO)
            gate_rI, value_rI = up_rO.chunk(2, dim=-1)
            h_rI = F.silu(gate_rI).mul_(value_rI).mul_(weight_P1[rows])
            out_MH.index_add_(0, source_P[rows], torch.mm(h_rI, _widened(w2_EIH[e], w2_IH)))
            if w13_OH is not None:
                up_PO[rows] = up_rO
        ctx.save_for_backward(x_MH, weight_P1, order_P, source_P, up_PO, w13_EOH, w2_EIH)
        ctx.counts, ctx.weights = counts, (weights_Mk.shape, weights_Mk.dtype)
        return out_MH.to(x_MH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, ...]:
        x_MH, weight_P1, order_P, source_P, up_PO, w13_EOH, w2_EIH = ctx.saved_tensors
        wide, (shape, kind) = _wide(x_MH), ctx.weights
        needs_x, needs_weights, _, needs_w13, needs_w2 = ctx.needs_input_grad
        grad_w13_EOH = _gradient_of(w13_EOH, ctx.counts) if needs_w13 else None
        grad_w2_EIH = _gradient_of(w2_EIH, ctx.counts) if needs_w2 else None
        grad_x_MH = torch.zeros_like(x_MH, dtype=wide) if needs_x else None
        grad_weight_P = torch.empty_like(weight_P1[:, 0])
        w13_OH, w2_IH = _room(w13_EOH, wide), _room(w2_EIH, wide)
        x_CH = x_MH.new_empty(max(ctx.counts), x_MH.shape[1])
        for e, rows in _groups(ctx.counts):
            source_r, weight_r1 = source_P[rows], weight_P1[rows]
            gate_rI, value_rI = up_PO[rows].to(wide).chunk(2, dim=-1)
            grad_rH = _rows_of(grad_MH, source_r, x_CH, wide)
            grad_rI = torch.mm(grad_rH, _widened(w2_EIH[e], w2_IH).t())
            silu_rI = F.silu(gate_rI)
            h_rI = silu_rI * value_rI
            torch.sum(h_rI * grad_rI, dim=-1, out=grad_weight_P[rows])
            grad_rI.mul_(weight_r1)
            if grad_w2_EIH is not None:
                _product(h_rI.mul_(weight_r1).t(), grad_rH, grad_w2_EIH[e], w2_IH)
            grad_up_rO = grad_rI.new_empty(len(grad_rI), 2 * grad_rI.shape[1])
            grad_gate_rI, grad_value_rI = grad_up_rO.chunk(2, dim=-1)
            torch.mul(silu_rI, grad_rI, out=grad_value_rI)
            inner_rI = grad_rI.mul_(value_rI)
            torch.ops.aten.silu_backward(inner_rI, gate_rI, grad_input=grad_gate_rI)
            if grad_x_MH is not None:
                grad_x_rH = torch.mm(grad_up_rO, _widened(w13_EOH[e], w13_OH))
                grad_x_MH.index_add_(0, source_r, grad_x_rH)
            if grad_w13_EOH is not None:
                x_rH = _rows_of(x_MH, source_r, x_CH, wide)
                _product(grad_up_rO.t(), x_rH, grad_w13_EOH[e], w13_OH)
        grad_weights_Mk = None
        if needs_weights:
            flat_P = torch.empty_like(grad_weight_P).index_copy_(0, order_P, grad_weight_P)
            grad_weights_Mk = flat_P.view(shape).to(kind)
        if grad_x_MH is not None:
            grad_x_MH = grad_x_MH.to(x_MH.dtype)
        return grad_x_MH, grad_weights_Mk, None, grad_w13_EOH, grad_w2_EIH


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows_of(x_MH: Tensor, source_r: Tensor, x_CH: Tensor, wide: torch.dtype) -> Tensor:
    """Some tokens, in the type of the products. `x_CH` is memory for them, used over and over."""
    return torch.index_select(x_MH, 0, source_r, out=x_CH[: len(source_r)]).to(wide)


def _room(w_EAB: Tensor, wide: torch.dtype) -> Tensor | None:
    """Memory for one expert's weights in the type of the products, if it is another."""
    return None if w_EAB.dtype == wide else torch.empty_like(w_EAB[0], dtype=wide)


def _widened(w_AB: Tensor, room_AB: Tensor | None) -> Tensor:
    return w_AB if room_AB is None else room_AB.copy_(w_AB)


def _product(a: Tensor, b: Tensor, out: Tensor, room: Tensor | None) -> None:
    torch.mm(a, b, out=out if room is None else room)
    if room is not None:
        out.copy_(room)


def _gradient_of(w_EAB: Tensor, counts: list[int]) -> Tensor:
    """A gradient in the strides of its weight, zero for experts without tokens."""
    grad_EAB = _on_large_pages(torch.empty_like(w_EAB))
    for e, count in enumerate(counts):
        if not count:
            grad_EAB[e].zero_()
    return grad_EAB


def _on_large_pages(fresh: Tensor) -> Tensor:
    """A tensor that nothing was written to yet. Were it large and on small pages, getting them from
    the system one by one would take longer than writing it."""
    if fresh.nbytes >= _LARGE:
        prefer_large_pages(fresh)
    return fresh


def _groups(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any."""
    out, start = [], 0
    for e, count in enumerate(counts):
        if count:
            out.append((e, slice(start, start + count)))
        start += count
    return out

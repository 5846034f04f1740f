"""One layer's experts computed together, in the ways that suit devices and types.

Shapes: M tokens, k experts a token, P = M·k pairs, E experts, C rows an expert is padded to,
R rows that the experts see (P, or E·C when padded), H hidden size, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.experts_each import each_experts
from model.experts_fused import can_fuse, fused_experts

# Up to this many tokens × experts, computing every expert for every token is cheap on a GPU, and it
# needs no look at the routing by the host: the one way that a CUDA graph can hold in float32.
DENSE_LIMIT = 4096
# On a CPU, with fewer multiplications than this for each expert in one of its products, calls cost
# more than arithmetic, and one grouped product is better than a loop (measured: benchmarks.moe).
CALLS_LIMIT = 6e6
# Padding is given up for a loop when it would make the products this much larger than needed.
PADDING_LIMIT = 3.0


Kind = Literal["padded", "grouped"]


def run_experts(
    x_MH: Tensor, weights_Mk: Tensor, experts_Mk: Tensor, w13_EOH: Tensor, w2_EIH: Tensor
) -> Tensor:
    """Σ_j weight_j · w2(silu(w1 x) · (w3 x)) over the chosen experts, by the fastest way here.

    Weights may be float32 whatever the type of the rest.
    """
    inputs = x_MH, weights_Mk, experts_Mk, w13_EOH, w2_EIH
    if not x_MH.is_cuda:
        work = experts_Mk.numel() * w2_EIH[0].numel() / len(w2_EIH)
        if x_MH.dtype == torch.float32 and work < CALLS_LIMIT and _has_grouped_product(w2_EIH):
            return sorted_experts(*inputs, "grouped")
        return each_experts(*inputs)
    if not torch.is_grad_enabled() and len(x_MH) * len(w13_EOH) <= DENSE_LIMIT:
        return dense_experts(*inputs)
    if can_fuse(x_MH, w2_EIH):
        return fused_experts(*inputs)
    grouped = x_MH.dtype == torch.bfloat16 and _has_grouped_product(w2_EIH)
    return sorted_experts(*inputs, "grouped" if grouped else "padded")


def _has_grouped_product(w2_EIH: Tensor) -> bool:
    """Whether torch's grouped product takes these sizes: rows in multiples of 16 bytes."""
    return all(n * w2_EIH.itemsize % 16 == 0 for n in w2_EIH.shape[1:])


def loop_experts(
    x_MH: Tensor, weights_Mk: Tensor, experts_Mk: Tensor, w13_EOH: Tensor, w2_EIH: Tensor
) -> Tensor:
    """The definition, one expert after the other: the fast ways are tested against it."""
    out_MH = torch.zeros_like(x_MH)
    for expert, (w13_OH, w2_IH) in enumerate(zip(w13_EOH, w2_EIH, strict=True)):
        token, slot = (experts_Mk == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_MH[token], w13_OH).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w2_IH
        weighted = y * weights_Mk[token, slot, None]
        out_MH = out_MH.index_add(0, token, weighted.to(x_MH.dtype))
    return out_MH


def dense_experts(
    x_MH: Tensor, weights_Mk: Tensor, experts_Mk: Tensor, w13_EOH: Tensor, w2_EIH: Tensor
) -> Tensor:
    """Every expert for every token, weighted by zero where not chosen: two large products."""
    count, width, hidden = w2_EIH.shape
    weights_ME = x_MH.new_zeros(len(x_MH), count)
    weights_ME = weights_ME.scatter(1, experts_Mk, weights_Mk.to(x_MH.dtype))
    up_MO = F.linear(x_MH, w13_EOH.flatten(0, 1))
    gate_MEI, up_MEI = up_MO.view(-1, count, 2, width).unbind(2)
    h_MEI = F.silu(gate_MEI) * up_MEI * weights_ME[:, :, None]
    return torch.mm(h_MEI.flatten(1), w2_EIH.view(count * width, hidden))


@dataclass(frozen=True)
class _Rows:
    """How pairs are laid out in rows sorted by expert.

    `source_R` is the token in each row (any token in rows of padding), `slot_P` the row of each
    pair, `ends_E` where each expert's rows end (grouped), `capacity` the rows given to each
    (padded).
    """

    source_R: Tensor
    slot_P: Tensor
    top_k: int
    ends_E: Tensor | None = None
    capacity: int = 0


def _sort_rows(experts_Mk: Tensor, count: int, kind: Kind) -> _Rows | None:
    """None where the routing is too uneven for padding."""
    pairs, top_k = experts_Mk.numel(), experts_Mk.shape[1]
    sorted_P, order_P = experts_Mk.flatten().sort(stable=True)
    every_E = torch.arange(count, device=sorted_P.device)
    place_P = torch.arange(pairs, device=sorted_P.device)
    source_P = order_P.div(top_k, rounding_mode="floor")
    ends_E = torch.searchsorted(sorted_P, every_E, right=True)
    if kind == "grouped":
        slot_P = torch.empty_like(order_P).index_copy_(0, order_P, place_P)
        return _Rows(source_P, slot_P, top_k, ends_E=ends_E.to(torch.int32))
    capacity = int(ends_E.diff(prepend=ends_E.new_zeros(1)).max())
    if capacity * count > PADDING_LIMIT * max(pairs, count):
        return None
    # Row of the i-th sorted pair = i + the padding in front of its expert's rows.
    shift_E = every_E * capacity - F.pad(ends_E[:-1], (1, 0))
    row_P = place_P + shift_E.index_select(0, sorted_P)
    slot_P = torch.empty_like(order_P).index_copy_(0, order_P, row_P)
    source_R = order_P.new_zeros(count * capacity).index_copy_(0, row_P, source_P)
    return _Rows(source_R, slot_P, top_k, capacity=capacity)


def sorted_experts(
    x_MH: Tensor,
    weights_Mk: Tensor,
    experts_Mk: Tensor,
    w13_EOH: Tensor,
    w2_EIH: Tensor,
    kind: Kind,
) -> Tensor:
    """Gather tokens by expert, multiply group by group, gather back.

    `kind`: "padded" (batched products over equal groups; falls back to one expert after the other
    where the routing is too uneven) or "grouped" (torch's grouped product, which keeps the group
    sizes on the device). The routing weight is applied before the down product: rows of padding
    then have weight zero and can hold any token, in the backward pass too.
    """
    rows = _sort_rows(experts_Mk, len(w13_EOH), kind)
    if rows is None:
        return each_experts(x_MH, weights_Mk, experts_Mk, w13_EOH, w2_EIH)
    weights_Mk = weights_Mk.to(x_MH.dtype)
    x_RH = _Dispatch.apply(x_MH, rows)  # type: ignore[no-untyped-call]
    weight_R = weights_Mk.new_zeros(len(x_RH)).index_copy(0, rows.slot_P, weights_Mk.flatten())
    up_RO = _group_product(x_RH, w13_EOH.transpose(1, 2), rows)
    h_RI = _SwiGLU.apply(up_RO, weight_R)  # type: ignore[no-untyped-call]
    y_RH = _group_product(h_RI, w2_EIH, rows)
    out_MH: Tensor = _Combine.apply(y_RH, rows)  # type: ignore[no-untyped-call]
    return out_MH


def _group_product(x_RA: Tensor, w_EAB: Tensor, rows: _Rows) -> Tensor:
    if rows.ends_E is not None:
        return F.grouped_mm(x_RA, w_EAB, offs=rows.ends_E)
    return torch.bmm(x_RA.view(len(w_EAB), rows.capacity, -1), w_EAB).flatten(0, 1)


def _spread(x_MH: Tensor, rows: _Rows) -> Tensor:
    return x_MH.index_select(0, rows.source_R)


def _gather_sum(y_RH: Tensor, rows: _Rows) -> Tensor:
    return y_RH.index_select(0, rows.slot_P).view(-1, rows.top_k, y_RH.shape[1]).sum(1)


class _Dispatch(torch.autograd.Function):
    """Rows from tokens. Its gradient is `_Combine`'s forward: gathers only, so deterministic."""

    @staticmethod
    def forward(ctx: Any, x_MH: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return _spread(x_MH, rows)

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        return _gather_sum(grad_RH, ctx.rows), None


class _Combine(torch.autograd.Function):
    """Tokens from weighted rows: the transpose of `_Dispatch`."""

    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return _gather_sum(y_RH, rows)

    @staticmethod
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, None]:
        # Rows of padding get a stray gradient here; their weight of zero stops it in `_SwiGLU`.
        return _spread(grad_MH, ctx.rows), None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up · weight, row by row, keeping only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, up_RO: Tensor, weight_R: Tensor) -> Tensor:
        ctx.save_for_backward(up_RO, weight_R)
        gate_RI, value_RI = up_RO.chunk(2, dim=-1)
        return F.silu(gate_RI).mul_(value_RI).mul_(weight_R[:, None])

    @staticmethod
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, Tensor]:
        up_RO, weight_R = ctx.saved_tensors
        gate_RI, value_RI = up_RO.chunk(2, dim=-1)
        silu_RI = F.silu(gate_RI)
        grad_up_RO = torch.empty_like(up_RO)
        grad_gate_RI, grad_value_RI = grad_up_RO.chunk(2, dim=-1)
        torch.mul(silu_RI, grad_RI, out=grad_value_RI)
        grad_weight_R = (grad_value_RI * value_RI).sum(-1)
        grad_value_RI.mul_(weight_R[:, None])
        inner_RI = (grad_RI * value_RI).mul_(weight_R[:, None])
        grad_gate_RI.copy_(torch.ops.aten.silu_backward(inner_RI, gate_RI))
        return grad_up_RO, grad_weight_R

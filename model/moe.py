"""Mixture of experts: sigmoid router, and one layer's experts computed together.

Shapes: M tokens, k experts a token, P = M·k pairs, E experts, C rows an expert is padded to,
R rows that the experts see (P, or E·C when padded), H hidden size, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

# Up to this many tokens × experts, computing every expert for every token is cheap on a GPU, and it
# needs no look at the routing by the host: the one way that a CUDA graph can hold in float32.
DENSE_LIMIT = 4096
# Padding is given up for a loop when it would make the products this much larger than needed.
PADDING_LIMIT = 3.0


Kind = Literal["loop", "padded", "grouped"]


def float_of(dtype: torch.dtype) -> torch.dtype:
    """float32 for the short types, else the type itself (so float64 stays exact)."""
    return torch.promote_types(dtype, torch.float32)


class MoE(nn.Module):
    """One layer's experts and their router; parameters are stacked over experts.

    `w13_EOH` (E, 2·I, H) holds w1 (gate) above w3 (up); `w2_EIH` (E, I, H) is w2 transposed, so
    that all experts' down products are also one matrix (E·I, H). `gate_EH` and
    `e_score_correction_bias` stay float32 in every model. The bias is a buffer: it steers only the
    choice of experts, so no gradient reaches it; `balance` moves it.
    """

    load_E: Tensor | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.top_k = config.num_experts_per_tok
        self.gate_EH = nn.Parameter(torch.empty(experts, hidden))
        self.w13_EOH = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.w2_EIH = nn.Parameter(torch.empty(experts, width, hidden))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def route(self, x_MH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (M, k), summing to one, and expert ids (M, k) of each token.

        The bias enters the choice only; the weights are the chosen experts' own scores.
        """
        wide = float_of(x_MH.dtype)
        scores_ME = torch.sigmoid(F.linear(x_MH.to(wide), self.gate_EH.to(wide)))
        with torch.no_grad():
            ranked_ME = scores_ME + self.e_score_correction_bias
            experts_Mk = ranked_ME.topk(self.top_k, dim=-1, sorted=False).indices
        weights_Mk = scores_ME.gather(1, experts_Mk)
        return weights_Mk / weights_Mk.sum(-1, keepdim=True), experts_Mk

    def forward(self, x_MH: Tensor) -> Tensor:
        weights_Mk, experts_Mk = self.route(x_MH)
        if self.load_E is not None:
            self.load_E += torch.bincount(experts_Mk.flatten(), minlength=len(self.load_E))
        return run_experts(x_MH, weights_Mk.to(x_MH.dtype), experts_Mk, self.w13_EOH, self.w2_EIH)

    def track_load(self, on: bool) -> None:
        """Count, from now on, how many tokens each expert gets (for `balance`)."""
        device = self.gate_EH.device
        self.load_E = (
            torch.zeros(len(self.gate_EH), device=device, dtype=torch.long) if on else None
        )

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Move the bias by ± `rate` towards even load, and start counting anew.

        Auxiliary-loss-free balancing (Wang et al. 2024), which the M2 report cites (§2.2.1).
        """
        if self.load_E is not None:
            load_E = self.load_E.float()
            self.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)
            self.load_E.zero_()


def needs_no_host(tokens: int, experts: int, device: torch.device, dtype: torch.dtype) -> bool:
    """True where `run_experts` without gradients never waits for the device, as graphs need it."""
    return device.type == "cuda" and (tokens * experts <= DENSE_LIMIT or dtype == torch.bfloat16)


def run_experts(
    x_MH: Tensor, weights_Mk: Tensor, experts_Mk: Tensor, w13_EOH: Tensor, w2_EIH: Tensor
) -> Tensor:
    """Σ_j weight_j · w2(silu(w1 x) · (w3 x)) over the chosen experts, by the fastest way here."""
    if x_MH.is_cuda and len(x_MH) * len(w13_EOH) <= DENSE_LIMIT and not torch.is_grad_enabled():
        return dense_experts(x_MH, weights_Mk, experts_Mk, w13_EOH, w2_EIH)
    kind: Kind = "padded" if x_MH.is_cuda else "loop"
    if _has_grouped_product(x_MH.device, x_MH.dtype, w2_EIH):
        kind = "grouped"
    return sorted_experts(x_MH, weights_Mk, experts_Mk, w13_EOH, w2_EIH, kind)


def _has_grouped_product(device: torch.device, dtype: torch.dtype, w2_EIH: Tensor) -> bool:
    """Whether torch has a kernel: bfloat16, on a CPU float32 too, rows in multiples of 16 bytes."""
    if dtype != torch.bfloat16 and (dtype != torch.float32 or device.type != "cpu"):
        return False
    return all(size * dtype.itemsize % 16 == 0 for size in w2_EIH.shape[1:])


def loop_experts(
    x_MH: Tensor, weights_Mk: Tensor, experts_Mk: Tensor, w13_EOH: Tensor, w2_EIH: Tensor
) -> Tensor:
    """The definition, one expert after the other: the fast ways are tested against it."""
    out_MH = torch.zeros_like(x_MH)
    for expert, (w13_OH, w2_IH) in enumerate(zip(w13_EOH, w2_EIH, strict=True)):
        token, slot = (experts_Mk == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_MH[token], w13_OH).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w2_IH
        out_MH = out_MH.index_add(0, token, y * weights_Mk[token, slot, None])
    return out_MH


def dense_experts(
    x_MH: Tensor, weights_Mk: Tensor, experts_Mk: Tensor, w13_EOH: Tensor, w2_EIH: Tensor
) -> Tensor:
    """Every expert for every token, weighted by zero where not chosen: two large products."""
    count, width, hidden = w2_EIH.shape
    weights_ME = x_MH.new_zeros(len(x_MH), count).scatter_(1, experts_Mk, weights_Mk)
    up_MO = F.linear(x_MH, w13_EOH.flatten(0, 1))
    gate_MEI, up_MEI = up_MO.view(-1, count, 2, width).unbind(2)
    h_MEI = F.silu(gate_MEI) * up_MEI * weights_ME[:, :, None]
    return torch.mm(h_MEI.flatten(1), w2_EIH.view(count * width, hidden))


@dataclass(frozen=True)
class _Rows:
    """How pairs are laid out in rows sorted by expert.

    `source_R` is the token in each row (any token in rows of padding), `slot_P` the row of each
    pair, `counts` the rows of each expert (loop), `ends_E` where they end (grouped), and `capacity`
    the rows given to each (padded).
    """

    source_R: Tensor
    slot_P: Tensor
    top_k: int
    counts: tuple[int, ...] = ()
    ends_E: Tensor | None = None
    capacity: int = 0


def _sort_rows(experts_Mk: Tensor, count: int, kind: Kind) -> _Rows:
    pairs, top_k = experts_Mk.numel(), experts_Mk.shape[1]
    sorted_P, order_P = experts_Mk.flatten().sort(stable=True)
    every_E = torch.arange(count, device=sorted_P.device)
    place_P = torch.arange(pairs, device=sorted_P.device)
    source_P = order_P.div(top_k, rounding_mode="floor")
    ends_E = torch.searchsorted(sorted_P, every_E, right=True)
    if kind == "grouped":
        slot_P = torch.empty_like(order_P).index_copy_(0, order_P, place_P)
        return _Rows(source_P, slot_P, top_k, ends_E=ends_E.to(torch.int32))
    ends = ends_E.tolist()
    counts = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    capacity = max(counts)
    if kind == "loop" or capacity * count > PADDING_LIMIT * max(pairs, count):
        slot_P = torch.empty_like(order_P).index_copy_(0, order_P, place_P)
        return _Rows(source_P, slot_P, top_k, counts=counts)
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

    `kind`: "padded" (batched products over equal groups; falls back to "loop" where the routing is
    too uneven), "loop" (one product an expert) or "grouped" (torch's grouped product, which keeps
    the group sizes on the device). The routing weight is applied before the down product: rows of
    padding then have weight zero and can hold any token, in the backward pass too.
    """
    rows = _sort_rows(experts_Mk, len(w13_EOH), kind)
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
    if rows.counts:
        out: Tensor = _LoopProduct.apply(x_RA, w_EAB, rows.counts)  # type: ignore[no-untyped-call]
        return out
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


class _LoopProduct(torch.autograd.Function):
    """x[group e] @ w[e] for rows sorted by group; `counts` are the groups' sizes, zeros allowed."""

    @staticmethod
    def forward(ctx: Any, x_RA: Tensor, w_EAB: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_RA, w_EAB)
        ctx.counts = counts
        out_RB = x_RA.new_empty(len(x_RA), w_EAB.shape[2])
        for e, x, out in _groups(counts, x_RA, out_RB):
            torch.mm(x, w_EAB[e], out=out)
        return out_RB

    @staticmethod
    def backward(ctx: Any, grad_RB: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RA, w_EAB = ctx.saved_tensors
        grad_x_RA = torch.empty_like(x_RA)
        grad_w_EAB = torch.zeros_like(w_EAB)  # keeps w's strides, so the optimiser sees no copy
        for e, grad, out in _groups(ctx.counts, grad_RB, grad_x_RA):
            torch.mm(grad, w_EAB[e].t(), out=out)
        for e, x, grad in _groups(ctx.counts, x_RA, grad_RB):
            torch.mm(x.t(), grad, out=grad_w_EAB[e])
        return grad_x_RA, grad_w_EAB, None


def _groups(counts: tuple[int, ...], a: Tensor, b: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, rows of a, rows of b) for each expert that has any."""
    parts = zip(torch.split(a, list(counts)), torch.split(b, list(counts)), strict=True)
    return [(e, x, y) for e, (x, y) in enumerate(parts) if len(x)]

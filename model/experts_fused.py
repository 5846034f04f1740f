"""One layer's experts on a GPU: torch's grouped products and, between them, Triton kernels.

Forward: sort the pairs by expert, gather, product, SwiGLU × weight, product, combine. Backward: the
same with four products; rows of SwiGLU, and of tokens where these are large, are made again instead
of kept. The host never waits for the device, so a CUDA graph can hold it, and results repeat bit by
bit.

Shapes: M tokens, k experts a token, P = M·k pairs, R = P rows sorted by expert, E experts, N blocks
of pairs, H hidden size, I expert width, O = 2·I.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SORT_BLOCK = 256  # pairs that one program ranks against each other
KEPT_BYTES = 1 << 30  # rows of tokens up to this size are kept for the backward pass


@dataclass(frozen=True)
class Tile:
    """What one program of a memory-bound kernel holds at most, and its warps."""

    elements: int
    columns: int
    warps: int

    def of(self, width: int) -> tuple[int, int]:
        """Rows and columns of a tile of a matrix of this width."""
        columns = width & -width  # the largest power of two in it: then no lane is idle
        if columns < 128:
            columns = _power_of_two(width)
        columns = min(columns, self.columns)
        return max(self.elements // columns, 1), columns


# Swept on one H100 over the layer of the released model; docs/experts.md.
GATHER = Tile(1024, 256, 4)
COMBINE = Tile(1024, 1024, 8)
SWIGLU = Tile(512, 512, 4)
SWIGLU_BACKWARD = Tile(1024, 512, 8)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_fuse(x_MH: Tensor, w2_EIH: Tensor) -> bool:
    """Whether the kernels and torch's grouped product take these: bfloat16 on a CUDA device from
    compute capability 8.0 on, rows in multiples of 16 bytes, and Triton installed."""
    return (
        x_MH.is_cuda
        and x_MH.dtype == torch.bfloat16
        and len(x_MH) > 0
        and all(size % 8 == 0 for size in w2_EIH.shape[1:])
        and _has_triton()
        and torch.cuda.get_device_capability(x_MH.device) >= (8, 0)
    )


def fused_experts(
    x_MH: Tensor, weights_Mk: Tensor, experts_Mk: Tensor, w13_EOH: Tensor, w2_EIH: Tensor
) -> Tensor:
    """Σ_j weight_j · expert_j(x). Weights may be of another type than x, best float32."""
    with torch.cuda.device_of(x_MH):  # type: ignore[no-untyped-call]
        out: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
            x_MH, weights_Mk, experts_Mk, w13_EOH, w2_EIH
        )
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MH: Tensor,
        weights_Mk: Tensor,
        experts_Mk: Tensor,
        w13_EOH: Tensor,
        w2_EIH: Tensor,
    ) -> Tensor:
        x_MH, weights_Mk = x_MH.contiguous(), weights_Mk.contiguous()
        rows = sort_pairs(experts_Mk, len(w13_EOH))
        x_RH = gather(x_MH, rows)
        up_RO = F.grouped_mm(x_RH, w13_EOH.transpose(1, 2), offs=rows.ends_E)
        kept_RH = x_RH if x_RH.nbytes <= KEPT_BYTES else None
        h_RI = swiglu(up_RO, weights_Mk, rows)
        y_RH = F.grouped_mm(h_RI, w2_EIH, offs=rows.ends_E)
        ctx.save_for_backward(
            x_MH, weights_Mk, rows.pair_R, rows.slot_P, rows.ends_E, kept_RH, up_RO, w13_EOH, w2_EIH
        )
        return combine(y_RH, rows)

    @staticmethod
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, ...]:
        x_MH, weights_Mk, pair_R, slot_P, ends_E, x_RH, up_RO, w13_EOH, w2_EIH = ctx.saved_tensors
        rows = Rows(pair_R, slot_P, ends_E, weights_Mk.shape[1])
        needs_x, _, _, needs_w13, needs_w2 = ctx.needs_input_grad
        grad_x_MH = grad_w13_EOH = grad_w2_EIH = None
        grad_RH = gather(grad_MH.contiguous(), rows)
        grad_RI = F.grouped_mm(grad_RH, w2_EIH.transpose(1, 2), offs=ends_E)
        grad_up_RO, grad_weights_Mk, h_RI = swiglu_backward(up_RO, weights_Mk, rows, grad_RI)
        if needs_w2:
            grad_w2_EIH = F.grouped_mm(h_RI.t(), grad_RH, offs=ends_E)
        del grad_RH, grad_RI, h_RI
        if needs_w13:
            x_RH = gather(x_MH, rows) if x_RH is None else x_RH
            grad_w13_EOH = F.grouped_mm(grad_up_RO.t(), x_RH, offs=ends_E)
        if needs_x:
            grad_x_MH = combine(F.grouped_mm(grad_up_RO, w13_EOH, offs=ends_E), rows)
        return grad_x_MH, grad_weights_Mk, None, grad_w13_EOH, grad_w2_EIH


@dataclass(frozen=True)
class Rows:
    """Where pairs lie, sorted by expert: the pair in each row, the row of each pair (int32), where
    each expert's rows end (int32), and how many pairs a token has."""

    pair_R: Tensor
    slot_P: Tensor
    ends_E: Tensor
    top_k: int


def sort_pairs(experts_Mk: Tensor, count: int) -> Rows:
    """A stable counting sort of the pairs by expert."""
    from model.moe_kernels import count_kernel, place_kernel

    experts_P = experts_Mk.contiguous()
    pairs = experts_P.numel()
    blocks = -(-pairs // SORT_BLOCK)
    slot_P = torch.empty(pairs, dtype=torch.int32, device=experts_P.device)
    pair_R, ends_E = torch.empty_like(slot_P), slot_P.new_empty(count)
    counts_EN = slot_P.new_empty(count, blocks)
    sizes = {"BLOCK": SORT_BLOCK, "CHUNK": min(64, _power_of_two(count))}
    count_kernel[(blocks,)](experts_P, counts_EN, pairs, blocks, count, **sizes)
    upto_EN = counts_EN.flatten().cumsum(0, dtype=torch.int32)
    place_kernel[(blocks,)](
        experts_P, upto_EN, slot_P, pair_R, ends_E, pairs, blocks, count, **sizes
    )
    return Rows(pair_R, slot_P, ends_E, experts_Mk.shape[1])


def gather(x_MH: Tensor, rows: Rows) -> Tensor:
    """(R, H) each row's token."""
    from model.moe_kernels import gather_kernel

    count, hidden = len(rows.pair_R), x_MH.shape[1]
    out_RH = x_MH.new_empty(count, hidden)
    tall, wide = GATHER.of(hidden)
    grid = (-(-count // tall), -(-hidden // wide))
    sizes = {"TOP_K": rows.top_k, "ROWS": tall, "COLS": wide}
    gather_kernel[grid](x_MH, rows.pair_R, out_RH, count, hidden, **sizes, num_warps=GATHER.warps)
    return out_RH


def combine(y_RH: Tensor, rows: Rows) -> Tensor:
    """(M, H) the sum of each token's rows."""
    from model.moe_kernels import combine_kernel

    tokens, hidden = len(rows.slot_P) // rows.top_k, y_RH.shape[1]
    out_MH = y_RH.new_empty(tokens, hidden)
    tall, wide = COMBINE.of(hidden)
    grid = (-(-tokens // tall), -(-hidden // wide))
    sizes = {"TOP_K": rows.top_k, "TOKENS": tall, "COLS": wide}
    combine_kernel[grid](
        y_RH, rows.slot_P, out_MH, tokens, hidden, **sizes, num_warps=COMBINE.warps
    )
    return out_MH


def swiglu(up_RO: Tensor, weights_Mk: Tensor, rows: Rows) -> Tensor:
    """(R, I) silu(gate) · value · weight."""
    from model.moe_kernels import swiglu_kernel

    count, width = len(up_RO), up_RO.shape[1] // 2
    h_RI = up_RO.new_empty(count, width)
    tall, wide = SWIGLU.of(width)
    grid = (-(-count // tall), -(-width // wide))
    sizes = {"ROWS": tall, "COLS": wide}
    swiglu_kernel[grid](
        up_RO, weights_Mk, rows.pair_R, h_RI, count, width, **sizes, num_warps=SWIGLU.warps
    )
    return h_RI


def swiglu_backward(
    up_RO: Tensor, weights_Mk: Tensor, rows: Rows, grad_RI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of up (R, O) and of the weights (M, k), and h (R, I) as `swiglu` gave it."""
    from model.moe_kernels import swiglu_backward_kernel

    count, width = grad_RI.shape
    grad_up_RO, h_RI = torch.empty_like(up_RO), torch.empty_like(grad_RI)
    grad_weights_Mk = torch.empty_like(weights_Mk)
    tall, wide = SWIGLU_BACKWARD.of(width)
    sizes = {"ROWS": tall, "COLS": wide}
    swiglu_backward_kernel[(-(-count // tall),)](
        up_RO,
        weights_Mk,
        rows.pair_R,
        grad_RI,
        grad_up_RO,
        grad_weights_Mk,
        h_RI,
        count,
        width,
        **sizes,
        num_warps=SWIGLU_BACKWARD.warps,
    )
    return grad_up_RO, grad_weights_Mk, h_RI


def _power_of_two(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(size - 1, 0).bit_length()

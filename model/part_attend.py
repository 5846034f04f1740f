"""Attention by the squares, rows and rectangles of `parts.py`.

What a token got from several parts is joined by their log-sums; a kernel's backward pass, given the
joined output and log-sum, returns each part's exact gradient.

Shapes: M own tokens, S = C + M tokens with C carried before them, R queries and G keys of all rows,
N query and K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.part_kernels import Kernel, Places, TorchKernel, join, longer
from model.parts import Division, Part, divide
from model.strands import Strand, find_strands

HALF = (torch.bfloat16, torch.float16)


class PartAttend:
    """Attention of the last M of S tokens, of these depths in pre-order, where the kernels suit and
    take less than flex attention, else None. One object serves one piece. `strands`: if they are
    known; to find them here waits for the device."""

    def __init__(
        self, depth_S: Tensor, carried: int = 0, strands: Sequence[Strand] | None = None
    ) -> None:
        self.depth_S, self.carried, self._found = depth_S, carried, strands

    def __call__(self, q_MND: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor | None:
        if not suits(q_MND) or self._division is None:
            return None
        return divided_attention(q_MND, k_SKD, v_SKD, self._division, self._places)

    @cached_property
    def strands(self) -> Sequence[Strand]:
        return self._found if self._found is not None else find_strands(self.depth_S, self.carried)

    @cached_property
    def _division(self) -> Division | None:
        return divide(self.strands, self.carried)

    @cached_property
    def _places(self) -> Places | None:
        rows = self._division.rows if self._division is not None else ()
        return Places.of(rows, self.depth_S.device) if rows else None


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


def divided_attention(
    q_MND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    division: Division,
    places: Places | None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Softmax attention of the last M of S tokens, each over itself and its ancestors (M, N, D).
    `places`: of the division's rows, if it has any."""
    out: Tensor = _PartAttention.apply(  # type: ignore[no-untyped-call]
        q_MND, k_SKD, v_SKD, division, places, kernel or TorchKernel()
    )
    return out


class _PartAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_MND: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        division: Division,
        places: Places | None,
        kernel: Kernel,
    ) -> Tensor:
        wide = torch.promote_types(q_MND.dtype, torch.float32)
        out_MND = torch.empty_like(q_MND)
        lse_NM = torch.empty(q_MND.shape[1], len(q_MND), dtype=wide, device=q_MND.device)
        for part in division.squares:
            at, tokens = part.queries, part.sizes[0]
            out, lse = kernel.part(part, *_values(part, (q_MND,), (k_SKD, v_SKD)))
            out_MND[at], lse_NM[:, at] = out[:tokens], lse[:, :tokens]
        if places is not None:
            q_RND = q_MND.index_select(0, places.query_R)
            k_GKD, v_GKD = (x.index_select(0, places.key_G) for x in (k_SKD, v_SKD))
            found_RND, lse_NR = kernel.rows(places, q_RND, k_GKD, v_GKD)
            out_MND.index_copy_(0, places.query_R, found_RND)
            lse_NM.index_copy_(1, places.query_R, lse_NR)
        for part in division.rectangles:
            at = part.queries
            found = kernel.part(part, *_values(part, (q_MND,), (k_SKD, v_SKD)))
            join(out_MND[at], lse_NM[:, at], *found)
        ctx.save_for_backward(q_MND, k_SKD, v_SKD, out_MND, lse_NM)
        ctx.division, ctx.places, ctx.kernel = division, places, kernel
        return out_MND

    @staticmethod
    def backward(ctx: Any, grad_MND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q_MND, k_SKD, v_SKD, out_MND, lse_NM = ctx.saved_tensors
        places: Places | None = ctx.places
        grad_q_MND = torch.empty_like(q_MND)
        wide = lse_NM.dtype  # a key's gradient is the sum of many parts
        grad_k_SKD, grad_v_SKD = (torch.zeros_like(x, dtype=wide) for x in (k_SKD, v_SKD))
        if places is not None:
            grad, q, out = (x.index_select(0, places.query_R) for x in (grad_MND, q_MND, out_MND))
            k, v = (x.index_select(0, places.key_G) for x in (k_SKD, v_SKD))
            lse_NR = lse_NM.index_select(1, places.query_R)
            dq, dk, dv = ctx.kernel.rows_backward(places, grad, q, k, v, out, lse_NR)
            grad_q_MND.index_copy_(0, places.query_R, dq)
            grad_k_SKD.index_add_(0, places.key_G, dk.to(wide))
            grad_v_SKD.index_add_(0, places.key_G, dv.to(wide))
        for part in (*ctx.division.squares, *ctx.division.rectangles):
            at, keys = part.queries, part.keys
            grad, q, out, k, v = _values(part, (grad_MND, q_MND, out_MND), (k_SKD, v_SKD))
            # of a padded query all weights are 0, as its log-sum is infinite
            lse = F.pad(lse_NM[:, at], (0, part.padding), value=torch.inf)
            dq, dk, dv = ctx.kernel.part_backward(part, grad, q, k, v, out, lse.contiguous())
            queries, seen = part.sizes
            if part.causal:
                grad_q_MND[at] = dq[:queries]
            else:
                grad_q_MND[at] += dq
            grad_k_SKD[keys] += dk[:seen]
            grad_v_SKD[keys] += dv[:seen]
        return (
            *(grad_q_MND, grad_k_SKD.to(k_SKD.dtype), grad_v_SKD.to(v_SKD.dtype)),
            *(None, None, None),
        )


def _values(part: Part, by_query: Sequence[Tensor], by_key: Sequence[Tensor]) -> Iterator[Tensor]:
    """A part's rows of these; behind them as padding what stands there, else zeros."""
    for at, values in ((part.queries, by_query), (part.keys, by_key)):
        end = at.stop + part.padding
        for x in values:
            whole = end <= len(x) or not part.padding
            yield x[at.start : end] if whole else longer(x[at], part.padding)

"""Attention over a prefix tree on a CPU, without a mask and without a pair that nobody sees.

In depth-first pre-order a tree is a sequence of strands: runs of tokens each of which continues the
one before it. A strand sees itself causally, and all of the path it hangs from. Both are plain
rectangles for torch's flash kernel; their parts of one softmax are joined by their log-sums, and
the kernel's backward pass, given the joined output and log-sum, returns each part's exact gradient.
A boolean mask over the pack would compute the square of its tokens instead.

Shapes: M own tokens, S = C + M tokens with C carried before them, d tokens of a path, N query and K
key heads, R = N / K, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

STRAND_PAIRS = 4000  # what one strand's calls cost, in pairs of tokens (measured with nano)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Strand:
    """Own tokens [begin, end), and the path that they hang from: `runs` [start, stop) of the S
    tokens, from the root on."""

    begin: int
    end: int
    runs: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def depth(self) -> int:
        """d: tokens of the path."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def pairs(self) -> int:
        """Query–key pairs that see each other."""
        return len(self) * self.depth + len(self) * (len(self) + 1) // 2

    @cached_property
    def path_d(self) -> Tensor:
        """Places of the path's tokens."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.runs or ((0, 0),)])


def find_strands(depth_S: Tensor, carried: int = 0) -> list[Strand]:
    """The strands of a tree's tokens in pre-order; the first `carried` are a path, and no strand.

    In pre-order a token that is one deeper than its predecessor continues it.
    """
    depth_s = depth_S.cpu()
    turn_s = torch.ones(len(depth_s), dtype=torch.bool)
    turn_s[carried + 1 :] = depth_s[carried + 1 :] != depth_s[carried:-1] + 1
    begins = carried + turn_s[carried:].nonzero()[:, 0]
    starts = depth_s[begins].tolist()
    path = [(0, carried)] if carried else []  # runs of the path at hand
    below = [0]  # the depth at which each run begins
    strands = []
    ends = [*begins[1:].tolist(), len(depth_s)]
    for begin, end, depth in zip(begins.tolist(), ends, starts, strict=True):
        while path and below[len(path) - 1] >= depth:
            path.pop()
        del below[len(path) :]
        if path:
            start = path[-1][0]
            path[-1] = (start, start + depth - below[-1])
        strands.append(Strand(begin - carried, end - carried, tuple(path)))
        path.append((begin, end))
        below.append(depth)
    return strands


def strand_attention(
    q_MND: Tensor, k_SKD: Tensor, v_SKD: Tensor, strands: Sequence[Strand]
) -> Tensor:
    """Softmax attention of the last M of S tokens, each over itself and its ancestors (M, N, D)."""
    out: Tensor = _StrandAttention.apply(q_MND, k_SKD, v_SKD, strands)  # type: ignore[no-untyped-call]
    return out


class _StrandAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_MND: Tensor, k_SKD: Tensor, v_SKD: Tensor, strands: Sequence[Strand]
    ) -> Tensor:
        heads, kinds = q_MND.shape[1], k_SKD.shape[1]
        carried = len(k_SKD) - len(q_MND)
        out_MND = torch.empty_like(q_MND)
        sums: list[Tensor] = []
        for strand in strands:
            own = slice(strand.begin, strand.end)
            keys = slice(carried + strand.begin, carried + strand.end)
            q_sND = q_MND[own]
            k, v = (_spread(x[keys], heads) for x in (k_SKD, v_SKD))
            out, lse_1Ns = _forward(_first(q_sND), k, v, 0.0, True)
            if len(strand.path_d):
                k, v = (_first(x.index_select(0, strand.path_d)) for x in (k_SKD, v_SKD))
                far, far_lse = _forward(_fold(q_sND, kinds), k, v, 0.0, False)
                far, far_lse = _unfold(far, heads), _unfold(far_lse[..., None], heads)[..., 0]
                both = torch.logaddexp(lse_1Ns, far_lse)
                near_part, far_part = (
                    (x - both).exp().to(out.dtype)[..., None] for x in (lse_1Ns, far_lse)
                )
                out, lse_1Ns = out * near_part + far * far_part, both
            out_MND[own] = out[0].transpose(0, 1)
            sums.append(lse_1Ns)
        ctx.save_for_backward(q_MND, k_SKD, v_SKD, out_MND, *sums)
        ctx.strands = strands
        return out_MND

    @staticmethod
    def backward(ctx: Any, grad_MND: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_MND, k_SKD, v_SKD, out_MND, *sums = ctx.saved_tensors
        heads, kinds = q_MND.shape[1], k_SKD.shape[1]
        carried = len(k_SKD) - len(q_MND)
        grad_q_MND = torch.empty_like(q_MND)
        grad_k_SKD, grad_v_SKD = torch.zeros_like(k_SKD), torch.zeros_like(v_SKD)
        for strand, lse_1Ns in zip(ctx.strands, sums, strict=True):
            own = slice(strand.begin, strand.end)
            keys = slice(carried + strand.begin, carried + strand.end)
            q, out, grad = q_MND[own], out_MND[own], grad_MND[own]
            k, v = (_spread(x[keys], heads) for x in (k_SKD, v_SKD))
            dq, dk, dv = _backward(_first(grad), _first(q), k, v, _first(out), lse_1Ns, 0.0, True)
            grad_q_MND[own] = dq[0].transpose(0, 1)
            for total, part in ((grad_k_SKD, dk), (grad_v_SKD, dv)):
                total[keys] += part.view(kinds, -1, *part.shape[2:]).sum(1).transpose(0, 1)
            if len(strand.path_d):
                k, v = (_first(x.index_select(0, strand.path_d)) for x in (k_SKD, v_SKD))
                q, out, grad = (_fold(x, kinds) for x in (q, out, grad))
                lse = _fold(lse_1Ns[0].t()[..., None], kinds)[..., 0]
                dq, dk, dv = _backward(grad, q, k, v, out, lse, 0.0, False)
                grad_q_MND[own] += _unfold(dq, heads)[0].transpose(0, 1)
                for total, part in ((grad_k_SKD, dk), (grad_v_SKD, dv)):
                    total.index_add_(0, strand.path_d, part[0].transpose(0, 1))
        return grad_q_MND, grad_k_SKD, grad_v_SKD, None


def _first(x_sND: Tensor) -> Tensor:
    """(1, N, s, D), as the kernel takes it."""
    return x_sND.transpose(0, 1)[None]


def _spread(x_sKD: Tensor, heads: int) -> Tensor:
    """Key heads repeated for the query heads that share them: (1, N, s, D)."""
    return _first(x_sKD.repeat_interleave(heads // x_sKD.shape[1], dim=1))


def _fold(x_sND: Tensor, kinds: int) -> Tensor:
    """Query heads that share a key head as further queries of it: (1, K, R·s, D)."""
    x_sKRD = x_sND.reshape(len(x_sND), kinds, -1, x_sND.shape[2])
    return x_sKRD.permute(1, 2, 0, 3).flatten(1, 2)[None]


def _unfold(x_1KqD: Tensor, heads: int) -> Tensor:
    """The reverse of `_fold`, as (1, N, s, D)."""
    return x_1KqD.reshape(1, heads, -1, x_1KqD.shape[3])

"""Attention by the parts of `parts.py`, and by flex attention for the strands that they leave.

What a token got from several parts is joined by their log-sums; a kernel's backward pass, given the
joined output and log-sum, returns each part's exact gradient. Queries that are left are gathered:
flex attention sees them at their places among all keys.

Shapes: M own tokens, S = C + M tokens with C carried before them, R own tokens that are left, Q and
T queries and keys with padding to whole blocks, N query and K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.config import ModelConfig
from model.flex import BLOCK, compiled_flex, flex, listed_blocks, placed_mod, whole_blocks
from model.part_kernels import Kernel, TorchKernel, join
from model.parts import Division, Part, divide
from model.strands import find_strands

HALF = (torch.bfloat16, torch.float16)


class PartAttend:
    """Attention of the last M of S tokens where this suits them and takes less than flex attention
    alone, else None. One object serves one piece: it keeps its division and mask."""

    def __init__(
        self, tout_S: Tensor, depth_S: Tensor, config: ModelConfig, carried: int = 0
    ) -> None:
        self.tout_S, self.depth_S, self.config, self.carried = tout_S, depth_S, config, carried
        self._division: Division | None = None
        self._found = False
        self._rest: Rest | None = None

    def __call__(self, q_MND: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor | None:
        if not suits(q_MND):
            return None
        if not self._found:
            self._division = divide(find_strands(self.depth_S, self.carried), self.carried)
            self._found = True
        if self._division is None:
            return None
        if self._division.rest and self._rest is None:
            self._rest = Rest(self._division, self.tout_S, self.config, self.carried)
        return divided_attention(q_MND, k_SKD, v_SKD, self._division, self._rest)


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
    rest: Rest | None,
    kernel: Kernel | None = None,
    run: Callable[..., Any] | None = None,
) -> Tensor:
    """Softmax attention of the last M of S tokens, each over itself and its ancestors (M, N, D).
    `kernel`, `run`: what computes parts, and flex attention (default: on CUDA)."""
    out: Tensor = _PartAttention.apply(  # type: ignore[no-untyped-call]
        q_MND, k_SKD, v_SKD, division, kernel or TorchKernel()
    )
    return out if rest is None else rest.into(out, q_MND, k_SKD, v_SKD, run or compiled_flex())


class Rest:
    """Flex attention of the strands that a division leaves."""

    def __init__(
        self, division: Division, tout_S: Tensor, config: ModelConfig, carried: int = 0
    ) -> None:
        places = [torch.arange(strand.begin, strand.end) for strand in division.rest]
        self.place_R = torch.cat(places).to(tout_S.device)
        queries = whole_blocks(len(self.place_R), config)
        keys = whole_blocks(len(tout_S), config)
        if keys == queries:  # the compiler would take them for one size
            keys = whole_blocks(len(tout_S) + BLOCK, config)
        self.queries, self.keys = queries * BLOCK, keys * BLOCK
        more = self.queries - len(self.place_R)
        at_Q = carried + torch.cat([self.place_R, self.place_R[-1:].expand(more)])
        self.mask = _placed_mask(tout_S, at_Q.to(torch.int32), self.keys)

    def into(
        self, out_MND: Tensor, q_MND: Tensor, k_SKD: Tensor, v_SKD: Tensor, run: Callable[..., Any]
    ) -> Tensor:
        """`out` with these tokens' attention in it."""
        q_RND = q_MND.index_select(0, self.place_R)
        q_QND = _longer(q_RND, self.queries)
        k_TKD, v_TKD = _longer(k_SKD, self.keys), _longer(v_SKD, self.keys)
        found_QND = flex(q_QND, k_TKD, v_TKD, self.mask, run)
        return out_MND.index_copy(0, self.place_R, found_QND[: len(self.place_R)])


def _placed_mask(tout_S: Tensor, at_Q: Tensor, keys: int) -> BlockMask:
    """The rule of `visible.py` for queries at places `at_Q`, which rise. A block of keys is listed
    where some query may stand behind its first key and before its greatest `tout`."""
    device = tout_S.device
    tout_T = torch.arange(1, keys + 1, device=device, dtype=torch.int32)
    tout_T[: len(tout_S)] = tout_S
    least_q1, most_q1 = (x[:, None] for x in at_Q.view(-1, BLOCK).aminmax(dim=1))
    least_k, most_k = tout_T.view(-1, BLOCK).aminmax(dim=1)
    start_k = torch.arange(0, keys, BLOCK, device=device)
    some_qk = (start_k <= most_q1) & (most_k > least_q1)
    all_qk = (start_k + BLOCK - 1 <= least_q1) & (least_k > most_q1)
    mask: BlockMask = BlockMask.from_kv_blocks(
        *listed_blocks(some_qk & ~all_qk),
        *listed_blocks(all_qk),
        BLOCK_SIZE=BLOCK,
        mask_mod=placed_mod(tout_T, at_Q.contiguous()),
        seq_lengths=(len(at_Q), keys),
    )
    return mask


def _longer(x_MND: Tensor, tokens: int) -> Tensor:
    return F.pad(x_MND, (0, 0, 0, 0, 0, tokens - len(x_MND)))


class _PartAttention(torch.autograd.Function):
    """Zero for the tokens that no part has."""

    @staticmethod
    def forward(
        ctx: Any, q_MND: Tensor, k_SKD: Tensor, v_SKD: Tensor, division: Division, kernel: Kernel
    ) -> Tensor:
        wide = torch.promote_types(q_MND.dtype, torch.float32)
        new = torch.zeros_like if division.rest else torch.empty_like
        out_MND = new(q_MND)
        lse_NM = torch.empty(q_MND.shape[1], len(q_MND), dtype=wide, device=q_MND.device)
        for part in division.parts:
            found_sND, lse_Ns = kernel.forward(
                part, q_MND[part.queries], k_SKD[part.keys], v_SKD[part.keys]
            )
            if part.causal:
                out_MND[part.queries] = found_sND
                lse_NM[:, part.queries] = lse_Ns
            else:
                join(out_MND[part.queries], lse_NM[:, part.queries], found_sND, lse_Ns)
        ctx.save_for_backward(q_MND, k_SKD, v_SKD, out_MND, lse_NM)
        ctx.division, ctx.kernel = division, kernel
        return out_MND

    @staticmethod
    def backward(ctx: Any, grad_MND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_MND, k_SKD, v_SKD, out_MND, lse_NM = ctx.saved_tensors
        parts: Sequence[Part] = ctx.division.parts
        new = torch.zeros_like if ctx.division.rest else torch.empty_like
        grad_q_MND = new(q_MND)
        wide = lse_NM.dtype  # a key's gradient is the sum of many parts
        grad_k_SKD, grad_v_SKD = (torch.zeros_like(x, dtype=wide) for x in (k_SKD, v_SKD))
        for part in parts:
            dq, dk, dv = ctx.kernel.backward(
                part,
                *(x[part.queries] for x in (grad_MND, q_MND)),
                *(x[part.keys] for x in (k_SKD, v_SKD)),
                out_MND[part.queries],
                lse_NM[:, part.queries].contiguous(),
            )
            if part.causal:
                grad_q_MND[part.queries] = dq
            else:
                grad_q_MND[part.queries] += dq
            grad_k_SKD[part.keys] += dk
            grad_v_SKD[part.keys] += dv
        return grad_q_MND, grad_k_SKD.to(k_SKD.dtype), grad_v_SKD.to(v_SKD.dtype), None, None

"""Grouped-query attention with norms over the concatenated heads and partial rotary positions.

Shapes: M tokens = B rows × T columns, H hidden size, N query heads, K key/value heads, D head size,
R rotary size, S cached columns, X rows or 1 for all alike. Tokens are kept flat (M, …); only
`Attend` knows rows and columns.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import attention_kernels
from model.config import ModelConfig
from model.window import Reach, reach_of

NEAR_QUERIES = 256  # of a window layer that are computed together


class RMSNorm(nn.Module):
    """x / rms(x) · weight, with statistics in float32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x by its root mean square, then scale by weight."""
    return F.rms_norm(x, weight.shape, weight, eps)


class Attend(Protocol):
    """What joins tokens: causal rows in training, a key/value cache in generation."""

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        """Attention output (M, N·D) of one layer."""
        ...


class Attention(nn.Module):
    """One layer's projections; `qkv_proj` stacks the rows of q_proj, k_proj and v_proj."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.sizes = [config.query_size, config.key_value_size, config.key_value_size]
        self.qkv_proj = nn.Parameter(torch.empty(sum(self.sizes), config.hidden_size))
        self.o_proj = nn.Parameter(torch.empty(config.hidden_size, config.query_size))
        self.q_norm = RMSNorm(config.query_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.key_value_size, config.rms_norm_eps)

    def forward(self, x_MH: Tensor, cos_M1r: Tensor, sin_M1r: Tensor, attend: Attend) -> Tensor:
        qkv_MA = F.linear(x_MH, self.qkv_proj)
        if attention_kernels.suits(qkv_MA):
            weights = (self.q_norm.weight, self.k_norm.weight)
            angles = (cos_M1r.squeeze(1), sin_M1r.squeeze(1))
            q, k, v = attention_kernels.norm_rotate(
                qkv_MA, *weights, *angles, self.head_dim, self.q_norm.eps
            )
        else:
            q, k, v = torch.split(qkv_MA, self.sizes, dim=-1)
            q, k = self.q_norm(q), self.k_norm(k)
        q_MND = q.view(-1, self.heads, self.head_dim)
        k_MKD = k.view(-1, self.kv_heads, self.head_dim)
        v_MKD = v.view(-1, self.kv_heads, self.head_dim)
        if not attention_kernels.suits(qkv_MA):
            q_MND = rotate(q_MND, cos_M1r, sin_M1r)
            k_MKD = rotate(k_MKD, cos_M1r, sin_M1r)
        return F.linear(attend(self.layer, q_MND, k_MKD, v_MKD), self.o_proj)


def rotary_table(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """cos and sin of every position's angles, float32 (2, positions, R/2)."""
    steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device)
    frequency_r = 1.0 / config.rope_theta ** (steps / config.rotary_dim)
    position_S = torch.arange(config.max_position_embeddings, dtype=torch.float32, device=device)
    angle_Sr = position_S[:, None] * frequency_r
    return torch.stack([angle_Sr.cos(), angle_Sr.sin()])


def rotate(x_MND: Tensor, cos_M1r: Tensor, sin_M1r: Tensor) -> Tensor:
    """Rotate the first R of each head's D numbers; number j turns with number j + R/2."""
    half = cos_M1r.shape[-1]
    a, b, rest = torch.split(x_MND, [half, half, x_MND.shape[-1] - 2 * half], dim=-1)
    turned = [
        torch.addcmul(a * cos_M1r, b, sin_M1r, value=-1),
        torch.addcmul(b * cos_M1r, a, sin_M1r),
    ]
    return torch.cat([*turned, rest], dim=-1)


def rows_first(x_MND: Tensor, shape: tuple[int, int]) -> Tensor:
    """Flat tokens (B·T, N, D) as (B, N, T, D), for `shape` (B, T)."""
    return x_MND.view(*shape, *x_MND.shape[1:]).transpose(1, 2)


def scaled_attention(
    q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """softmax(q kᵀ / √D + mask) v for N query heads that share K key/value heads; (B, N, T, D)."""
    share = q_BNTD.shape[1] // k_BKSD.shape[1]
    if share > 1 and q_BNTD.is_cuda and q_BNTD.dtype == torch.float32:
        # No fused float32 kernel there shares heads; the unfused one would keep every score.
        k_BKSD, v_BKSD = (x.repeat_interleave(share, dim=1) for x in (k_BKSD, v_BKSD))
        share = 1
    return F.scaled_dot_product_attention(
        q_BNTD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=causal, enable_gqa=share > 1
    )


class Nearby:
    """Attention of rows in a window layer, by positions (negative: padding, see `Reach.causal`).

    It goes by blocks of queries, each with the keys that one of them sees: work and masks grow with
    the tokens, not with their square.
    """

    def __init__(self, reach: Reach, query_XT: Tensor, key_XS: Tensor) -> None:
        self.parts: list[tuple[slice, Tensor, Tensor]] = []
        for start in range(0, query_XT.shape[1], NEAR_QUERIES):
            some = slice(start, start + NEAR_QUERIES)
            seen_XtS = reach.causal(query_XT[:, some, None], key_XS[:, None])
            column_s = seen_XtS.any(dim=0).any(dim=0).nonzero()[:, 0]
            self.parts.append((some, column_s, seen_XtS[:, None, :, column_s]))

    def __call__(self, q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
        outs = []
        for some, column_s, mask_X1ts in self.parts:
            k, v = (x.index_select(2, column_s) for x in (k_BKSD, v_BKSD))
            outs.append(scaled_attention(q_BNTD[:, :, some], k, v, mask_X1ts, causal=False))
        return torch.cat(outs, dim=2)


class CausalAttend:
    """Every token sees its row up to itself, as far back as its layer reaches; columns of left
    padding are seen by no real token.

    Right padding needs no mask: nothing real looks to the right.
    """

    def __init__(
        self, config: ModelConfig, batch: int, time: int, pad_left_B: Tensor | None = None
    ) -> None:
        self.config, self.shape, self.pad_left_B = config, (batch, time), pad_left_B
        self.mask_B1TS = None if pad_left_B is None else left_pad_mask(time, time, pad_left_B)
        self._nearby: Nearby | None = None

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        q, k, v = (rows_first(x, self.shape) for x in (q_MND, k_MKD, v_MKD))
        reach = reach_of(self.config, layer)
        if reach.covers(self.shape[1]):
            out = scaled_attention(q, k, v, self.mask_B1TS, causal=self.mask_B1TS is None)
        else:
            if self._nearby is None:
                position_XT = torch.arange(self.shape[1], device=q.device)[None]
                if self.pad_left_B is not None:
                    position_XT = position_XT - self.pad_left_B[:, None]
                self._nearby = Nearby(reach, position_XT, position_XT)
            out = self._nearby(q, k, v)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)


class PackedAttend:
    """Causal rows of uneven length whose tokens are kept without padding (training).

    Only attention sees a padded form: token m stands in place `place_M`[m] = row · time + column.
    Everything else, above all the experts, spends nothing on padding.
    """

    def __init__(self, config: ModelConfig, batch: int, time: int, place_M: Tensor) -> None:
        self.padded, self.place_M = CausalAttend(config, batch, time), place_M
        self.places = batch * time

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        q, k, v = (place(x, self.place_M, self.places) for x in (q_MND, k_MKD, v_MKD))
        return pick(self.padded(layer, q, k, v), self.place_M)


def place(x_MX: Tensor, place_M: Tensor, places: int) -> Tensor:
    """(places, …) with row m of `x_MX` in place `place_M`[m], all different, and zeros elsewhere;
    the gradient is `pick`."""
    placed: Tensor = _Place.apply(x_MX, place_M, places)  # type: ignore[no-untyped-call]
    return placed


def pick(x_PX: Tensor, place_M: Tensor) -> Tensor:
    """Rows `place_M`, all different, of `x_PX`; the gradient is `place`."""
    picked: Tensor = _Pick.apply(x_PX, place_M)  # type: ignore[no-untyped-call]
    return picked


class _Place(torch.autograd.Function):
    """See `place`."""

    @staticmethod
    def forward(ctx: Any, x_MX: Tensor, place_M: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(place_M)
        return x_MX.new_zeros(places, *x_MX.shape[1:]).index_copy_(0, place_M, x_MX)

    @staticmethod
    def backward(ctx: Any, grad_PX: Tensor) -> tuple[Tensor, None, None]:
        return grad_PX.index_select(0, ctx.saved_tensors[0]), None, None


class _Pick(torch.autograd.Function):
    """See `pick`."""

    @staticmethod
    def forward(ctx: Any, x_PX: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.places = len(x_PX)
        return x_PX.index_select(0, place_M)

    @staticmethod
    def backward(ctx: Any, grad_MX: Tensor) -> tuple[Tensor, None]:
        padded = grad_MX.new_zeros(ctx.places, *grad_MX.shape[1:])
        return padded.index_copy_(0, ctx.saved_tensors[0], grad_MX), None


def left_pad_mask(time: int, total: int, pad_left_B: Tensor) -> Tensor:
    """True (B, 1, T, S) where the last `time` of `total` columns may look: itself, and real columns
    before it. Columns of padding see only themselves, so that no softmax is empty."""
    column_S = torch.arange(total, device=pad_left_B.device)
    query_T1 = column_S[total - time :, None]
    real_BS = column_S >= pad_left_B[:, None]
    seen_BTS = (column_S <= query_T1) & real_BS[:, None, :]
    return (seen_BTS | (column_S == query_T1))[:, None]

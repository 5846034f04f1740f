"""Triton kernels for the passes around the experts' products. They run on CUDA devices, or on a CPU
in Triton's interpreter; import this module only where `triton` is installed.

Each is memory-bound and reads and writes its tensors once. None uses atomics, so results repeat bit
by bit, and none lets the host look at the routing. Sums are in float32.

Shapes: M tokens, k experts a token, P = M·k pairs, R = P rows sorted by expert, E experts, N blocks
of pairs, H hidden size, I expert width, O = 2·I. `pair_R` is the pair in each row, `slot_P` the row
of each pair, `ends_E` where each expert's rows end.
"""

# Triton reads these functions' source: the names of constants stand for numbers known when a kernel
# is compiled, and nothing else of this module may be used inside.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_kernel(
    experts_P,
    counts_EN,
    pairs,
    blocks,
    experts: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Pairs of each expert in each block."""
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_P + pair, mask=pair < pairs, other=-1).to(tl.int32)
    for first in range(0, experts, CHUNK):
        ids = first + tl.arange(0, CHUNK)
        count = tl.sum((expert[:, None] == ids[None, :]).to(tl.int32), axis=0)
        tl.store(counts_EN + ids * blocks + block, count, mask=ids < experts)


@triton.jit
def place_kernel(
    experts_P,
    upto_EN,
    slot_P,
    pair_R,
    ends_E,
    pairs,
    blocks,
    experts: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Row of each pair: pairs of one expert keep their order. `upto_EN` is the running sum of the
    counts, expert by expert."""
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    pair = block * BLOCK + place
    expert = tl.load(experts_P + pair, mask=pair < pairs, other=-1).to(tl.int32)
    same = expert[:, None] == expert[None, :]
    # Of the pairs of its expert in this block: how many come at its place or later.
    left = tl.sum((same & (place[None, :] >= place[:, None])).to(tl.int32), axis=1)
    end = tl.load(upto_EN + expert * blocks + block, mask=pair < pairs, other=0)
    row = end - left
    tl.store(slot_P + pair, row, mask=pair < pairs)
    tl.store(pair_R + row, pair, mask=pair < pairs)
    if block == 0:
        for first in range(0, experts, CHUNK):
            ids = first + tl.arange(0, CHUNK)
            last = tl.load(upto_EN + ids * blocks + blocks - 1, mask=ids < experts, other=0)
            tl.store(ends_E + ids, last, mask=ids < experts)


@triton.jit
def gather_kernel(
    x_MH,
    pair_R,
    out_RH,
    rows,
    hidden: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Each row's token."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    token = tl.load(pair_R + row, mask=row < rows, other=0) // TOP_K
    mask = (row < rows)[:, None] & (col < hidden)[None, :]
    x = tl.load(x_MH + token.to(tl.int64)[:, None] * hidden + col[None, :], mask=mask)
    tl.store(out_RH + row.to(tl.int64)[:, None] * hidden + col[None, :], x, mask=mask)


@triton.jit
def combine_kernel(
    y_RH,
    slot_P,
    out_MH,
    tokens,
    hidden: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Each token's k rows, added up in the order of its experts."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (token < tokens)[:, None] & (col < hidden)[None, :]
    total = tl.zeros((TOKENS, COLS), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(slot_P + token * TOP_K + j, mask=token < tokens, other=0).to(tl.int64)
        y = tl.load(y_RH + row[:, None] * hidden + col[None, :], mask=mask, other=0)
        total += y.to(tl.float32)
    out = out_MH + token.to(tl.int64)[:, None] * hidden + col[None, :]
    tl.store(out, total.to(out_MH.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_kernel(
    up_RO,
    weights_P,
    pair_R,
    h_RI,
    rows,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """silu(gate) · value · weight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    pair = tl.load(pair_R + row, mask=row < rows, other=0)
    weight = tl.load(weights_P + pair, mask=row < rows, other=0).to(tl.float32)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    row = row.to(tl.int64)[:, None]
    up = up_RO + row * (2 * width) + col[None, :]
    gate = tl.load(up, mask=mask, other=0).to(tl.float32)
    value = tl.load(up + width, mask=mask, other=0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * value * weight[:, None]
    tl.store(h_RI + row * width + col[None, :], h.to(h_RI.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    up_RO,
    weights_P,
    pair_R,
    grad_RI,
    grad_up_RO,
    grad_weights_P,
    h_RI,
    rows,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradients of `swiglu_kernel`, and its result once more for the gradient of w2."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    pair = tl.load(pair_R + row, mask=inside, other=0)
    weight = tl.load(weights_P + pair, mask=inside, other=0).to(tl.float32)[:, None]
    row = row.to(tl.int64)[:, None]
    grad_weight = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, width, COLS):
        col = (first + tl.arange(0, COLS))[None, :]
        mask = inside[:, None] & (col < width)
        at = row * (2 * width) + col
        gate = tl.load(up_RO + at, mask=mask, other=0).to(tl.float32)
        value = tl.load(up_RO + at + width, mask=mask, other=0).to(tl.float32)
        grad = tl.load(grad_RI + row * width + col, mask=mask, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        h = silu * value
        grad_weight += tl.sum(grad * h, axis=1)
        grad *= weight
        grad_gate = grad * value * (sigmoid + silu * (1 - sigmoid))
        kind = grad_up_RO.dtype.element_ty
        tl.store(grad_up_RO + at, grad_gate.to(kind), mask=mask)
        tl.store(grad_up_RO + at + width, (grad * silu).to(kind), mask=mask)
        tl.store(h_RI + row * width + col, (h * weight).to(kind), mask=mask)
    kind = grad_weights_P.dtype.element_ty
    tl.store(grad_weights_P + pair, grad_weight.to(kind), mask=inside)

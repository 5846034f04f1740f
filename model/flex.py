"""Compiled flex attention over whole blocks of tokens, as `visible.py` and its relatives use it.

Shapes: Q and T queries and keys in whole blocks, n blocks, N query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.config import ModelConfig

BLOCK = 128
MOST_VERSIONS = 64  # of it: kinds of layers × types × head counts, with gradient and without
FLEX_TYPES = (torch.float32, torch.bfloat16, torch.float16)

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex(
    q_QND: Tensor, k_TKD: Tensor, v_TKD: Tensor, mask: BlockMask, run: Callable[..., Any]
) -> Tensor:
    """`flex_attention`, compiled or not, of tokens in whole blocks; (Q, N, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_QND, k_TKD, v_TKD))
    out: Tensor = run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def whole_blocks(tokens: int, config: ModelConfig) -> int:
    """Blocks to pad this many tokens to.

    Never as many as a fixed dimension has (or one): the compiler takes equal sizes for the same
    size, and would make another version for packs of that length, and for the next length again.
    """
    fixed = (1, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    blocks = -(-tokens // BLOCK)
    while blocks in fixed:
        blocks += 1
    return blocks


def listed_blocks(mask_nn: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are true in each row, and all of the row's blocks, the true ones first."""
    count_n = mask_nn.sum(dim=-1, dtype=torch.int32)
    order_nn = mask_nn.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return count_n[None, None], order_nn.to(torch.int32)[None, None].contiguous()


def placed_mod(
    tout_T: Tensor, at_Q: Tensor, depth_T: Tensor | None = None, until_T: Tensor | None = None
) -> MaskMod:
    """`visible.mask_mod` for queries that stand at places `at_Q` among the keys."""

    def full(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= at_Q[q]) & (at_Q[q] < tout_T[k])

    def window(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert depth_T is not None and until_T is not None
        return (k <= at_Q[q]) & (at_Q[q] < tout_T[k]) & (depth_T[at_Q[q]] < until_T[k])

    return full if until_T is None else window


@cache
def compiled_flex() -> Callable[..., Any]:
    """Compiled once for all lengths. Whole or not at all: uncompiled, it keeps every score."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VERSIONS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)

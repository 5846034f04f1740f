"""Attention of one piece of a prefix tree whose ancestors' keys and values come from elsewhere.

A tree in pre-order may be cut anywhere: the tokens of a piece see tokens of earlier pieces, and of
those only the path that is open at the cut. So a piece attends to C carried keys, which are leaves
of its graph, and to its own; what it computed itself can be carried on to later pieces.

On a CPU that is `strands.strand_attention`; on CUDA `part_attend.PartAttend` where strands are
long, else compiled flex attention with a block mask of M queries by S keys, made as in
`visible.block_mask`; in window layers on a CPU, in float64 on CUDA and for many very short strands
it is a boolean mask.

Shapes: M own tokens, S = C + M, Q and T queries and keys with padding to whole blocks; N, K, D as
in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.attention import scaled_attention
from model.config import ModelConfig
from model.errors import ModelError
from model.flex import (
    BLOCK,
    FLEX_TYPES,
    compiled_flex,
    flex,
    listed_blocks,
    placed_mod,
    whole_blocks,
)
from model.part_attend import PartAttend
from model.part_kernels import longer
from model.strands import STRAND_PAIRS, Strand, strand_attention
from model.visible import Visibility, VisibleAttend, dense_mask
from model.window import Reach, reach_of

MASK_COST = 1.3  # of a pair under a mask, over one without

KeysValues = tuple[Tensor, Tensor]


class TreeAttend:
    """Attention of the last M of `visibility`'s S tokens in every layer of a model.

    `past` holds each layer's keys and values (C, K, D) of the C tokens before them, which must be a
    path: a token of depth i at place i. After a pass, `seen` holds each layer's own ones, with
    their graph. One object serves one piece. `strands` are the piece's, where they are known: else
    the device's queue is waited for to find them. Raises ModelError for other sizes.
    """

    def __init__(
        self,
        visibility: Visibility,
        config: ModelConfig,
        past: Sequence[KeysValues] = (),
        carried: int = 0,
        strands: Sequence[Strand] | None = None,
    ) -> None:
        if past and any(len(x) != carried for pair in past for x in pair):
            raise ModelError(f"attention: keys of other lengths than the {carried} tokens carried")
        self.visibility, self.config, self.past, self.carried = visibility, config, past, carried
        self.seen: list[KeysValues] = []
        self._parts = PartAttend(visibility.depth_M, carried, strands)
        self._plain = VisibleAttend(visibility, config, None if carried else self._parts)
        self._dense: dict[Reach, Tensor] = {}
        self._blocks: dict[Reach, tuple[BlockMask, int, int, int]] = {}
        self._strands: Sequence[Strand] | None = None
        if visibility.depth_M.device.type == "cpu":
            depth_S = visibility.depth_M
            strands = self._parts.strands
            pairs = int(depth_S[carried:].sum()) + len(depth_S) - carried
            masked = MASK_COST * (len(depth_S) - carried) * len(depth_S)
            if pairs + STRAND_PAIRS * len(strands) < masked:
                self._strands = strands

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        if len(q_MND) + self.carried != len(self.visibility):
            raise ModelError(
                f"attention: {len(q_MND)} tokens after {self.carried}, but a visibility of "
                f"{len(self.visibility)}"
            )
        if layer == len(self.seen):  # not again where a block is recomputed
            self.seen.append((k_MKD, v_MKD))
        k_SKD, v_SKD = k_MKD, v_MKD
        if self.carried:
            past_k, past_v = self.past[layer]
            k_SKD, v_SKD = torch.cat([past_k, k_MKD]), torch.cat([past_v, v_MKD])
        reach = reach_of(self.config, layer)
        if self._strands is not None and reach.window is None:
            return strand_attention(q_MND, k_SKD, v_SKD, self._strands).flatten(1)
        if not self.carried:
            return self._plain(layer, q_MND, k_MKD, v_MKD)
        out = self._parts(q_MND, k_SKD, v_SKD) if reach.window is None else None
        if out is not None:
            return out.flatten(1)
        if q_MND.is_cuda and q_MND.dtype in FLEX_TYPES:
            return self._flex(reach, q_MND, k_SKD, v_SKD)
        if reach not in self._dense:
            self._dense[reach] = dense_mask(self.visibility, reach)[self.carried :][None, None]
        q, k, v = (x.transpose(0, 1)[None] for x in (q_MND, k_SKD, v_SKD))
        out = scaled_attention(q, k, v, self._dense[reach], causal=False)
        return out[0].transpose(0, 1).flatten(1)

    def _flex(self, reach: Reach, q_MND: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
        if reach not in self._blocks:
            self._blocks[reach] = carried_mask(self.visibility, self.carried, reach, self.config)
        mask, gap, queries, keys = self._blocks[reach]
        q = longer(q_MND, queries - len(q_MND))
        behind = keys - len(k_SKD) - gap
        k, v = (
            torch.cat([longer(x[: self.carried], gap), longer(x[self.carried :], behind)])
            for x in (k_SKD, v_SKD)
        )
        return flex(q, k, v, mask, compiled_flex())[: len(q_MND)].flatten(1)


def carried_mask(
    visibility: Visibility, carried: int, reach: Reach, config: ModelConfig
) -> tuple[BlockMask, int, int, int]:
    """The rule for the own tokens of a piece as queries; how much padding stands between carried
    and own keys, so that both begin with a block; Q and T. See `visible.block_mask`."""
    device = visibility.tout_M.device
    own = len(visibility) - carried
    block = BLOCK
    queries = whole_blocks(own, config) * block
    keys = whole_blocks(-(-carried // block) * block + queries, config) * block
    gap = keys - queries - carried
    place_T = torch.arange(keys, device=device, dtype=torch.int32)
    tout_T, depth_T = place_T + 1, torch.zeros_like(place_T)
    tout_S = visibility.tout_M.to(torch.int32) + gap
    depth_S = visibility.depth_M.to(torch.int32)
    tout_T[:carried], depth_T[:carried] = tout_S[:carried], depth_S[:carried]
    begin, end = carried + gap, carried + gap + own
    tout_T[begin:end], depth_T[begin:end] = tout_S[carried:], depth_S[carried:]
    depth_T[end:] = depth_S[-1]
    start_q1 = torch.arange(begin, keys, block, device=device)[:, None]
    start_k = torch.arange(0, keys, block, device=device)
    least_k, most_k = tout_T.view(-1, block).aminmax(dim=1)
    before_qk = start_k < start_q1
    some_qk = before_qk & (most_k > start_q1)
    all_qk = before_qk & (least_k >= start_q1 + block)
    some_qk |= start_k == start_q1
    until_T = None
    if reach.window is not None:
        until_T = reach.until(depth_T)
        near_q, far_q = depth_T[begin:].view(-1, block).aminmax(dim=1)
        least_k, most_k = until_T.view(-1, block).aminmax(dim=1)
        some_qk &= most_k > near_q[:, None]
        all_qk &= least_k > far_q[:, None]
    mask: BlockMask = BlockMask.from_kv_blocks(
        *listed_blocks(some_qk & ~all_qk),
        *listed_blocks(all_qk),
        BLOCK_SIZE=block,
        mask_mod=placed_mod(tout_T, place_T[begin:].contiguous(), depth_T, until_T),
        seq_lengths=(queries, keys),
    )
    return mask, gap, queries, keys

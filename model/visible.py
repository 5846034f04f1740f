"""One rule of who sees whom for plain rows, packs of rows and prefix trees.

Tokens lie in depth-first pre-order, so what continues a token is one interval that starts at it:
token q sees token k exactly when k ≤ q and q < tout[k]. Window layers also ask how far k is back
on the path, by depth (`window.Reach`). On CUDA long strands go through causal kernels (`parts.py`),
the rest through compiled flex attention, whose block mask is made from the least and greatest
`tout` and depth of each block of tokens: nothing there takes memory by the square of the tokens.
Elsewhere, and in float64, it is a boolean mask.

Shapes: M tokens, T tokens with padding to whole blocks, n blocks, N query heads, K key heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.attention import scaled_attention
from model.config import ModelConfig
from model.errors import ModelError
from model.flex import (
    BLOCK,
    FLEX_TYPES,
    MaskMod,
    compiled_flex,
    flex,
    listed_blocks,
    whole_blocks,
)
from model.part_attend import PartAttend
from model.window import Reach, reach_of


@dataclass(frozen=True)
class Visibility:
    """`tout_M`: where in the pack each token's continuations end (whole numbers, > own place).
    `depth_M`: its position in its own text. Raises ModelError for other shapes."""

    tout_M: Tensor
    depth_M: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.tout_M.shape), tuple(self.depth_M.shape)
        if self.tout_M.dim() != 1 or shapes[0] != shapes[1]:
            raise ModelError(f"visibility: tout {shapes[0]} and depth {shapes[1]}; give two of (M)")
        if self.tout_M.is_floating_point() or self.depth_M.is_floating_point():
            raise ModelError("visibility: tout and depth must be whole numbers")

    def __len__(self) -> int:
        return len(self.tout_M)

    def padded(self, tokens: int) -> Visibility:
        """With tokens at the end, up to this many, that see themselves alone. Their depth is the
        last token's: a block that holds both then reaches no further."""
        own = torch.arange(len(self), tokens, device=self.tout_M.device, dtype=self.tout_M.dtype)
        depth_M = torch.cat([self.depth_M, self.depth_M[-1:].expand(tokens - len(self))])
        return Visibility(torch.cat([self.tout_M, own + 1]), depth_M)


def row_visibility(
    lengths: Sequence[int] | Tensor, device: torch.device | str | None = None
) -> Visibility:
    """Of rows of these lengths, one after the other: each token sees its row up to itself."""
    length_B = torch.as_tensor(lengths, device=device, dtype=torch.long)
    end_B = length_B.cumsum(0)
    row_M = torch.arange(len(length_B), device=length_B.device).repeat_interleave(length_B)
    place_M = torch.arange(len(row_M), device=length_B.device)
    return Visibility(end_B[row_M], place_M - (end_B - length_B)[row_M])


def forest_visibility(
    depths: Sequence[int], device: torch.device | str | None = None
) -> Visibility:
    """Of a forest in pre-order by its tokens' depths: a subtree ends where another token is as
    high."""
    tout, path = [len(depths)] * len(depths), list[int]()
    for place, depth in enumerate(depths):
        while path and depths[path[-1]] >= depth:
            tout[path.pop()] = place
        path.append(place)
    return Visibility(torch.tensor(tout, device=device), torch.tensor(depths, device=device))


def mask_mod(tout_T: Tensor, depth_T: Tensor, until_T: Tensor | None) -> MaskMod:
    """The rule for flex attention. All masks come from here and hold tensors only, so that packs
    of all lengths, and windows of all sizes, share compiled code."""

    def full(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < tout_T[k])

    def window(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert until_T is not None
        return (k <= q) & (q < tout_T[k]) & (depth_T[q] < until_T[k])

    return full if until_T is None else window


def dense_mask(visibility: Visibility, reach: Reach) -> Tensor:
    """The rule as a boolean (M, M): row q, column k."""
    place_M = torch.arange(len(visibility), device=visibility.tout_M.device)
    q_M1, depth_M = place_M[:, None], visibility.depth_M
    seen_MM = (place_M <= q_M1) & (q_M1 < visibility.tout_M)
    return seen_MM & reach.sees(depth_M[:, None], depth_M)


def block_mask(visibility: Visibility, reach: Reach, block: int = BLOCK) -> BlockMask:
    """The rule for flex attention over whole blocks (`Visibility.padded`); work and memory go by
    the square of the blocks.

    A block of keys before a block of queries is empty where the greatest `tout` in it does not pass
    the first query, and full where the least one passes the last; at the diagonal, blocks are
    partial. A window does the same to depths, with the depth at which a key is out of reach. Where
    both leave something, the block counts as partial, and the rule itself decides.
    """
    tout_T = visibility.tout_M.to(torch.int32).contiguous()
    depth_T = visibility.depth_M.to(torch.int32).contiguous()
    until_T = None
    blocks = len(tout_T) // block
    place_n = torch.arange(blocks, device=tout_T.device)
    least_n, most_n = tout_T.view(blocks, block).aminmax(dim=1)
    before_nn = place_n < place_n[:, None]
    start_n1 = place_n[:, None] * block
    some_nn = before_nn & (most_n > start_n1)
    all_nn = before_nn & (least_n >= start_n1 + block)
    some_nn.fill_diagonal_(True)
    if reach.window is not None:
        until_T = reach.until(depth_T)
        near_n, far_n = depth_T.view(blocks, block).aminmax(dim=1)
        least_n, most_n = until_T.view(blocks, block).aminmax(dim=1)
        some_nn &= most_n > near_n[:, None]
        all_nn &= least_n > far_n[:, None]
    mask: BlockMask = BlockMask.from_kv_blocks(
        *listed_blocks(some_nn & ~all_nn),
        *listed_blocks(all_nn),
        BLOCK_SIZE=block,
        mask_mod=mask_mod(tout_T, depth_T, until_T),
        seq_lengths=(len(tout_T), len(tout_T)),
    )
    return mask


class VisibleAttend:
    """Attention of flat tokens by their visibility, in every layer of a model of this config.

    A layer's mask is built at its kind's first use and kept, so one object must serve one pack.
    Checkpointed blocks may close over it. `parts`: the same tokens', if they are made already.
    Raises ModelError for another number of tokens.
    """

    def __init__(
        self, visibility: Visibility, config: ModelConfig, parts: PartAttend | None = None
    ) -> None:
        self.visibility, self.config = visibility, config
        self._dense: dict[Reach, Tensor] = {}
        self._blocks: dict[Reach, BlockMask] = {}
        self._parts = parts or PartAttend(visibility.depth_M)
        self.padding = whole_blocks(len(visibility), config) * BLOCK - len(visibility)

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        if len(q_MND) != len(self.visibility):
            raise ModelError(
                f"attention: {len(q_MND)} tokens, but a visibility of {len(self.visibility)}"
            )
        if not len(q_MND):
            return q_MND.flatten(1)
        reach = reach_of(self.config, layer)
        out = self._parts(q_MND, k_MKD, v_MKD) if reach.window is None else None
        if out is not None:
            return out.flatten(1)
        if q_MND.is_cuda and q_MND.dtype in FLEX_TYPES:
            q, k, v = (
                F.pad(x, (0, 0, 0, 0, 0, self.padding)) if self.padding else x
                for x in (q_MND, k_MKD, v_MKD)
            )
            out_TND = flex(q, k, v, self._block_mask(reach), compiled_flex())
            return out_TND[: len(q_MND)].flatten(1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_MND, k_MKD, v_MKD))
        out = scaled_attention(q, k, v, self._dense_mask(reach), causal=False)
        return out[0].transpose(0, 1).flatten(1)

    def _dense_mask(self, reach: Reach) -> Tensor:
        if reach not in self._dense:
            self._dense[reach] = dense_mask(self.visibility, reach)[None, None]
        return self._dense[reach]

    def _block_mask(self, reach: Reach) -> BlockMask:
        if reach not in self._blocks:
            whole = self.visibility.padded(len(self.visibility) + self.padding)
            self._blocks[reach] = block_mask(whole, reach)
        return self._blocks[reach]

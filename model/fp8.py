"""The released weights' FP8: e4m3 numbers in 128×128 blocks, each with one float32 scale.

A weight W (O, I) is stored as Q (O, I) in float8_e4m3fn and S (o, i) in float32, o = ⌈O/128⌉ and
i = ⌈I/128⌉; it means W[r, c] = Q[r, c] · S[r // 128, c // 128]. Blocks at the edge are smaller.
Source: the released checkpoint's `quantization_config` and `<weight>_scale_inv` tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import FP8_BLOCK

FP8: torch.dtype = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest e4m3 number."""
_LEAST_SCALE = 2.0**-126


def quantise(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, S) of a finite weight: each block's largest number becomes 448, all are rounded to even.

    With s the block's scale, an element w comes back with an error of at most half a step of e4m3
    around w/s, times s: |w|/16 where |w| ≥ s/64, s/1024 below (`docs/checkpoints.md`). A block of
    zeros has scale 1.
    """
    rows, columns = weight_OI.shape
    padded_OI = F.pad(weight_OI.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded_OI.shape[0] // FP8_BLOCK, padded_OI.shape[1] // FP8_BLOCK
    block_oBiB = padded_OI.view(blocks[0], FP8_BLOCK, blocks[1], FP8_BLOCK)
    largest_oi = block_oBiB.abs().amax((1, 3))
    # 448·s never overflows: float32's largest number divided by 448 is a float32 number.
    scale_oi = torch.where(largest_oi == 0, 1.0, (largest_oi / LARGEST).clamp_min(_LEAST_SCALE))
    scaled_oBiB = (block_oBiB / scale_oi[:, None, :, None]).clamp_(-LARGEST, LARGEST)
    stored_OI = scaled_oBiB.flatten(2, 3).flatten(0, 1)[:rows, :columns].to(FP8)
    return stored_OI.contiguous(), scale_oi


def dequantise(stored_OI: Tensor, scale_oi: Tensor) -> Tensor:
    """The weight in float32. `scale_oi` has one number for each block, those at the edges too."""
    rows, columns = stored_OI.shape
    scale_OI = scale_oi.repeat_interleave(FP8_BLOCK, 0)[:rows]
    return stored_OI.float().mul_(scale_OI.repeat_interleave(FP8_BLOCK, 1)[:, :columns])

"""Weights laid out in panels for native code, all in one piece of memory in the order of use.

Shapes: E experts, O outputs and I inputs of a matrix, H hidden size.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from model.native.memory import prefer_large_pages
from model.native.structs import Layer, Matrix
from model.transformer import Block

_LINE = 64  # bytes


@dataclass
class _Weights:
    """One matrix, or the experts' stack of one; `gated` outputs are gates above values."""

    w_EOI: Tensor
    gated: bool
    short: bool

    def nbytes(self, lanes: int) -> int:
        """Of one expert's panels."""
        _, outputs, inputs = self.w_EOI.shape
        panels = -(-outputs // (2 * lanes)) if not self.gated else -(-outputs // 2 // lanes)
        return panels * inputs * lanes * (4 if self.short else 8)


class Panels:
    """Collects a model's matrices and arrays; `pack` copies the matrices. `begin` starts anew.

    What structures point to is kept alive here.
    """

    def __init__(self, library: ctypes.CDLL, lanes: int) -> None:
        self._library, self._lanes = library, lanes
        self._keep: list[Tensor] = []
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.begin()

    @property
    def nbytes(self) -> int:
        """Memory of the copied matrices."""
        return self._memory.nbytes

    def begin(self) -> None:
        """Forget what was collected, but not the memory."""
        self._keep.clear()
        self._size = 0
        self._places: list[tuple[Matrix, _Weights, int]] = []

    def add_block(self, layer: Layer, block: Block) -> None:
        """One layer's arrays and matrices."""
        attention, moe = block.self_attn, block.block_sparse_moe
        layer.norm = self.point(block.input_layernorm.weight)
        layer.q_norm = self.point(attention.q_norm.weight)
        layer.k_norm = self.point(attention.k_norm.weight)
        layer.moe_norm = self.point(block.post_attention_layernorm.weight)
        layer.bias = self.point(moe.e_score_correction_bias)
        self.add(layer.qkv, attention.qkv_proj)
        self.add(layer.o, attention.o_proj)
        self.add(layer.gate, moe.gate_EH)
        w13 = self._weights(moe.w13_EOH, gated=True)
        self._place((layer.w13, w13), (layer.w2, self._weights(moe.w2_EIH.transpose(1, 2))))

    def add(self, matrix: Matrix, weight: Tensor) -> None:
        """One matrix (O, I)."""
        self._place((matrix, self._weights(weight)))

    def point(self, weight: Tensor) -> int:
        """The address of an array that is used as it is."""
        weight = weight.detach().contiguous()
        self._keep.append(weight)
        return weight.data_ptr()

    def pack(self) -> None:
        """Copy all matrices; their structures point to the copies from now on."""
        if len(self._memory) != self._size + _LINE:
            self._memory = torch.empty(self._size + _LINE, dtype=torch.uint8)
            prefer_large_pages(self._memory)
        base = -(-self._memory.data_ptr() // _LINE) * _LINE
        for matrix, weights, offset in self._places:
            matrix.panels = base + offset
            for e, w_OI in enumerate(weights.w_EOI):
                self._library.native_pack(
                    w_OI.data_ptr(),
                    *w_OI.stride(),
                    *w_OI.shape,
                    weights.gated,
                    weights.short,
                    base + offset + e * matrix.stride,
                )

    def _place(self, *pairs: tuple[Matrix, _Weights]) -> None:
        """One matrix or, expert by expert next to each other, several stacks of them."""
        nbytes = [-(-w.nbytes(self._lanes) // _LINE) * _LINE for _, w in pairs]
        for (matrix, weights), before in zip(pairs, [0, *nbytes], strict=False):
            _, matrix.outputs, matrix.inputs = weights.w_EOI.shape
            if weights.gated:
                matrix.outputs //= 2
            matrix.is_short, matrix.stride = weights.short, sum(nbytes)
            self._places.append((matrix, weights, self._size + before))
        self._size += sum(nbytes) * len(pairs[0][1].w_EOI)

    def _weights(self, weight: Tensor, gated: bool = False) -> _Weights:
        w_EOI = weight.detach() if weight.dim() == 3 else weight.detach()[None]
        flat = w_EOI if w_EOI.is_contiguous() else w_EOI.transpose(1, 2)
        if not flat.is_contiguous():
            flat = w_EOI = w_EOI.contiguous()
        return _Weights(w_EOI, gated, self._is_short(flat))

    def _is_short(self, flat: Tensor) -> bool:
        """True where bfloat16 holds every number exactly."""
        return bool(self._library.native_is_short(flat.data_ptr(), flat.numel()))

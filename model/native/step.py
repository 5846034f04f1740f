"""The forward pass of a float32 model on a CPU as one call of native code (`decode_step.c`).

A copy of the weights is laid out for it; weights that bfloat16 holds exactly, as those of a bf16
checkpoint, take 16 bits. Same numbers as `Transformer.run` up to rounding, and each token's are the
same bits whatever else is in the call. A call gives up Python's lock.

Shapes: M tokens, B rows, L layers, K key heads, S columns, D head size, E experts, O outputs and
I inputs of a matrix, H hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.errors import ModelError
from model.native.build import NativeUnavailableError, load_library
from model.native.memory import prefer_large_pages
from model.sampling import Sampler
from model.transformer import Transformer
from model.window import has_windows

CHUNK = 256  # tokens a call: their activations stay in the processor's cache
MOST_HIDDEN = 1024  # a wider model is better off with products on all cores
_LINE = 64  # bytes


class Cache(Protocol):
    """Keys and values, `data` (L, 2, B, K, S, D)."""

    @property
    def data(self) -> Tensor: ...


class Places(Protocol):
    """Where in a cache tokens belong. Each sees its row up to itself, from column `first_M` on or,
    without it, from the first."""

    @property
    def cache(self) -> Cache: ...

    row_M: Tensor
    column_M: Tensor
    first_M: Tensor | None


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", c_void_p),
        *((name, c_int64) for name in ("inputs", "outputs", "is_short", "stride")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("qkv", "o", "gate", "w13", "w2")),
        *((name, c_void_p) for name in ("norm", "q_norm", "k_norm", "moe_norm", "bias")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("rotary", "experts", "top_k", "width", "vocab")),
        ("positions", c_int64),
        ("eps", c_double),
        *((name, c_void_p) for name in ("embed", "turn", "norm")),
        ("head", _Matrix),
        ("layer", POINTER(_Layer)),
    )


class _Tokens(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("count", "row_stride", "head_stride")),
        *((name, c_void_p) for name in ("ids", "row", "column", "first", "position")),
        *((name, c_void_p) for name in ("keys", "values", "hidden", "logits")),
    )


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


class NativeModel:
    """A copy of a model's weights for native code; it follows changes of them when `update` is
    called.

    Raises NativeUnavailableError, in one line, where there is no native code for this model here.
    """

    def __init__(self, model: Transformer) -> None:
        config = model.config
        if model.device.type != "cpu" or model.dtype != torch.float32:
            raise NativeUnavailableError(
                f"the model is {_name(model.dtype)} on {model.device.type}, not float32 on a CPU"
            )
        if not config.has_released_experts:
            raise NativeUnavailableError("experts not of the kind that native code computes")
        if config.hidden_size > MOST_HIDDEN:
            raise NativeUnavailableError(
                f"hidden_size {config.hidden_size} is more than {MOST_HIDDEN}"
            )
        if has_windows(config):
            raise NativeUnavailableError("the model has window layers")
        self.config = config
        self._library = load_library()
        self._declare()
        self._keep: list[Tensor] = []  # what the structures point to
        self._panels = torch.empty(0, dtype=torch.uint8)
        self._layers = (_Layer * config.num_hidden_layers)()
        self._model = _Model(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rotary_dim,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.intermediate_size,
            config.vocab_size,
            config.max_position_embeddings,
            config.rms_norm_eps,
        )
        self._model.layer = self._layers
        self.update(model)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._cache_at: tuple[int, ...] = ()
        self._keys = self._values = (c_void_p * config.num_hidden_layers)()
        self._padded = -(-config.vocab_size // (2 * self._lanes)) * 2 * self._lanes

    @property
    def nbytes(self) -> int:
        """Memory of the copied weights."""
        return self._panels.nbytes

    def run(self, ids_M: Tensor, position_M: Tensor, attend: Places) -> Tensor:
        """Normed hidden states (M, H) of flat tokens, like `Transformer.run`."""
        hidden_MH = torch.empty(len(ids_M), self.config.hidden_size)
        for start in range(0, len(ids_M), CHUNK):
            part = slice(start, start + CHUNK)
            self._run(ids_M[part], position_M[part], attend, part, hidden_MH[part], None)
        return hidden_MH

    def logits(self, ids_M: Tensor, position_M: Tensor, attend: Places) -> Tensor:
        """`head` of `run` in one call, for the few tokens of a step."""
        hidden_MH = torch.empty(len(ids_M), self.config.hidden_size)
        logits_MV = torch.empty(len(ids_M), self._padded)
        self._run(ids_M, position_M, attend, slice(None), hidden_MH, logits_MV)
        return logits_MV[:, : self.config.vocab_size]

    def head(self, x_MH: Tensor) -> Tensor:
        """Logits (M, V) of hidden states."""
        x_MH = x_MH.contiguous()
        logits_MV = torch.empty(len(x_MH), self._padded)
        memory = self._room(2 * 8 * len(x_MH))
        self._library.native_head(
            byref(self._model), len(x_MH), x_MH.data_ptr(), logits_MV.data_ptr(), memory
        )
        return logits_MV[:, : self.config.vocab_size]

    def draw(self, sampler: Sampler, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """`Sampler.draw` where nothing limits the choice: ids (B) and their log-probs (B)."""
        batch, vocab = logits_BV.shape
        id_B = torch.empty(batch, dtype=torch.long)
        logp_B = torch.empty(batch)
        if logits_BV.stride(1) != 1:
            logits_BV = logits_BV.contiguous()
        self._library.native_draw(
            batch,
            vocab,
            logits_BV.stride(0),
            logits_BV.data_ptr(),
            sampler.temperature_B1.data_ptr(),
            sampler.greedy_B.data_ptr(),
            uniform_B.data_ptr(),
            id_B.data_ptr(),
            logp_B.data_ptr(),
            self._room(12 * (vocab + 64)),
        )
        return id_B, logp_B

    def _run(
        self,
        ids_M: Tensor,
        position_M: Tensor,
        attend: Places,
        part: slice,
        hidden_MH: Tensor,
        logits_MV: Tensor | None,
    ) -> None:
        data = attend.cache.data
        _, _, rows, heads, columns, size = data.shape
        if self._cache_at != (data.data_ptr(), *data.shape):
            each = data.stride(0) * data.element_size()
            at = [data.data_ptr() + layer * each for layer in range(len(data))]
            self._keys = type(self._keys)(*at)
            self._values = type(self._keys)(*(x + each // 2 for x in at))
            self._cache_at = (data.data_ptr(), *data.shape)
        first_M = torch.zeros_like(ids_M) if attend.first_M is None else attend.first_M[part]
        tokens = _Tokens(
            len(ids_M),
            heads * columns * size,
            columns * size,
            ids_M.data_ptr(),
            attend.row_M[part].data_ptr(),
            attend.column_M[part].data_ptr(),
            first_M.data_ptr(),
            position_M.data_ptr(),
            ctypes.addressof(self._keys),
            ctypes.addressof(self._values),
            hidden_MH.data_ptr(),
            None if logits_MV is None else logits_MV.data_ptr(),
        )
        size = self._library.native_scratch(byref(self._model), len(ids_M), columns)
        memory = self._room(size)
        if self._library.native_run(byref(self._model), byref(tokens), rows, columns, memory):
            raise ModelError("a token lies outside of the vocabulary, the cache or the context")

    def _room(self, nbytes: int) -> int:
        if len(self._scratch) < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8)
        return self._scratch.data_ptr()

    def _declare(self) -> None:
        """Types of the functions; without them ctypes would cut pointers off."""
        library, pointer = self._library, c_void_p
        for name, result, arguments in (
            ("native_sizes", c_int64, [c_int64]),
            ("native_scratch", c_int64, [pointer, c_int64, c_int64]),
            ("native_run", c_int64, [pointer, pointer, c_int64, c_int64, pointer]),
            ("native_head", None, [pointer, c_int64, pointer, pointer, pointer]),
            ("native_is_short", c_int64, [pointer, c_int64]),
            ("native_pack", None, [pointer, *[c_int64] * 6, pointer]),
            ("native_draw", None, [*[c_int64] * 3, *[pointer] * 7]),
        ):
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise NativeUnavailableError(f"the library does not fit: {error}") from None
            function.restype, function.argtypes = result, arguments
        structures = (_Model, _Layer, _Tokens)
        for i, structure in enumerate(structures):
            if library.native_sizes(i) != ctypes.sizeof(structure):
                raise NativeUnavailableError(f"{structure.__name__} has another size in C")
        self._lanes = int(library.native_sizes(len(structures)))

    def update(self, model: Transformer) -> None:
        """Copy the weights of a model of the same sizes: all panels in one piece of memory, in the
        order that a step reads."""
        places: list[tuple[_Matrix, _Weights, int]] = []
        size = 0

        def add(*pairs: tuple[_Matrix, _Weights]) -> None:
            """One matrix or, expert by expert next to each other, several stacks of them."""
            nonlocal size
            nbytes = [-(-w.nbytes(self._lanes) // _LINE) * _LINE for _, w in pairs]
            for (matrix, weights), before in zip(pairs, [0, *nbytes], strict=False):
                _, matrix.outputs, matrix.inputs = weights.w_EOI.shape
                if weights.gated:
                    matrix.outputs //= 2
                matrix.is_short, matrix.stride = weights.short, sum(nbytes)
                places.append((matrix, weights, size + before))
            size += sum(nbytes) * len(pairs[0][1].w_EOI)

        self._keep.clear()
        self._model.embed = self._point(model.embed_tokens)
        self._model.turn = self._point(model.rotary)
        self._model.norm = self._point(model.norm.weight)
        for layer, block in zip(self._layers, model.layers, strict=True):
            attention, moe = block.self_attn, block.block_sparse_moe
            layer.norm = self._point(block.input_layernorm.weight)
            layer.q_norm = self._point(attention.q_norm.weight)
            layer.k_norm = self._point(attention.k_norm.weight)
            layer.moe_norm = self._point(block.post_attention_layernorm.weight)
            layer.bias = self._point(moe.e_score_correction_bias)
            add((layer.qkv, self._weights(attention.qkv_proj)))
            add((layer.o, self._weights(attention.o_proj)))
            add((layer.gate, self._weights(moe.gate_EH)))
            w13 = self._weights(moe.w13_EOH, gated=True)
            add((layer.w13, w13), (layer.w2, self._weights(moe.w2_EIH.transpose(1, 2))))
        add((self._model.head, self._weights(model.lm_head)))
        if len(self._panels) != size + _LINE:
            self._panels = torch.empty(size + _LINE, dtype=torch.uint8)
            prefer_large_pages(self._panels)
        base = -(-self._panels.data_ptr() // _LINE) * _LINE
        for matrix, weights, offset in places:
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

    def _weights(self, weight: Tensor, gated: bool = False) -> _Weights:
        w_EOI = weight.detach() if weight.dim() == 3 else weight.detach()[None]
        flat = w_EOI if w_EOI.is_contiguous() else w_EOI.transpose(1, 2)
        if not flat.is_contiguous():
            flat = w_EOI = w_EOI.contiguous()
        return _Weights(w_EOI, gated, self._is_short(flat))

    def _is_short(self, flat: Tensor) -> bool:
        """True where bfloat16 holds every number exactly."""
        return bool(self._library.native_is_short(flat.data_ptr(), flat.numel()))

    def _point(self, weight: Tensor) -> int:
        """The address of an array that is used as it is."""
        weight = weight.detach().contiguous()
        self._keep.append(weight)
        return weight.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""What native code is handed: the structures of `model.h` and the types of its functions."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int64, c_void_p

from torch import Tensor

from model.config import ModelConfig
from model.native.build import NativeUnavailableError


class Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", c_void_p),
        *((name, c_int64) for name in ("inputs", "outputs", "is_short", "stride")),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "o", "gate", "w13", "w2")),
        *((name, c_void_p) for name in ("norm", "q_norm", "k_norm", "moe_norm", "bias")),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("rotary", "experts", "top_k", "width", "vocab")),
        ("positions", c_int64),
        ("eps", c_double),
        *((name, c_void_p) for name in ("embed", "turn", "norm")),
        ("head", Matrix),
        ("layer", POINTER(Layer)),
        ("eh", Matrix),
        *((name, c_void_p) for name in ("enorm", "hnorm")),
    )


class Tokens(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("count", "row_stride", "head_stride")),
        *((name, c_void_p) for name in ("ids", "row", "column", "first", "position")),
        *((name, c_void_p) for name in ("keys", "values", "hidden", "logits", "given")),
    )


def sized(config: ModelConfig, layers: ctypes.Array[Layer]) -> Model:
    """A model of these sizes and layers, without its own arrays."""
    model = Model(
        len(layers),
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
    model.layer = layers
    return model


class CacheAt:
    """Addresses of each layer's keys and values in a cache (L, 2, B, K, S, D); found anew when the
    memory has moved."""

    def __init__(self, layers: int) -> None:
        self._at: tuple[int, ...] = ()
        self._keys = self._values = (c_void_p * layers)()

    def __call__(self, data: Tensor) -> tuple[int, int]:
        """Addresses of the two lists of addresses."""
        if self._at != (data.data_ptr(), *data.shape):
            each = data.stride(0) * data.element_size()
            at = [data.data_ptr() + layer * each for layer in range(len(data))]
            self._keys = type(self._keys)(*at)
            self._values = type(self._keys)(*(x + each // 2 for x in at))
            self._at = (data.data_ptr(), *data.shape)
        return ctypes.addressof(self._keys), ctypes.addressof(self._values)


def declare(library: ctypes.CDLL) -> int:
    """Give the functions their types, without which ctypes would cut pointers off; numbers in a
    vector of this processor. Raises NativeUnavailableError for a library of something else."""
    pointer = c_void_p
    for name, result, arguments in (
        ("native_sizes", c_int64, [c_int64]),
        ("native_scratch", c_int64, [pointer, c_int64, c_int64]),
        ("native_run", c_int64, [pointer, pointer, c_int64, c_int64, pointer]),
        ("native_head", None, [pointer, c_int64, pointer, pointer, pointer]),
        ("native_is_short", c_int64, [pointer, c_int64]),
        ("native_pack", None, [pointer, *[c_int64] * 6, pointer]),
        ("native_draw", None, [*[c_int64] * 3, *[pointer] * 7]),
        ("native_judge", None, [*[c_int64] * 5, *[pointer] * 11]),
        ("native_propose", c_int64, [*[pointer] * 2, *[c_int64] * 4, *[pointer] * 10]),
        (
            "native_feed",
            c_int64,
            [*[pointer] * 2, *[c_int64] * 2, *[pointer] * 2, *[c_int64] * 4, *[pointer] * 11],
        ),
    ):
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise NativeUnavailableError(f"the library does not fit: {error}") from None
        function.restype, function.argtypes = result, arguments
    structures = (Model, Layer, Tokens)
    for i, structure in enumerate(structures):
        if library.native_sizes(i) != ctypes.sizeof(structure):
            raise NativeUnavailableError(f"{structure.__name__} has another size in C")
    return int(library.native_sizes(len(structures)))

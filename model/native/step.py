"""The forward pass of a float32 model on a CPU as one call of native code (`decode_step.c`).

A copy of the weights is laid out for it; weights that bfloat16 holds exactly, as those of a bf16
checkpoint, take 16 bits. Same numbers as `Transformer.run` up to rounding, and each token's are the
same bits whatever else is in the call. A call gives up Python's lock.

Shapes: M tokens, B rows, L layers, K key heads, S columns, D head size, H hidden size,
V vocabulary.
"""

from __future__ import annotations

from ctypes import byref
from typing import Protocol

import torch
from torch import Tensor

from model.errors import ModelError
from model.native.build import NativeUnavailableError, load_library
from model.native.panels import Panels
from model.native.structs import CacheAt, Layer, Model, Tokens, declare, sized
from model.sampling import Sampler
from model.transformer import Transformer
from model.window import has_windows

CHUNK = 256  # tokens a call: their activations stay in the processor's cache
MOST_HIDDEN = 1024  # a wider model is better off with products on all cores


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
        self._lanes = declare(self._library)
        self._panels = Panels(self._library, self._lanes)
        self._layers = (Layer * config.num_hidden_layers)()
        self._model = sized(config, self._layers)
        self.update(model)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._cache_at = CacheAt(config.num_hidden_layers)
        self._padded = -(-config.vocab_size // (2 * self._lanes)) * 2 * self._lanes

    @property
    def nbytes(self) -> int:
        """Memory of the copied weights."""
        return self._panels.nbytes

    @property
    def structure(self) -> Model:
        """The weights as native code sees them, for code that shares some of them."""
        return self._model

    def run(self, ids_M: Tensor, position_M: Tensor, attend: Places) -> Tensor:
        """Normed hidden states (M, H) of flat tokens, like `Transformer.run`."""
        hidden_MH = torch.empty(len(ids_M), self.config.hidden_size)
        for start in range(0, len(ids_M), CHUNK):
            part = slice(start, start + CHUNK)
            self._run(ids_M[part], position_M[part], attend, part, hidden_MH[part], None)
        return hidden_MH

    def logits(self, ids_M: Tensor, position_M: Tensor, attend: Places) -> Tensor:
        """`head` of `run` in one call, for the few tokens of a step."""
        return self.hidden_and_logits(ids_M, position_M, attend)[1]

    def hidden_and_logits(
        self, ids_M: Tensor, position_M: Tensor, attend: Places
    ) -> tuple[Tensor, Tensor]:
        """`run` and `head` of it in one call."""
        hidden_MH = torch.empty(len(ids_M), self.config.hidden_size)
        logits_MV = torch.empty(len(ids_M), self._padded)
        self._run(ids_M, position_M, attend, slice(None), hidden_MH, logits_MV)
        return hidden_MH, logits_MV[:, : self.config.vocab_size]

    def tokens_in(self, cache: Cache, hidden_MH: Tensor, logits_MV: Tensor) -> Tokens:
        """A call's structure without the tokens, for native code that finds them itself. The logits
        have `padded_vocab` columns."""
        data = cache.data
        _, _, _, heads, columns, size = data.shape
        keys, values = self._cache_at(data)
        tokens = Tokens(row_stride=heads * columns * size, head_stride=columns * size)
        tokens.keys, tokens.values = keys, values
        tokens.hidden, tokens.logits = hidden_MH.data_ptr(), logits_MV.data_ptr()
        return tokens

    @property
    def padded_vocab(self) -> int:
        """Columns of logits in memory."""
        return self._padded

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
        first_M = torch.zeros_like(ids_M) if attend.first_M is None else attend.first_M[part]
        tokens = Tokens(
            len(ids_M),
            heads * columns * size,
            columns * size,
            ids_M.data_ptr(),
            attend.row_M[part].data_ptr(),
            attend.column_M[part].data_ptr(),
            first_M.data_ptr(),
            position_M.data_ptr(),
            *self._cache_at(data),
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

    def update(self, model: Transformer) -> None:
        """Copy the weights of a model of the same sizes: all panels in one piece of memory, in the
        order that a step reads."""
        panels = self._panels
        panels.begin()
        self._model.embed = panels.point(model.embed_tokens)
        self._model.turn = panels.point(model.rotary)
        self._model.norm = panels.point(model.norm.weight)
        for layer, block in zip(self._layers, model.layers, strict=True):
            panels.add_block(layer, block)
        panels.add(self._model.head, model.lm_head)
        panels.pack()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

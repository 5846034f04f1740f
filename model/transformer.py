"""The MiniMax-M2 transformer: pre-norm blocks of attention and mixture of experts.

Shapes: B rows, T columns, M = B·T tokens, H hidden size, V vocabulary.
Source of the forward pass: the released configuration and transformers' `minimax_m2` (see docs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attend, Attention, CausalAttend, RMSNorm, rotary_table
from model.cache import CachedAttend, KVCache
from model.config import ModelConfig
from model.errors import ModelError
from model.moe import MoE, RoutingTape, float_of


class Block(nn.Module):
    """x + attention(norm x), then x + experts(norm x)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = MoE(config, layer)

    def forward(
        self,
        x_MH: Tensor,
        cos_M1r: Tensor,
        sin_M1r: Tensor,
        attend: Attend,
        tape: RoutingTape | None = None,
    ) -> Tensor:
        x_MH = x_MH + self.self_attn(self.input_layernorm(x_MH), cos_M1r, sin_M1r, attend)
        out_MH: Tensor = x_MH + self.block_sparse_moe(self.post_attention_layernorm(x_MH), tape)
        return out_MH


class Transformer(nn.Module):
    """The whole model. `Transformer(config, seed=0)` draws fresh weights, the same for one seed."""

    layers: Sequence[Block]

    def __init__(self, config: ModelConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.layers = blocks  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.rotary: Tensor
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights of `initializer_range`; what writes into the residual stream is scaled
        down by √(2·layers), so that its variance does not grow with depth."""
        generator = torch.Generator().manual_seed(seed)
        spread = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            into_stream = name.endswith(("o_proj", "w2_EIH", "shared_w2_HS"))
            std = spread / (2 * self.config.num_hidden_layers) ** 0.5 if into_stream else spread
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights (router weights are float32 whatever this is)."""
        return self.embed_tokens.dtype

    def cast(self, dtype: torch.dtype) -> Self:
        """Change the weights' type, in place. Router weight and bias stay float32 (float64 in a
        float64 model), as M2 keeps them."""
        for name, parameter in self.named_parameters():
            router = name.endswith("gate_EH")
            parameter.data = parameter.data.to(float_of(dtype) if router else dtype)
        for layer in self.layers:
            bias = layer.block_sparse_moe.e_score_correction_bias
            layer.block_sparse_moe.e_score_correction_bias = bias.to(float_of(dtype))
        return self

    def forward(
        self,
        ids_BT: Tensor,
        *,
        pad_left_B: Tensor | None = None,
        cache: KVCache | None = None,
        tape: RoutingTape | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the next token, float32 (float64 in a float64 model).

        Right-padded rows need nothing: their real columns come out as if alone. Left-padded rows
        name their padding in `pad_left_B`. With a cache, ids are the columns after those it holds,
        and their keys and values are added to it. `tape` notes or forces the choice of experts.
        """
        return self.head(self.hidden(ids_BT, pad_left_B=pad_left_B, cache=cache, tape=tape))

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        pad_left_B: Tensor | None = None,
        cache: KVCache | None = None,
        tape: RoutingTape | None = None,
    ) -> Tensor:
        """Normed hidden states (B, T, H), from which `head` makes logits. See `forward`."""
        batch, time = ids_BT.shape
        start = cache.length if cache is not None else 0
        if start + time > self.config.max_position_embeddings:
            raise ModelError(
                f"{start + time} tokens are more than the model's context of "
                f"{self.config.max_position_embeddings}; shorten the text"
            )
        position_BT = torch.arange(start, start + time, device=ids_BT.device).expand(batch, time)
        if pad_left_B is not None:
            position_BT = (position_BT - pad_left_B[:, None]).clamp_min(0)
        attend: Attend
        if cache is None:
            attend = CausalAttend(self.config, batch, time, pad_left_B)
        else:
            attend = CachedAttend(cache, batch, time, pad_left_B)
        x_MH = self.run(ids_BT.flatten(), position_BT.flatten(), attend, tape)
        if cache is not None:
            cache.length = start + time
        return x_MH.view(batch, time, -1)

    def run(
        self,
        ids_M: Tensor,
        position_M: Tensor,
        attend: Attend,
        tape: RoutingTape | None = None,
    ) -> Tensor:
        """Normed hidden states (M, H) of flat tokens, whatever joins them."""
        if tape is not None:
            tape.begin(self.config, len(ids_M))
        x_MH = F.embedding(ids_M, self.embed_tokens)
        cos_M1r, sin_M1r = self.rotary.index_select(1, position_M).to(x_MH.dtype).unsqueeze(2)
        for layer in self.layers:
            x_MH = layer(x_MH, cos_M1r, sin_M1r, attend, tape)
        normed: Tensor = self.norm(x_MH)
        return normed

    def head(self, x: Tensor) -> Tensor:
        """Logits (…, V) of hidden states (…, H), multiplied in float32: rollout and training then
        round alike."""
        wide = float_of(x.dtype)
        return F.linear(x.to(wide), self.lm_head.to(wide))

    def track_load(self, on: bool) -> None:
        """Count tokens an expert in every layer, for `balance`."""
        for layer in self.layers:
            layer.block_sparse_moe.track_load(on)

    def balance(self, rate: float, load_LE: Tensor | None = None) -> None:
        """One step of routing-bias balancing in every layer (see `MoE.balance`)."""
        for i, layer in enumerate(self.layers):
            layer.block_sparse_moe.balance(rate, None if load_LE is None else load_LE[i])

"""The forward pass of a decode step on a CPU: few, large calls over weights laid out for them.

With a few dozen tokens a step, a layer costs its calls and the weights it reads, not arithmetic.
So projections are kept input-first with the norms' weights multiplied in, one call norms queries
and keys and one turns them, the experts a step needs are multiplied in one batched product, and the
grouping by expert is done in plain Python. Same numbers as `Transformer.run` up to rounding
(tested).

Shapes: M tokens, H hidden, E experts, k chosen, P = M·k pairs, C rows an expert is padded to,
I expert width, O = 2·I, N and K query and key heads, D head size, A = (N + 2·K)·D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attend
from model.config import ModelConfig
from model.transformer import Block, Transformer

# With more tokens than this, arithmetic counts and `Transformer.run` is as good.
PACKED_TOKENS = 128
FEW_EXPERTS = 5  # up to this many experts, one product each beats one over all of them
PADDING_LIMIT = 4.0  # padded rows a pair, above which experts are multiplied one by one


@dataclass(frozen=True)
class _Layer:
    """Weights of a block; those that read a normed stream hold the norm's weight.

    `scale_3A` spreads the factors of queries, keys and values (1) over their columns.
    """

    qkv_HA: Tensor
    scale_3A: Tensor
    o_AH: Tensor
    gate_HE: Tensor
    bias_E: Tensor
    w13_EHO: Tensor
    w2_EIH: Tensor

    @classmethod
    def of(cls, block: Block, config: ModelConfig) -> _Layer:
        attention, moe = block.self_attn, block.block_sparse_moe
        norm_1H = block.input_layernorm.weight.detach()[None]
        moe_norm_1H = block.post_attention_layernorm.weight.detach()[None]
        scale_3A = attention.qkv_proj.new_zeros(3, len(attention.qkv_proj))
        queries, keys = config.query_size, config.query_size + config.key_value_size
        scale_3A[0, :queries] = attention.q_norm.weight
        scale_3A[1, queries:keys] = attention.k_norm.weight
        scale_3A[2, keys:] = 1
        return cls(
            (attention.qkv_proj.detach() * norm_1H).t().contiguous(),
            scale_3A,
            attention.o_proj.detach().t().contiguous(),
            (moe.gate_EH.detach() * moe_norm_1H).t().contiguous(),
            moe.e_score_correction_bias.detach(),
            (moe.w13_EOH.detach() * moe_norm_1H).transpose(1, 2).contiguous(),
            moe.w2_EIH.detach(),
        )


class PackedModel:
    """A copy of a model's weights for decoding; it does not follow changes of the model's."""

    @torch.no_grad()
    def __init__(self, model: Transformer) -> None:
        config = model.config
        self.config = config
        self.embed_VH = model.embed_tokens.detach()
        self.layers = [_Layer.of(block, config) for block in model.layers]
        self.head_HV = (model.lm_head.detach() * model.norm.weight.detach()).t().contiguous()
        self.cos_S1D, self.sin_S1D, self.swap_D = _turn_tables(config, model.rotary)
        self.eps = self.embed_VH.new_full((), config.rms_norm_eps)
        # Mean square of queries and of keys, and 1 in the place of the values'.
        self.mean_A3 = self.embed_VH.new_zeros(self.layers[0].qkv_HA.shape[1], 3)
        queries, width = config.query_size, config.key_value_size
        self.mean_A3[:queries, 0] = 1 / queries
        self.mean_A3[queries : queries + width, 1] = 1 / width
        self.eps_13 = self.embed_VH.new_tensor([[config.rms_norm_eps, config.rms_norm_eps, 1.0]])

    @staticmethod
    def suits(model: Transformer) -> bool:
        """True where this computes the same and faster: the released kind of experts on a CPU,
        with weights of full width."""
        wide = model.dtype in (torch.float32, torch.float64)
        return model.config.has_released_experts and model.device.type == "cpu" and wide

    def run(self, ids_M: Tensor, position_M: Tensor, attend: Attend) -> Tensor:
        """Hidden states (M, H) of flat tokens for `head`. They are normed, like those of
        `Transformer.run`, but the last norm's weight is left to `head`."""
        config = self.config
        heads = config.num_attention_heads
        turned = heads + config.num_key_value_heads
        cos_M1D = self.cos_S1D.index_select(0, position_M)
        sin_M1D = self.sin_S1D.index_select(0, position_M)
        x_MH = F.embedding(ids_M, self.embed_VH)
        for i, layer in enumerate(self.layers):
            h_MA = torch.mm(self._norm(x_MH), layer.qkv_HA)
            factor_M3 = torch.addmm(self.eps_13, h_MA * h_MA, self.mean_A3).rsqrt_()
            h_MAD = h_MA.mul_(torch.mm(factor_M3, layer.scale_3A)).view(
                len(h_MA), -1, config.head_dim
            )
            qk = h_MAD[:, :turned]
            qk = torch.addcmul(qk * cos_M1D, qk.index_select(2, self.swap_D), sin_M1D)
            out_MA = attend(i, qk[:, :heads], qk[:, heads:], h_MAD[:, turned:])
            x_MH = torch.addmm(x_MH, out_MA, layer.o_AH)
            x_MH = x_MH + self._experts(layer, self._norm(x_MH))
        return self._norm(x_MH)

    def head(self, x_MH: Tensor) -> Tensor:
        """Logits (M, V) of hidden states."""
        return torch.mm(x_MH, self.head_HV)

    def _norm(self, x_MX: Tensor) -> Tensor:
        length_M1 = torch.linalg.vector_norm(x_MX, dim=-1, keepdim=True)
        mean_M1 = torch.addcmul(self.eps, length_M1, length_M1, value=1 / x_MX.shape[-1])
        return x_MX * mean_M1.rsqrt_()

    def _experts(self, layer: _Layer, x_MH: Tensor) -> Tensor:
        top_k = self.config.num_experts_per_tok
        score_ME = torch.mm(x_MH, layer.gate_HE).sigmoid_()
        chosen_Mk = (score_ME + layer.bias_E).topk(top_k, dim=-1, sorted=False).indices
        weight_Mk = score_ME.gather(1, chosen_Mk)
        weight_Mk = weight_Mk.div_(weight_Mk.sum(-1, keepdim=True))
        y_PH = self._pairs(layer, x_MH, chosen_Mk.flatten().tolist())
        y_MkH = y_PH.view(len(x_MH), top_k, -1)
        return torch.bmm(weight_Mk.unsqueeze(1), y_MkH).squeeze(1)

    def _pairs(self, layer: _Layer, x_MH: Tensor, expert_of: list[int]) -> Tensor:
        """(P, H): each pair's token through its expert."""
        pairs, experts, top_k = len(expert_of), len(layer.w2_EIH), self.config.num_experts_per_tok
        counts = [0] * experts
        place = []
        for expert in expert_of:
            place.append(counts[expert])
            counts[expert] += 1
        rows = max(counts)
        if experts - counts.count(0) <= FEW_EXPERTS or rows * experts > PADDING_LIMIT * pairs:
            return _one_by_one(layer, x_MH, expert_of, counts, top_k)
        slots = [expert * rows + c for expert, c in zip(expert_of, place, strict=True)]
        sources = [0] * (experts * rows)  # rows of padding hold token 0; nothing reads them
        for pair, slot in enumerate(slots):
            sources[slot] = pair // top_k
        x_ECH = x_MH.index_select(0, torch.tensor(sources)).view(experts, rows, -1)
        y_ECH = torch.bmm(_swiglu(torch.bmm(x_ECH, layer.w13_EHO)), layer.w2_EIH)
        return y_ECH.flatten(0, 1).index_select(0, torch.tensor(slots))


def _one_by_one(
    layer: _Layer, x_MH: Tensor, expert_of: list[int], counts: list[int], top_k: int
) -> Tensor:
    order = sorted(range(len(expert_of)), key=expert_of.__getitem__)
    x_PH = x_MH.index_select(0, torch.tensor([pair // top_k for pair in order]))
    parts = torch.split(x_PH, [count for count in counts if count])
    used = [expert for expert, count in enumerate(counts) if count]
    y_PH = torch.cat(
        [
            torch.mm(_swiglu(torch.mm(x, layer.w13_EHO[e])), layer.w2_EIH[e])
            for e, x in zip(used, parts, strict=True)
        ]
    )
    return torch.empty_like(y_PH).index_copy_(0, torch.tensor(order), y_PH)


def _swiglu(up: Tensor) -> Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate).mul_(value)


def _turn_tables(config: ModelConfig, rotary_2Sr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos and signed sin (S, 1, D) for x·cos + x[swap]·sin, the rotation of `attention.rotate`."""
    cos_Sr, sin_Sr = rotary_2Sr
    positions, half = cos_Sr.shape
    cos_SD = cos_Sr.new_ones(positions, config.head_dim)
    sin_SD = cos_Sr.new_zeros(positions, config.head_dim)
    cos_SD[:, : 2 * half] = torch.cat([cos_Sr, cos_Sr], dim=1)
    sin_SD[:, : 2 * half] = torch.cat([-sin_Sr, sin_Sr], dim=1)
    swap_D = torch.arange(config.head_dim, device=rotary_2Sr.device)
    swap_D[: 2 * half] = swap_D[: 2 * half].roll(half)
    return cos_SD[:, None], sin_SD[:, None], swap_D

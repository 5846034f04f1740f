"""Multi-token prediction: small modules that look one more token ahead each, as in DeepSeek-V3.

Module i (from 1) at position t joins the previous depth's hidden state h^{i−1}_t with the embedding
of token t + i and predicts token t + i + 1:

    h^i_t = Block_i(W_i [RMSNorm(Emb(token_{t+i})) ; RMSNorm(h^{i−1}_t)])
    logits = Head(RMSNorm(h^i_t))

h^0 is what the main model's head sees. Embedding and head are the main model's own (`Shared`). The
embedding stands first in W, as in DeepSeek-V3's released weights; its paper writes it second.

Source: DeepSeek-V3 report §2.2; MiniMax-M2 report §2.3 and Figure 2. Shapes: B rows, T columns,
M = B·T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attend, CausalAttend, RMSNorm
from model.config import ModelConfig
from model.errors import ModelError
from model.moe import float_of
from model.transformer import Block, Transformer


@dataclass(frozen=True)
class Shared:
    """What modules use of the main model: embedding (V, H), head (V, H), rotary table."""

    embed_VH: Tensor
    head_VH: Tensor
    rotary: Tensor

    @classmethod
    def of(cls, model: Transformer, *, detached: bool = False) -> Shared:
        """The model's own weights; `detached`: no gradient reaches them."""
        embed, head = model.embed_tokens, model.lm_head
        if detached:
            return cls(embed.detach(), head.detach(), model.rotary)
        return cls(embed, head, model.rotary)


class MTPModule(nn.Module):
    """One depth. `depth` counts from 0 and names its layer in a key/value cache."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.eh_proj = nn.Parameter(torch.empty(size, 2 * size))
        self.block = Block(config, depth)
        self.norm = RMSNorm(size, eps)

    def forward(
        self, shared: Shared, h_MH: Tensor, ids_M: Tensor, position_M: Tensor, attend: Attend
    ) -> Tensor:
        """Hidden states (M, H), not normed, from the previous depth's and the tokens after them."""
        embed_MH = F.embedding(ids_M, shared.embed_VH)
        joined = torch.cat([self.enorm(embed_MH), self.hnorm(h_MH)], dim=-1)
        x_MH = F.linear(joined, self.eh_proj)
        cos_M1r, sin_M1r = shared.rotary.index_select(1, position_M).to(x_MH.dtype).unsqueeze(2)
        out: Tensor = self.block(x_MH, cos_M1r, sin_M1r, attend)
        return out

    def logits(self, shared: Shared, h_MH: Tensor) -> Tensor:
        """Logits (M, V) in float32 or wider, like `Transformer.head`."""
        wide = float_of(h_MH.dtype)
        normed: Tensor = self.norm(h_MH)
        return F.linear(normed.to(wide), shared.head_VH.to(wide))


class MTP(nn.Module):
    """`count` modules with blocks of `config`'s sizes, which may have fewer or narrower experts
    than the main model (see `draft_config`). Fresh weights are the same for one seed.

    Raises ModelError for a count below one.
    """

    layers: Sequence[MTPModule]

    def __init__(self, config: ModelConfig, count: int = 1, *, seed: int | None = 0) -> None:
        super().__init__()
        if count < 1:
            raise ModelError(f"mtp: {count} modules; at least one is needed")
        # A module sees the whole text, whatever the main model's layers see.
        self.config = replace(config, attn_type_list=(), sliding_window=None, num_sink_tokens=0)
        modules = nn.ModuleList(MTPModule(self.config, depth) for depth in range(count))
        self.layers = modules  # type: ignore[assignment]
        if seed is not None:
            self.init_weights(seed)

    @property
    def count(self) -> int:
        """How many modules there are."""
        return len(self.layers)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights of `initializer_range`, norms one. W starts as the embedding's copy plus
        that noise: the block then begins like a model's, with the token before the predicted one.
        (A copy of the hidden state would begin sure of the wrong token, the one before.)"""
        generator = torch.Generator().manual_seed(seed)
        spread = self.config.initializer_range
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            weight.copy_(torch.empty(weight.shape).normal_(0.0, spread, generator=generator))
            if name.endswith("eh_proj"):
                weight[:, : len(weight)] += torch.eye(len(weight))

    def cast(self, dtype: torch.dtype) -> MTP:
        """Change the weights' type, in place; router weight and bias stay as in `Transformer`."""
        for name, weight in self.named_parameters():
            weight.data = weight.data.to(float_of(dtype) if name.endswith("gate_EH") else dtype)
        for module in self.layers:
            moe = module.block.block_sparse_moe
            moe.e_score_correction_bias = moe.e_score_correction_bias.to(float_of(dtype))
        return self

    def track_load(self, on: bool) -> None:
        """Count tokens an expert in every module, for `balance`."""
        for module in self.layers:
            module.block.block_sparse_moe.track_load(on)

    def balance(self, rate: float) -> None:
        """One step of routing-bias balancing in every module (see `MoE.balance`)."""
        for module in self.layers:
            module.block.block_sparse_moe.balance(rate)

    def check_fits(self, model: Transformer) -> None:
        """Raise ModelError where the modules cannot share this model's embedding and head."""
        ours, theirs = self.config, model.config
        for name in ("vocab_size", "hidden_size", "head_dim", "rotary_dim", "rope_theta"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ModelError(
                    f"mtp: {name} is {getattr(ours, name)}, but the model has "
                    f"{getattr(theirs, name)}; use the modules of this model"
                )


def draft_config(
    config: ModelConfig, *, experts: int | None = None, top_k: int | None = None, width: int = 0
) -> ModelConfig:
    """The main model's configuration with fewer (`experts`, `top_k`) or narrower (`width`) experts,
    for a draft head. One expert with top 1 is a dense layer."""
    count = experts or config.num_local_experts
    return replace(
        config,
        num_local_experts=count,
        num_experts_per_tok=min(top_k or config.num_experts_per_tok, count),
        intermediate_size=width or config.intermediate_size,
    )


# ---------------------------------------------------------------------------- training together


def mtp_loss(
    model: Transformer,
    mtp: MTP,
    hidden_BTH: Tensor,
    ids_BT: Tensor,
    lengths_B: Tensor,
    *,
    detached: bool = False,
) -> Tensor:
    """Mean over modules of the cross-entropy (nats) of token t + i + 1, over right-padded rows.

    `hidden_BTH` is `Transformer.hidden(ids_BT)`. The caller multiplies by `MTPSchedule.weight`.
    Gradients reach the modules, embedding, head and whatever made `hidden_BTH`; with `detached` the
    modules only. A row too short for a module has no part in its mean; a module without any target
    counts as zero.
    """
    mtp.check_fits(model)
    shared = Shared.of(model, detached=detached)
    batch, time = ids_BT.shape
    column_T = torch.arange(time, device=ids_BT.device)
    position_M = column_T.expand(batch, time).flatten()
    h_MH = (hidden_BTH.detach() if detached else hidden_BTH).flatten(0, 1)
    total = h_MH.new_zeros((), dtype=float_of(h_MH.dtype))
    for i, module in enumerate(mtp.layers, 1):
        # Columns from T − i on get token 0. Nothing real looks to the right, so they do no harm.
        attend = CausalAttend(mtp.config, batch, time)
        h_MH = module(shared, h_MH, ahead(ids_BT, i).flatten(), position_M, attend)
        real_M = (column_T + i + 1 < lengths_B[:, None]).flatten()
        target_m = ahead(ids_BT, i + 1).flatten()[real_M]
        if len(target_m):
            total = total + F.cross_entropy(module.logits(shared, h_MH[real_M]), target_m)
    return total / mtp.count


def ahead(ids_BT: Tensor, by: int) -> Tensor:
    """Column t holds what column t + `by` held; zeros follow the last."""
    return F.pad(ids_BT[:, by:], (0, min(by, ids_BT.shape[1])))


@dataclass(frozen=True)
class MTPSchedule:
    """Weight of the loss and who trains, as functions of the step alone (report §2.3).

    The weight is `first` until the last `decay_steps` of `steps`, in which it falls linearly to
    `last`. For `frozen_steps` from `grown_at` on, the step at which modules were added, the main
    model is frozen and only the modules train.
    """

    steps: int
    decay_steps: int = 0
    first: float = 0.3
    last: float = 0.1
    grown_at: int = 0
    frozen_steps: int = 0

    def weight(self, step: int) -> float:
        """Of `mtp_loss` at this step, counted from 0."""
        start = self.steps - self.decay_steps
        if step < start or not self.decay_steps:
            return self.first
        share = min(1.0, (step - start + 1) / self.decay_steps)
        return self.first + (self.last - self.first) * share

    def frozen(self, step: int) -> bool:
        """True while the main model stands still."""
        return self.grown_at <= step < self.grown_at + self.frozen_steps


def settled(losses: Sequence[float], *, window: int = 20, tolerance: float = 0.01) -> bool:
    """True once the last `window` losses are on average no more than the share `tolerance` below
    the `window` before: the report's sign for going from frozen to joint training."""
    if len(losses) < 2 * window:
        return False
    before = sum(losses[-2 * window : -window])
    return before - sum(losses[-window:]) <= tolerance * abs(before)


# -------------------------------------------------------------------------------------- growing


def grow(mtp: MTP, count: int, *, model: Transformer | None = None, layer: int = -1) -> MTP:
    """`count` modules, of which the first are `mtp`'s own and the rest copies.

    Without `model` they are copies of module 1 (the arrow of the report's Figure 2). With `model`
    their blocks are copies of its layer `layer` (the report's text; it does not say which layer,
    −1 is the last), and norms and projection those of module 1, which the main model lacks.
    Raises ModelError where the sizes differ or there is nothing to grow.
    """
    if count <= mtp.count:
        raise ModelError(f"mtp: {mtp.count} modules cannot grow to {count}; ask for more")
    grown = MTP(mtp.config, count, seed=None).to(mtp.layers[0].eh_proj.device)
    grown.cast(mtp.layers[0].eh_proj.dtype)
    for i, module in enumerate(grown.layers):
        module.load_state_dict(mtp.layers[i if i < mtp.count else 0].state_dict())
        if model is not None and i >= mtp.count:
            copy_block(module, model, layer)
    return grown


def copy_block(module: MTPModule, model: Transformer, layer: int = -1) -> None:
    """Give a module the block of one of the main model's layers. Raises ModelError where the
    sizes differ."""
    try:
        source = model.layers[layer].state_dict()
    except IndexError:
        raise ModelError(f"mtp: the model has {len(model.layers)} layers, not {layer}") from None
    own = module.block.state_dict()
    for name, tensor in source.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ModelError(
                f"mtp: {name} of the model's layer has another shape than the module's; modules "
                "that are copied from a layer need the main model's own sizes"
            )
    module.block.load_state_dict(source)


def begin_like(module: MTPModule, model: Transformer, layer: int = -1) -> None:
    """Give a module the attention and norms of a layer, and the model's last norm; its experts stay
    as they are. For blocks with fewer or narrower experts than the model's."""
    source = model.layers[layer]
    module.block.self_attn.load_state_dict(source.self_attn.state_dict())
    for name in ("input_layernorm", "post_attention_layernorm"):
        getattr(module.block, name).load_state_dict(getattr(source, name).state_dict())
    module.norm.load_state_dict(model.norm.state_dict())

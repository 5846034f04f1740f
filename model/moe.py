"""Mixture of experts: the router, shared experts, load balancing and routing replay.

Shapes: L layers, M tokens, k experts a token, E experts, H hidden size, I expert width, O = 2·I,
S width of the shared experts, Q = 2·S.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.errors import ModelError
from model.experts import DENSE_LIMIT, run_experts


def float_of(dtype: torch.dtype) -> torch.dtype:
    """float32 for the short types, else the type itself (so float64 stays exact)."""
    return torch.promote_types(dtype, torch.float32)


def needs_no_host(tokens: int, experts: int, device: torch.device, dtype: torch.dtype) -> bool:
    """True where `run_experts` without gradients never waits for the device, as graphs need it."""
    return device.type == "cuda" and (tokens * experts <= DENSE_LIMIT or dtype == torch.bfloat16)


class RoutingTape:
    """What the routers do in one pass through a model, and what they are told to do.

    `forced_LMk` (whole numbers) is an earlier pass's choice of experts, to be repeated: the weights
    are computed anew from the current scores, so the router keeps its gradient (rollout routing
    replay, R3). A token whose first entry is negative chooses for itself. `multiplicity_M` says for
    how many samples each token stands (0: padding); without it each counts once.

    After the pass, of every layer that ran: `choices` (M, k) in the shortest whole type, where
    `keep_choices` asked for them, `load_LE`, and `aux_loss`. A layer that runs again, because its
    activations are recomputed, is noted once. One tape serves one pass.
    """

    def __init__(
        self,
        forced_LMk: Tensor | None = None,
        multiplicity_M: Tensor | None = None,
        keep_choices: bool = False,
    ) -> None:
        self.forced_LMk = forced_LMk
        self.multiplicity_M = multiplicity_M
        self.keep_choices = keep_choices
        self._choices: dict[int, Tensor] = {}
        self._loads: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}

    def begin(self, config: ModelConfig, tokens: int) -> None:
        """Raise ModelError if what the tape holds does not fit a pass of so many tokens.

        Ids are looked at only on a CPU: elsewhere the host would have to wait for the device.
        """
        if self._loads:
            raise ModelError("a routing tape holds an earlier pass; make a new one for each pass")
        experts = config.num_local_experts
        if self.forced_LMk is not None:
            asked = (config.num_hidden_layers, tokens, config.num_experts_per_tok)
            forced_LMk, shape = self.forced_LMk, tuple(self.forced_LMk.shape)
            if shape != asked or forced_LMk.is_floating_point():
                raise ModelError(
                    f"forced routing is {forced_LMk.dtype} {shape}; whole numbers of shape "
                    f"(layers, tokens, experts a token) = {asked} are needed"
                )
            if not forced_LMk.is_cuda and tokens and int(forced_LMk.max()) >= experts:
                raise ModelError(
                    f"forced routing names expert {int(forced_LMk.max())}; the model has {experts} "
                    "a layer, counted from 0"
                )
        if self.multiplicity_M is not None and tuple(self.multiplicity_M.shape) != (tokens,):
            raise ModelError(
                f"multiplicity has shape {tuple(self.multiplicity_M.shape)}; one number for each "
                f"of the {tokens} tokens is needed"
            )

    def forced(self, layer: int, device: torch.device) -> Tensor | None:
        """What this layer's tokens must choose, (M, k) int64, or None."""
        if self.forced_LMk is None:
            return None
        return self.forced_LMk[layer].to(device, torch.long, non_blocking=True)

    def note(self, layer: int, scores_ME: Tensor, experts_Mk: Tensor) -> None:
        """Called by each layer's router."""
        count = scores_ME.shape[1]
        if self.multiplicity_M is None:
            times_M = scores_ME.new_ones(len(scores_ME))
        else:
            times_M = self.multiplicity_M.to(scores_ME.device, scores_ME.dtype)
        load_E = expert_load(experts_Mk, count, times_M)
        # Counts of tokens are constants: the gradient goes through the mean probability only.
        share_E = load_E / load_E.sum().clamp_min(1)
        odds_ME = scores_ME / scores_ME.sum(-1, keepdim=True)
        mean_E = (times_M @ odds_ME) / times_M.sum().clamp_min(1)
        loss = count * (share_E @ mean_E)
        if layer in self._loads:
            return
        self._loads[layer], self._losses[layer] = load_E, loss
        if self.keep_choices:
            short = torch.uint8 if count <= 256 else torch.int16
            self._choices[layer] = experts_Mk.to(short)

    @property
    def choices(self) -> list[Tensor]:
        """The experts chosen in each layer, (M, k)."""
        return [self._choices[layer] for layer in sorted(self._choices)]

    @property
    def load_LE(self) -> Tensor:
        """How many tokens chose each expert in each layer, by multiplicity."""
        self._check()
        return torch.stack([self._loads[layer] for layer in sorted(self._loads)])

    @property
    def aux_loss(self) -> Tensor:
        """Mean over layers of E·Σ_e f_e·P_e: f is each expert's share of the choices, P the mean of
        its score divided by the token's sum of scores. 1 where both are even.

        Switch Transformer (Fedus et al. 2021, §2.2), for k choices; multiply by the coefficient.
        """
        self._check()
        return torch.stack(list(self._losses.values())).mean()

    def _check(self) -> None:
        if not self._loads:
            raise ModelError("a routing tape is read before a pass wrote it; pass it to the model")


@torch.no_grad()
def expert_load(experts_Mk: Tensor, count: int, times_M: Tensor) -> Tensor:
    """(E,) how often each expert was chosen, token m counted times_M[m] times. No atomics."""
    chosen_ME = times_M.new_zeros(len(experts_Mk), count).scatter_(1, experts_Mk, 1.0)
    return times_M @ chosen_ME


class MoE(nn.Module):
    """One layer's router, experts and shared experts; parameters are stacked over experts.

    `w13_EOH` (E, 2·I, H) holds w1 (gate) above w3 (up); `w2_EIH` (E, I, H) is w2 transposed, so
    that all experts' down products are also one matrix (E·I, H). Shared experts (DeepSeekMoE, Dai
    et al. 2024, §3.2) are one SwiGLU `shared_w13_QH`, `shared_w2_HS` that every token visits, with
    weight one. `gate_EH` and `e_score_correction_bias` stay float32 in every model. The bias is a
    buffer: it steers only the choice of experts, so no gradient reaches it; `balance` moves it.
    """

    load_E: Tensor | None = None

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        experts, hidden, width = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.layer = layer
        self.top_k = config.num_experts_per_tok
        self.softmax = config.scoring_func == "softmax"
        self.normed = config.norm_topk_prob
        self.gate_EH = nn.Parameter(torch.empty(experts, hidden))
        self.w13_EOH = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.w2_EIH = nn.Parameter(torch.empty(experts, width, hidden))
        self.shared_w13_QH: nn.Parameter | None = None
        self.shared_w2_HS: nn.Parameter | None = None
        if shared := config.shared_intermediate_size:
            self.shared_w13_QH = nn.Parameter(torch.empty(2 * shared, hidden))
            self.shared_w2_HS = nn.Parameter(torch.empty(hidden, shared))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def route(self, x_MH: Tensor, tape: RoutingTape | None = None) -> tuple[Tensor, Tensor]:
        """Weights (M, k) and expert ids (M, k) of each token.

        The bias enters the choice only; the weights are the chosen experts' own scores, divided by
        their sum where `norm_topk_prob` says so.
        """
        wide = float_of(x_MH.dtype)
        logits_ME = F.linear(x_MH.to(wide), self.gate_EH.to(wide))
        scores_ME = logits_ME.softmax(-1) if self.softmax else logits_ME.sigmoid()
        with torch.no_grad():
            ranked_ME = scores_ME + self.e_score_correction_bias
            experts_Mk = ranked_ME.topk(self.top_k, dim=-1, sorted=False).indices
            forced_Mk = None if tape is None else tape.forced(self.layer, x_MH.device)
            if forced_Mk is not None:
                experts_Mk = torch.where(forced_Mk[:, :1] < 0, experts_Mk, forced_Mk)
        weights_Mk = scores_ME.gather(1, experts_Mk)
        if self.normed:
            weights_Mk = weights_Mk / weights_Mk.sum(-1, keepdim=True)
        if tape is not None:
            tape.note(self.layer, scores_ME, experts_Mk)
        return weights_Mk, experts_Mk

    def forward(self, x_MH: Tensor, tape: RoutingTape | None = None) -> Tensor:
        weights_Mk, experts_Mk = self.route(x_MH, tape)
        if self.load_E is not None:
            ones_M = weights_Mk.new_ones(len(x_MH))
            self.load_E += expert_load(experts_Mk, len(self.load_E), ones_M).long()
        out_MH = run_experts(x_MH, weights_Mk, experts_Mk, self.w13_EOH, self.w2_EIH)
        if self.shared_w13_QH is not None and self.shared_w2_HS is not None:
            gate_MS, up_MS = F.linear(x_MH, self.shared_w13_QH).chunk(2, dim=-1)
            out_MH = out_MH + F.linear(F.silu(gate_MS) * up_MS, self.shared_w2_HS)
        return out_MH

    def track_load(self, on: bool) -> None:
        """Count, from now on, how many tokens each expert gets (for `balance`)."""
        device = self.gate_EH.device
        self.load_E = (
            torch.zeros(len(self.gate_EH), device=device, dtype=torch.long) if on else None
        )

    @torch.no_grad()
    def balance(self, rate: float, load_E: Tensor | None = None) -> None:
        """Move the bias by ± `rate` towards even load.

        The load is `load_E`, for instance a tape's, or else what was counted since the last call.
        Auxiliary-loss-free balancing (Wang et al. 2024), which the M2 report cites (§2.2.1).
        """
        if load_E is None and self.load_E is not None:
            load_E = self.load_E.clone()
            self.load_E.zero_()
        if load_E is not None:
            load_E = load_E.to(self.e_score_correction_bias)
            self.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)

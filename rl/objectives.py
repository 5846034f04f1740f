"""The policy-gradient objectives behind one function type: tokens in, loss and statistics out.

    cispo      − Σ s · sg(min(r, w_max)) · M · A · log π        (MiniMax-M1 §3.1; M2 report Eq. 4)
    ppo_clip   − Σ s · min(r · A, clip(r, 1 − ε_low, 1 + ε_high) · A)   (Schulman et al. 2017)
    grpo       the same, with s and A as below                   (Shao et al. 2024, without its KL)
    reinforce  − Σ s · A · log π                                   (Williams 1992)

r = exp(clamp(log π − log μ, −20, 20)) against the log-prob *recorded while sampling*, whatever
the objective. `s` is the token's share of the mean: one over all trained tokens of the optimiser
step ("token"), or one over (calls × the call's own tokens) ("sequence", GRPO's). `M` is M1's mask,
all ones unless asked for: 0 where A > 0 and r > 1 + mask_high, or A < 0 and r < 1 − mask_low.

Without reuse of a batch and without lag every r is 1 (up to the engines' rounding), and then all of
them have the gradient of `reinforce`: ceilings and clips act from the second update on.

Shape: n trained tokens of a micro-batch; what is not to be trained is left out before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rl.config import RunConfig
from rl.objective_text import Reduction, cispo_text, clip_text, reinforce_text

LOG_RATIO_BOUND = 20.0


@dataclass(frozen=True)
class Tokens:
    """What a loss sees. `logp_n` carries the graph; `share_n` is s; all in nats, one a token."""

    logp_n: Tensor
    rollout_n: Tensor
    advantage_n: Tensor
    share_n: Tensor


@dataclass(frozen=True)
class Terms:
    """Sums over one micro-batch; add them over micro-batches. `loss` carries the graph.

    `capped` counts the tokens whose weight was cut (cispo) or whose gradient the clip or mask took.
    `kl_*`: the k3 estimate of KL(μ ‖ π), exp(d) − 1 − d with d = log π − log μ.
    """

    loss: Tensor
    tokens: int
    weight_sum: float
    weight_max: float
    capped: int
    kl_sum: float
    kl_max: float


Loss = Callable[[Tokens], Terms]


@dataclass(frozen=True)
class Objective:
    """A loss, how it is averaged, whose deviation divides the advantages, and the line that is
    printed at the start: band, anchor and denominator."""

    name: str
    loss: Loss
    reduction: Reduction
    advantage_std: Literal["batch", "group"]
    text: str


def cispo(
    is_weight_max: float, mask_low: float | None = None, mask_high: float | None = None
) -> Objective:
    """`is_weight_max` is the ceiling of the weight itself (the reports' 1 + ε_high), inclusive."""

    def loss(tokens: Tokens) -> Terms:
        ratio_n = _ratio(tokens)
        weight_n = ratio_n.clamp(max=is_weight_max)
        masked_n = _m1_mask(tokens.advantage_n, ratio_n, mask_low, mask_high)
        part_n = weight_n * ~masked_n * tokens.advantage_n * tokens.logp_n
        return _terms(tokens, part_n, weight_n, (ratio_n > is_weight_max) | masked_n)

    text = cispo_text(is_weight_max, mask_low, mask_high)
    return Objective("cispo", loss, "token", "batch", text)


def ppo_clip(low: float, high: float) -> Objective:
    """PPO's clipped surrogate, token mean, batch-normalised advantages."""
    text = clip_text("ppo_clip", low, high, "token")
    return Objective("ppo_clip", _clipped(low, high), "token", "batch", text)


def grpo(low: float, high: float) -> Objective:
    """The clipped surrogate as GRPO averages it: mean over a call's tokens, then over calls, and
    advantages divided by their own group's deviation."""
    text = clip_text("grpo", low, high, "sequence")
    return Objective("grpo", _clipped(low, high), "sequence", "group", text)


def reinforce() -> Objective:
    """No ratio at all: wrong by exactly the ratio where policies differ."""

    def loss(tokens: Tokens) -> Terms:
        part_n = tokens.advantage_n * tokens.logp_n
        none_n = torch.zeros_like(tokens.logp_n, dtype=torch.bool)
        return _terms(tokens, part_n, torch.ones_like(part_n).detach(), none_n)

    return Objective("reinforce", loss, "token", "batch", reinforce_text())


def of_config(config: RunConfig) -> Objective:
    """The run's objective. ValueError for expert iteration, which has no policy gradient."""
    if config.objective == "cispo":
        c = config.cispo
        return cispo(c.is_weight_max, c.mask_low, c.mask_high)
    if config.objective == "grpo":
        return grpo(config.grpo.low, config.grpo.high)
    if config.objective == "ppo_clip":
        return ppo_clip(config.ppo_clip.low, config.ppo_clip.high)
    if config.objective == "reinforce":
        return reinforce()
    raise ValueError(f"{config.objective} has no policy gradient")


def _clipped(low: float, high: float) -> Loss:
    def loss(tokens: Tokens) -> Terms:
        log_ratio_n = tokens.logp_n - tokens.rollout_n.to(tokens.logp_n.dtype)
        ratio_n = log_ratio_n.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        free_n = ratio_n * tokens.advantage_n
        held_n = ratio_n.clamp(1 - low, 1 + high) * tokens.advantage_n
        return _terms(tokens, torch.minimum(free_n, held_n), ratio_n.detach(), held_n < free_n)

    return loss


def _ratio(tokens: Tokens) -> Tensor:
    rollout_n = tokens.rollout_n.to(tokens.logp_n.dtype)
    log_ratio_n = tokens.logp_n.detach() - rollout_n
    return log_ratio_n.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def _m1_mask(advantage_n: Tensor, ratio_n: Tensor, low: float | None, high: float | None) -> Tensor:
    masked_n = torch.zeros_like(ratio_n, dtype=torch.bool)
    if high is not None:
        masked_n |= (advantage_n > 0) & (ratio_n > 1 + high)
    if low is not None:
        masked_n |= (advantage_n < 0) & (ratio_n < 1 - low)
    return masked_n


def _terms(tokens: Tokens, part_n: Tensor, weight_n: Tensor, capped_n: Tensor) -> Terms:
    loss = -(tokens.share_n.to(part_n.dtype) * part_n).sum()
    with torch.no_grad():
        # in float64: d² / 2 of a tiny d is lost in float32
        d_n = (tokens.logp_n.detach() - tokens.rollout_n).double()
        d_n = d_n.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        kl_n = torch.expm1(d_n) - d_n
        empty = len(d_n) == 0
        sums = torch.stack(
            [
                weight_n.double().sum(),
                weight_n.double().amax() if not empty else d_n.new_zeros(()),
                capped_n.double().sum(),
                kl_n.sum(),
                kl_n.amax() if not empty else d_n.new_zeros(()),
            ]
        ).tolist()  # one wait for the device
    return Terms(loss, len(d_n), sums[0], sums[1], int(sums[2]), sums[3], sums[4])


def shares(lengths: Tensor, reduction: Reduction, tokens: int, calls: int) -> Tensor:
    """s of every token of calls with these many trained tokens, call after call (n).

    tokens, calls: of the *whole* optimiser step, counted before the first backward pass, so that
    any split into micro-batches gives the same gradient.
    """
    if reduction == "token":
        share_C = torch.full((len(lengths),), 1.0 / tokens, dtype=torch.float64)
    else:
        share_C = 1.0 / (calls * lengths.double())
    return share_C.repeat_interleave(lengths)

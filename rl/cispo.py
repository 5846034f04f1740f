"""CISPO: clipped importance-sampling policy optimisation (MiniMax-M1 §3.1; M2 report Eq. 4).

    loss = − Σ_t sg(min(r_t, is_weight_max)) · A_t · log π(o_t)  /  N
    r_t  = exp(clamp(log π(o_t) − log μ(o_t), −20, 20))

`log μ` is the log-probability *recorded while sampling* (never recomputed), there is no floor, no
token is ever dropped for its ratio, and the gradient flows through `log π` only. `N` is the number
of trained tokens of the whole optimiser step, counted before the first backward pass, so that any
split in micro-batches gives the same gradient.

Shape legend: B rows of a micro-batch, T tokens of a row (right-padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0


@dataclass(frozen=True)
class CispoTerms:
    """Sums over one micro-batch; add them over micro-batches. `loss` carries the graph."""

    loss: Tensor
    tokens: int
    weight_sum: float
    weight_max: float
    capped: int
    kl_sum: float
    kl_max: float


def cispo_terms(
    logp_BT: Tensor,
    rollout_logp_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    *,
    is_weight_max: float,
    denominator: int,
) -> CispoTerms:
    """The micro-batch's share of the step's loss, and its statistics.

    logp_BT: log π of the sampled ids (nats), with graph. rollout_logp_BT: recorded log μ.
    advantage_B or (B, T): advantages. mask_BT: True on trained tokens.
    denominator: trained tokens of the *whole* optimiser step (> 0).

    `kl_*` are the k3 estimate of KL(μ ‖ π), exp(d) − 1 − d with d = log π − log μ, in nats.
    """
    if denominator <= 0:
        raise ValueError("denominator must count at least one trained token")
    advantage_BT = advantage_B if advantage_B.dim() == 2 else advantage_B[:, None]
    # masked positions may hold NaN or -inf: replaced before any arithmetic (NaN · 0 is NaN)
    logp_BT = torch.where(mask_BT, logp_BT, torch.zeros_like(logp_BT))
    rollout_BT = torch.where(mask_BT, rollout_logp_BT, torch.zeros_like(rollout_logp_BT))
    rollout_BT = rollout_BT.to(logp_BT.dtype)

    log_ratio_BT = (logp_BT.detach() - rollout_BT).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio_BT = log_ratio_BT.exp()
    weight_BT = ratio_BT.clamp(max=is_weight_max)
    terms_BT = weight_BT * advantage_BT.to(logp_BT.dtype) * logp_BT * mask_BT
    loss = -terms_BT.sum() / denominator

    with torch.no_grad():
        # in float64: d² / 2 of a tiny d is lost in float32
        d_BT = log_ratio_BT.double()
        kl_BT = (torch.expm1(d_BT) - d_BT) * mask_BT
        tokens = int(mask_BT.sum())
        empty = tokens == 0
        return CispoTerms(
            loss=loss,
            tokens=tokens,
            weight_sum=float((weight_BT * mask_BT).sum()),
            weight_max=0.0 if empty else float(weight_BT[mask_BT].max()),
            capped=int(((ratio_BT > is_weight_max) & mask_BT).sum()),
            kl_sum=float(kl_BT.sum()),
            kl_max=0.0 if empty else float(kl_BT.max()),
        )


def describe(is_weight_max: float) -> str:
    """What is printed at the start of a run: band, anchor, denominator."""
    return (
        f"cispo: importance weight in [0, {is_weight_max:g}] (no floor, ceiling inclusive) · "
        "anchor: recorded rollout log-probs · "
        "denominator: all trained tokens of the optimiser step"
    )

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

import torch
from torch import Tensor

from rl import objectives
from rl.objectives import Terms, Tokens


def cispo_terms(
    logp_BT: Tensor,
    rollout_logp_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    *,
    is_weight_max: float,
    denominator: int,
) -> Terms:
    """The micro-batch's share of the step's loss, and its statistics (`rl.objectives.cispo`).

    logp_BT: log π of the sampled ids (nats), with graph. rollout_logp_BT: recorded log μ.
    advantage_B or (B, T): advantages. mask_BT: True on trained tokens; the others may hold NaN.
    denominator: trained tokens of the *whole* optimiser step (> 0).
    """
    if denominator <= 0:
        raise ValueError("denominator must count at least one trained token")
    advantage_BT = advantage_B if advantage_B.dim() == 2 else advantage_B[:, None]
    logp_n = logp_BT[mask_BT]
    tokens = Tokens(
        logp_n,
        rollout_logp_BT[mask_BT].to(logp_n.dtype),
        advantage_BT.expand_as(mask_BT)[mask_BT].to(logp_n.dtype),
        torch.full_like(logp_n, 1 / denominator, requires_grad=False),
    )
    return objectives.cispo(is_weight_max).loss(tokens)


def describe(is_weight_max: float) -> str:
    """What is printed at the start of a run: band, anchor, denominator."""
    return objectives.cispo(is_weight_max).text

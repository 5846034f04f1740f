"""The loss that trains modules as draft heads of a policy that stands still: top-K KL.

    KL(policy ‖ draft) over the policy's K likeliest tokens and one bucket for all the others

Hidden states and policy logits are taken without gradients and the shared weights detached: nothing
reaches the policy. Depth d beyond the number of modules is the last module on its own output, and
is trained on what it then sees: the text as far as it is verified, and its own guesses after it.

Source: Forge's "dynamic MTP" (blog): detached heads trained by top-K KL; K, the direction and the
weights are not published, ours are choices. Shapes: B rows, T columns, M = B·T, m picked tokens,
H hidden size, V vocabulary, K tokens of the policy, N query heads, k key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import rows_first, scaled_attention
from model.moe import float_of
from model.mtp import MTP, Shared, ahead
from model.transformer import Transformer

TOP_K = 32


def top_k_kl(policy_mV: Tensor, draft_mV: Tensor, top_k: int = TOP_K) -> Tensor:
    """KL (m) in nats of log-probs or logits; the policy's are detached. Zero only where the draft
    gives the policy's K likeliest tokens their probabilities. With K ≥ V − 1 it is the full KL."""
    policy_mV = policy_mV.detach().log_softmax(-1)
    draft_mV = draft_mV.log_softmax(-1)
    top_k = min(top_k, policy_mV.shape[1])
    p_mK, index_mK = policy_mV.topk(top_k, dim=-1)
    q_mK = draft_mV.gather(1, index_mK)
    total = (p_mK.exp() * (p_mK - q_mK)).sum(-1)
    if top_k == policy_mV.shape[1]:
        return total
    # Sums over all the others: log(1 − Σ top) would lose every digit of a small rest.
    p_m, q_m = (
        x_mV.scatter(1, index_mK, -torch.inf).logsumexp(-1) for x_mV in (policy_mV, draft_mV)
    )
    return total + p_m.exp() * (p_m - q_m)


@dataclass(frozen=True)
class DraftLoss:
    """`loss` to minimise: the mean over depths of the mean KL; `kl` (depths) and `overlap`
    (depths), the mean of Σ min(policy, draft): the chance that a draft of this depth is accepted if
    those before it were."""

    loss: Tensor
    kl: Tensor
    overlap: Tensor


def draft_loss(
    model: Transformer,
    mtp: MTP,
    ids_BT: Tensor,
    first_B: Tensor,
    lengths_B: Tensor,
    *,
    depths: int,
    top_k: int = TOP_K,
    temperature: float = 1.0,
) -> DraftLoss:
    """For right-padded rows, over the tokens that follow column `first_B` (the prompt's end).

    Depth d at column t predicts the policy's distribution of token t + d + 1, both at
    `temperature`. Raises ModelError where the modules do not fit the model.
    """
    mtp.check_fits(model)
    shared = Shared.of(model, detached=True)
    with torch.no_grad():
        hidden_BTH = model.hidden(ids_BT)
        column_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        said_BT = (column_T >= first_B[:, None] - 1) & (column_T < lengths_B[:, None] - 1)
        # Column t of `policy` is what the policy thinks of token t + 1, where it is to be said.
        policy_mV = model.head(hidden_BTH[said_BT]) / temperature
        place_BT = said_BT.flatten().cumsum(0).view_as(said_BT) - 1
    kls, overlaps = [], []
    for d, (module_at, h_MH) in enumerate(_depths(mtp, shared, hidden_BTH, ids_BT, depths), 1):
        # The policy's column is t + d: later tokens of the reply only, so that each depth draws on
        # drafts that were possible.
        real_BT = said_BT & (column_T + d < lengths_B[:, None] - 1)
        if not bool(real_BT.any()):
            break
        draft_mV = mtp.layers[module_at].logits(shared, h_MH[real_BT.flatten()]) / temperature
        target_mV = policy_mV[ahead(place_BT, d)[real_BT]]
        kls.append(top_k_kl(target_mV, draft_mV, top_k).mean())
        with torch.no_grad():
            both = torch.minimum(target_mV.softmax(-1), draft_mV.softmax(-1))
            overlaps.append(both.sum(-1).mean())
    if not kls:
        zero = torch.zeros((), device=ids_BT.device, dtype=float_of(model.dtype))
        return DraftLoss(zero, zero[None][:0], zero[None][:0])
    kl = torch.stack(kls)
    return DraftLoss(kl.mean(), kl.detach(), torch.stack(overlaps))


def _depths(
    mtp: MTP, shared: Shared, hidden_BTH: Tensor, ids_BT: Tensor, depths: int
) -> list[tuple[int, Tensor]]:
    """(module, hidden states (M, H)) of each depth."""
    batch, time = ids_BT.shape
    column_T = torch.arange(time, device=ids_BT.device)
    last_position = len(shared.rotary[0]) - 1
    h_MH = hidden_BTH.detach().flatten(0, 1)
    chain = ChainAttend(batch, time)
    out = []
    for d in range(1, depths + 1):
        index = min(d, mtp.count) - 1
        attend = chain if index == mtp.count - 1 else ChainAttend(batch, time)
        # A module that is used again stands one position further each time.
        column = (column_T + max(0, d - mtp.count)).clamp_max(last_position)
        position_M = column.expand(batch, time).flatten()
        h_MH = mtp.layers[index](shared, h_MH, ahead(ids_BT, d).flatten(), position_M, attend)
        out.append((index, h_MH))
    return out


class ChainAttend:
    """Attention of a module that is used again and again on its own output.

    The first use is causal. Column t of a later use sees the first use's columns up to t, and of
    every later one column t alone: what the cache holds when drafts are chained after column t.
    """

    def __init__(self, batch: int, time: int) -> None:
        self.shape = (batch, time)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        q, k, v = (rows_first(x, self.shape) for x in (q_MND, k_MKD, v_MKD))
        self.keys.append(k)
        self.values.append(v)
        mask_TS = None
        if len(self.keys) > 1:
            own_TT = torch.eye(self.shape[1], dtype=torch.bool, device=q.device)
            up_to_TT = torch.ones_like(own_TT).tril()
            mask_TS = torch.cat([up_to_TT, *[own_TT] * (len(self.keys) - 1)], dim=1)
        keys, values = torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)
        out = scaled_attention(q, keys, values, mask_TS, causal=mask_TS is None)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)

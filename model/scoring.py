"""Log-probabilities of given tokens, as the trainer sees them. Shapes: B rows, T columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import loss_kernels
from model.errors import ModelError
from model.shared_prefix import lay_out
from model.transformer import Transformer

# Logits are made in pieces of this many numbers, each remade in the backward pass when there is
# more than one: a large vocabulary then costs no memory.
PIECE_NUMBERS = 2**27


@dataclass(frozen=True)
class TokenScores:
    """log p(ids[t] | ids[<t]) and, without gradient, the entropy it was drawn from; both (B, T).

    Column 0, padding, and positions that were not asked for hold 0.
    """

    logp_BT: Tensor
    entropy_BT: Tensor


def score_tokens(
    model: Transformer,
    ids_BT: Tensor,
    lengths_B: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    wanted_BT: Tensor | None = None,
) -> TokenScores:
    """Score right-padded rows, differentiably; `temperature` may be one number a row (B).

    `wanted_BT` (bool) limits the output head to these tokens (a response, not its prompt). Work is
    spent on real tokens only, so rows of very different length cost no more than even ones; and
    what rows have in common to the left is computed once (`shared_prefix`).
    Raises ModelError for lengths beyond the columns and rows beyond the model's context.
    """
    batch, time = ids_BT.shape
    lengths_B = lengths_B.to(ids_BT.device)
    longest = int(lengths_B.max())
    if longest > min(time, model.config.max_position_embeddings):
        raise ModelError(
            f"a length of {longest} in rows of {time} tokens and a context of "
            f"{model.config.max_position_embeddings}; shorten the row"
        )
    column_T = torch.arange(time, device=ids_BT.device)
    wanted = (column_T < lengths_B[:, None]) & (column_T > 0)
    if wanted_BT is not None:
        wanted = wanted & wanted_BT
    row_n, column_n = wanted.nonzero(as_tuple=True)
    if not len(row_n):
        nothing_BT = torch.zeros(batch, time, device=ids_BT.device)
        return TokenScores(nothing_BT, nothing_BT)
    layout = lay_out(ids_BT, lengths_B, model.config, tree=ids_BT.is_cuda)
    x_MH = model.run(ids_BT[layout.row_M, layout.column_M], layout.column_M, layout.attend)
    x_nH = x_MH.index_select(0, layout.at_BT[row_n, column_n - 1])
    if isinstance(temperature, Tensor):
        scale_n1 = temperature.to(x_nH.device)[row_n, None]
    else:
        scale_n1 = torch.full((1, 1), temperature, device=x_nH.device)
    logp_n, entropy_n = score_hidden(model, x_nH, ids_BT[row_n, column_n], scale_n1)
    zeros_BT = logp_n.new_zeros(batch, time)
    place = (row_n, column_n)
    return TokenScores(zeros_BT.index_put(place, logp_n), zeros_BT.index_put(place, entropy_n))


def token_logprobs(
    model: Transformer, ids_BT: Tensor, lengths_B: Tensor, temperature: float = 1.0
) -> Tensor:
    """log p(ids[t] | ids[<t]) at this temperature, (B, T); column 0 and padding hold 0."""
    return score_tokens(model, ids_BT, lengths_B, temperature=temperature).logp_BT


def score_hidden(
    model: Transformer, x_nH: Tensor, target_n: Tensor, scale_n1: Tensor
) -> tuple[Tensor, Tensor]:
    """log p(target) and, without gradient, the entropy (both n) after normed hidden states;
    `scale_n1` is the temperature, one number or one a token."""

    def piece(x: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        logp_nV = F.log_softmax(model.head(x) / scale, dim=-1)
        with torch.no_grad():
            entropy_n = -(logp_nV.exp() * logp_nV).sum(-1)
        return logp_nV.gather(1, target[:, None])[:, 0], entropy_n

    size = max(1, PIECE_NUMBERS // model.config.vocab_size)
    if loss_kernels.suits(x_nH, model.lm_head):
        scale_n = scale_n1[:, 0].expand(len(x_nH))
        return loss_kernels.head_scores(x_nH, model.lm_head, target_n, scale_n, size)
    if len(x_nH) <= size:
        return piece(x_nH, target_n, scale_n1)
    values = (x_nH, target_n, scale_n1.expand(len(x_nH), 1))
    parts = [
        checkpoint(piece, x, target, scale, use_reentrant=False)
        for x, target, scale in zip(*(torch.split(v, size) for v in values), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

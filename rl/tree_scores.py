"""Log-probs of all calls of a prefix tree from one forward pass.

Shapes: M packed tokens, n trained tokens, u distinct (predictor, target) pairs, H hidden size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.moe import RoutingTape, float_of
from model.scoring import score_hidden
from model.transformer import Transformer
from model.upload import upload
from model.visible import Visibility, VisibleAttend
from rl.prefix_tree import Ints, Pack


def score_pack(
    model: Transformer, pack: Pack, temperature: float, tape: RoutingTape | None = None
) -> tuple[Tensor, Tensor]:
    """log π of every trained token, differentiably, and the entropy it was drawn from (both n,
    call after call, as the pack lists them)."""
    ids_M, depth_M, tout_M = (
        upload(x, model.device) for x in (pack.ids_M, pack.depth_M, pack.tout_M)
    )
    attend = VisibleAttend(Visibility(tout_M, depth_M), model.config)
    x_MH = model.run(ids_M, depth_M, attend, tape)
    return score_pairs(model, x_MH, pack.predictor_n, pack.target_n, temperature)


def score_pairs(
    model: Transformer, x_MH: Tensor, predictor_n: Ints, target_n: Ints, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p(target) and, without gradient, entropy (both n) after the hidden states of predictors.

    The output head is computed once for each distinct pair of predictor and target: a token that
    several calls sampled after the same prefix is one row of it, gathered several times.
    """
    device = model.device
    pair_u, which_n = np.unique(
        predictor_n * model.config.vocab_size + target_n, return_inverse=True
    )
    predictor_u, target_u = np.divmod(pair_u, model.config.vocab_size)
    x_uH = x_MH.index_select(0, upload(predictor_u, device))
    scale = torch.full((1, 1), temperature, device=device, dtype=float_of(x_uH.dtype))
    logp_u, entropy_u = score_hidden(model, x_uH, upload(target_u, device), scale)
    if len(pair_u) == len(predictor_n) and bool((np.diff(which_n) == 1).all()):
        return logp_u, entropy_u
    which = upload(which_n, device)
    return logp_u.index_select(0, which), entropy_u.index_select(0, which)

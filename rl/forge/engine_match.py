"""Whether trainer and engine are the same model: their log-probs of the same tokens compared.

Shapes: B rows, T tokens, n compared tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.scoring import score_tokens
from rl.trainer import Trainer
from rl.types import CallRecord


@torch.no_grad()
def engine_match(
    trainer: Trainer, calls: Sequence[CallRecord], temperature: float, limit: int
) -> dict[str, Any]:
    """Before the update, on at most `limit` calls that the engine made with exactly the trainer's
    present weights: the mismatch at learning rate zero (k3, nats a token), and the correlation of
    log-probs and of probabilities (MiniMax-M1 §3.2). In step 1 that is every call; without such
    calls there are no keys."""
    fresh = [c for c in calls if all(of == trainer.version for _, _, of in c.versions)]
    chosen = [c for c in fresh if c.response_ids][:limit]
    if not chosen:
        return {}
    lengths = [len(c.prompt_ids) + len(c.response_ids) for c in chosen]
    ids_BT = torch.zeros(len(chosen), max(lengths), dtype=torch.long)
    for b, call in enumerate(chosen):
        ids_BT[b, : lengths[b]] = torch.tensor(call.prompt_ids + call.response_ids)
    device = trainer.model.device
    logp_BT = score_tokens(
        trainer.model,
        ids_BT.to(device),
        torch.tensor(lengths, device=device),
        temperature=temperature,
    ).logp_BT.double()
    ours_n = np.concatenate(
        [logp_BT[b, len(c.prompt_ids) : lengths[b]].cpu().numpy() for b, c in enumerate(chosen)]
    )
    theirs_n = np.concatenate([np.array(c.logprobs, dtype=np.float64) for c in chosen])
    finite_n = np.isfinite(theirs_n)
    ours_n, theirs_n = ours_n[finite_n], theirs_n[finite_n]
    if len(ours_n) < 2:
        return {}
    d_n = ours_n - theirs_n
    kl_n = np.expm1(d_n) - d_n
    return {
        "mismatch_kl/lr0_mean": float(kl_n.mean()),
        "mismatch_kl/lr0_max": float(kl_n.max()),
        "engine/logprob_corr": _correlation(ours_n, theirs_n),
        "engine/prob_corr": _correlation(np.exp(ours_n), np.exp(theirs_n)),
        "engine/matched_tokens": float(len(ours_n)),
    }


def _correlation(a_n: NDArray[np.float64], b_n: NDArray[np.float64]) -> float:
    """Pearson's; 1 where nothing varies on either side."""
    if a_n.std() == 0 or b_n.std() == 0:
        return 1.0
    return float(np.corrcoef(a_n, b_n)[0, 1])

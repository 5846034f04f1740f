"""The gradient of one optimiser update, added up in pieces that fit in memory.

One function type, so that what computes the scores can be exchanged: rows here, prefix trees in
`rl.tree_update`. Whatever the pieces, tokens and calls are counted over the *whole* update before
the first backward pass, and the gradient is the same.

Shape legend: B rows of a piece, T tokens of a row (right-padded), n trained tokens of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from model.scoring import TokenScores, score_tokens
from model.transformer import Transformer
from rl.objectives import Objective, Terms, Tokens, shares
from rl.samples import Sample


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Figures of one update. `loss` is the whole loss; `*_sum` run over its `tokens` trained tokens
    (nats); `nonfinite` counts recorded log-probs that were left out. `figures` go into the row."""

    loss: float
    tokens: int
    nonfinite: int
    weight_sum: float
    weight_max: float
    capped: int
    kl_sum: float
    kl_max: float
    entropy_sum: float
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, terms: Sequence[Terms], entropy_sum: float, nonfinite: int, **more: Any) -> Self:
        """The pieces' terms, added up; `more` are fields that do not come from them."""
        return cls(
            loss=sum(float(t.loss.detach()) for t in terms),
            tokens=sum(t.tokens for t in terms),
            nonfinite=nonfinite,
            weight_sum=sum(t.weight_sum for t in terms),
            weight_max=max((t.weight_max for t in terms), default=0.0),
            capped=sum(t.capped for t in terms),
            kl_sum=sum(t.kl_sum for t in terms),
            kl_max=max((t.kl_max for t in terms), default=0.0),
            entropy_sum=entropy_sum,
            **more,
        )


class Backward(Protocol):
    """Adds the gradient of one update over `samples` to the model's parameters.

    `budget` bounds a piece: rows for `backward_rows`, packed tokens for trees. The weights are not
    changed. There is at least one trained token.
    """

    def __call__(
        self,
        model: Transformer,
        samples: Sequence[Sample],
        objective: Objective,
        temperature: float,
        budget: int,
    ) -> Sums: ...


@dataclass(frozen=True)
class Rows:
    """Samples as padded rows on the model's device. `mask` is True on trained tokens, `trained`
    counts them by row, on the host."""

    trained: Tensor
    ids: Tensor
    lengths: Tensor
    mask: Tensor
    rollout: Tensor
    advantage: Tensor


def trained_counts(samples: Sequence[Sample]) -> tuple[int, int, int]:
    """Trained tokens, calls that have any, and recorded log-probs that are not finite."""
    tokens = calls = nonfinite = 0
    for sample in samples:
        bad = len(sample.logprobs) - sum(map(math.isfinite, sample.logprobs))
        good = len(sample.response_ids) - bad
        tokens, calls, nonfinite = tokens + good, calls + (good > 0), nonfinite + bad
    return tokens, calls, nonfinite


def backward_rows(
    model: Transformer,
    samples: Sequence[Sample],
    objective: Objective,
    temperature: float,
    budget: int,
) -> Sums:
    """`Backward` by padded rows, `budget` of them at once, of similar length together."""
    tokens, calls, nonfinite = trained_counts(samples)
    order = sorted(samples, key=lambda s: -s.length)
    terms, entropy = [], 0.0
    for i in range(0, len(order), budget):
        rows = rows_of(order[i : i + budget], model)
        scores = score_rows(model, rows, temperature)
        logp_n = scores.logp_BT[rows.mask]
        share_n = shares(rows.trained, objective.reduction, tokens, calls)
        term = objective.loss(
            Tokens(
                logp_n,
                rows.rollout[rows.mask].to(logp_n.dtype),
                rows.advantage[:, None].expand_as(rows.mask)[rows.mask].to(logp_n.dtype),
                share_n.to(logp_n.device, logp_n.dtype),
            )
        )
        term.loss.backward()  # type: ignore[no-untyped-call]
        entropy += float(scores.entropy_BT.sum())
        terms.append(term)
    return Sums.of(terms, entropy, nonfinite)


def score_rows(model: Transformer, rows: Rows, temperature: float) -> TokenScores:
    """Log-probs (with graph) and entropies of the trained tokens."""
    # one number a row, in the logits' own type: exact in float64 too
    temperature_B = torch.full(
        (len(rows.ids),), temperature, dtype=model.dtype, device=model.device
    )
    return score_tokens(
        model, rows.ids, rows.lengths, temperature=temperature_B, wanted_BT=rows.mask
    )


def rows_of(samples: Sequence[Sample], model: Transformer) -> Rows:
    """Pad to the longest; recorded log-probs that are not finite are masked."""
    width = max(s.length for s in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    rollout = torch.zeros(len(samples), width, dtype=torch.float64)
    mask = torch.zeros(len(samples), width, dtype=torch.bool)
    for b, s in enumerate(samples):
        start, end = len(s.prompt_ids), s.length
        ids[b, :end] = torch.from_numpy(np.array(s.prompt_ids + s.response_ids))
        if s.logprobs:  # imitated scripts have none
            rollout[b, start:end] = torch.from_numpy(np.array(s.logprobs))
        mask[b, start:end] = True
    mask &= rollout.isfinite()
    device, dtype = model.device, model.dtype
    return Rows(
        mask.sum(dim=1),
        ids.to(device),
        torch.tensor([s.length for s in samples], device=device),
        mask.to(device),
        rollout.to(device, dtype),
        torch.tensor([s.advantage for s in samples], device=device, dtype=dtype),
    )
